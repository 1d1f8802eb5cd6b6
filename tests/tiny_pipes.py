"""Pipelines around the small denoisers, given text states in place of prompts: no text encoder, no weights."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    OmniGenPipeline,
    PixArtAlphaPipeline,
    QwenImagePipeline,
    SanaPipeline,
    SkyReelsV2Pipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from tiny_models import MODELS

PIPES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def pipe(function: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """List a pipeline with the arguments of its call."""
    PIPES[function.__name__] = function
    return function


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vae(channels: int = 4, widths: tuple[int, ...] = (4, 8)) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=2,
        latent_channels=channels,
    ).eval()


def encoders(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def texts(width: int, length: int = 6) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": noise(1, length, width), "negative_prompt_embeds": noise(1, length, width, seed=2)}


def sd_of(name: str, **schedule: Any) -> tuple[Any, dict[str, Any]]:
    return (
        StableDiffusionPipeline(
            vae=vae(),
            unet=MODELS[name](),
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, **schedule),
            requires_safety_checker=False,
            **encoders("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        ),
        {**texts(8), "guidance_scale": 5.0, "height": 16, "width": 24},
    )


@pipe
def sd15() -> tuple[Any, dict[str, Any]]:
    return sd_of("sd15")


@pipe
def sd2() -> tuple[Any, dict[str, Any]]:
    return sd_of("sd2", prediction_type="v_prediction")


@pipe
def sdxl() -> tuple[Any, dict[str, Any]]:
    built = StableDiffusionXLPipeline(
        vae=vae(),
        unet=MODELS["sdxl"](),
        scheduler=EulerDiscreteScheduler(**NOISE),
        add_watermarker=False,
        **encoders("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    pooled = {"pooled_prompt_embeds": noise(1, 32), "negative_pooled_prompt_embeds": noise(1, 32, seed=2)}
    sizes = {"original_size": (32, 48), "crops_coords_top_left": (3, 5), "negative_original_size": (8, 8)}
    return built, {**texts(8), **pooled, **sizes, "guidance_scale": 5.0, "height": 16, "width": 24}


def sd3_of(**more: Any) -> tuple[Any, dict[str, Any]]:
    built = StableDiffusion3Pipeline(
        vae=vae(),
        transformer=MODELS["sd3"](),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **encoders(*(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))),
    )
    pooled = {"pooled_prompt_embeds": noise(1, 16), "negative_pooled_prompt_embeds": noise(1, 16, seed=2)}
    return built, {**texts(16), **pooled, "guidance_scale": 5.0, "height": 16, "width": 24, **more}


@pipe
def sd3() -> tuple[Any, dict[str, Any]]:
    return sd3_of()


@pipe
def sd3_skipping_layers() -> tuple[Any, dict[str, Any]]:
    return sd3_of(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


def flux_of(**more: Any) -> tuple[Any, dict[str, Any]]:
    built = FluxPipeline(
        vae=vae(1),
        transformer=MODELS["flux"](),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **encoders("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    given = {"prompt_embeds": noise(1, 6, 32), "pooled_prompt_embeds": noise(1, 32), "height": 16, "width": 24}
    return built, given | more


@pipe
def flux() -> tuple[Any, dict[str, Any]]:
    return flux_of()


@pipe
def flux_with_true_guidance() -> tuple[Any, dict[str, Any]]:
    away = {"negative_prompt_embeds": noise(1, 6, 32, seed=2), "negative_pooled_prompt_embeds": noise(1, 32, seed=2)}
    return flux_of(true_cfg_scale=3.0, **away)


@pipe
def pixart() -> tuple[Any, dict[str, Any]]:
    built = PixArtAlphaPipeline(
        vae=vae(),
        transformer=MODELS["pixart"](),
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        **encoders("text_encoder", "tokenizer"),
    )
    masks = {
        "prompt_attention_mask": torch.ones(1, 6),
        "negative_prompt_attention_mask": torch.tensor([[1.0, 1, 1, 0, 0, 0]]),
    }
    given = {"height": 16, "width": 24, "use_resolution_binning": False, "prompt": None, "negative_prompt": None}
    return built, {**texts(32), **masks, **given, "guidance_scale": 5.0}


def wan_of(**parts: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    coder = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    built = WanPipeline(
        vae=coder.eval(),
        transformer=MODELS["wan"](),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **encoders("text_encoder", "tokenizer"),
        **parts,
    )
    return built, {**texts(32, 8), "guidance_scale": 4.0, "height": 32, "width": 48, "num_frames": 5}


@pipe
def wan() -> tuple[Any, dict[str, Any]]:
    return wan_of()


@pipe
def wan_with_two_denoisers() -> tuple[Any, dict[str, Any]]:
    second = MODELS["wan"]()
    second.blocks[0].attn2.to_v.weight.mul_(2)
    return wan_of(transformer_2=second, boundary_ratio=0.8)


@pipe
def qwen_image() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    coder = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    built = QwenImagePipeline(
        vae=coder.eval(),
        transformer=MODELS["qwen_image"](),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **encoders("text_encoder", "tokenizer"),
    )
    masks = {f"{which}prompt_embeds_mask": torch.ones(1, 6).long() for which in ("", "negative_")}
    return built, {**texts(16), **masks, "true_cfg_scale": 3.0, "height": 32, "width": 48}


@pipe
def animatediff() -> tuple[Any, dict[str, Any]]:
    built = AnimateDiffPipeline(
        vae=vae(),
        unet=MODELS["animatediff"](),
        motion_adapter=None,  # type: ignore[arg-type]
        scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        **encoders("text_encoder", "tokenizer"),
    )
    return built, {**texts(8), "guidance_scale": 5.0, "height": 16, "width": 24, "num_frames": 3}


def assembled(cls: Any, name: str, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline of a class around a small denoiser, without text encoders, and mostly without autoencoder."""
    return cls(
        transformer=MODELS[name](),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(),
        **{"vae": None, **encoders("text_encoder", "tokenizer"), **parts},
    )


def masks(**lengths: int) -> dict[str, torch.Tensor]:
    """Masks of six words of which so many are not padding."""
    return {name: (torch.arange(6) < length).long()[None] for name, length in lengths.items()}


SMALL = {"height": 64, "width": 96}


@pipe
def flux2() -> tuple[Any, dict[str, Any]]:
    return assembled(Flux2Pipeline, "flux2"), {"prompt_embeds": noise(1, 6, 32), **SMALL}


@pipe
def flux2_klein() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    coder = AutoencoderKLFlux2(  # whose statistics scale the latents in the end
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=1,
    )
    built = assembled(Flux2KleinPipeline, "flux2_klein", vae=coder.eval())
    return built, {**texts(32), "guidance_scale": 4.0, "height": 16, "width": 24}


@pipe
def chroma() -> tuple[Any, dict[str, Any]]:
    given = {k: v.float() for k, v in masks(prompt_attention_mask=5, negative_prompt_attention_mask=3).items()}
    return assembled(ChromaPipeline, "chroma"), {**texts(32), **given, "guidance_scale": 4.0, **SMALL}


def z_image_of(**more: Any) -> tuple[Any, dict[str, Any]]:
    words = {name: [states[0]] for name, states in texts(16).items()}
    return assembled(ZImagePipeline, "z_image"), {**words, "guidance_scale": 3.0, **SMALL, **more}


@pipe
def z_image() -> tuple[Any, dict[str, Any]]:
    return z_image_of()


@pipe
def z_image_normalised() -> tuple[Any, dict[str, Any]]:
    return z_image_of(cfg_normalization=True)


@pipe
def lumina2() -> tuple[Any, dict[str, Any]]:
    given = masks(prompt_attention_mask=5, negative_prompt_attention_mask=3)
    return assembled(Lumina2Pipeline, "lumina2"), {**texts(32), **given, "guidance_scale": 4.0, **SMALL}


class Picture:
    """In place of torchvision's transforms, which OmniGen's processor needs and which may not be installed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, picture: Any) -> torch.Tensor:
        return torch.zeros(3, picture.height, picture.width)


class Ids:
    """A tokenizer that gives every word its length."""

    model_max_length = 10**6

    def __call__(self, text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[1, *map(len, text.split())])


def omnigen_of(tokenizer: Any) -> Any:
    names = ("Compose", "Lambda", "ToTensor", "Normalize")
    processor_omnigen.transforms = SimpleNamespace(**dict.fromkeys(names, Picture))  # type: ignore[attr-defined]
    pipeline_omnigen.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor
    return OmniGenPipeline(
        transformer=MODELS["omnigen"](),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(widths=(4, 4, 4, 8)),
        tokenizer=tokenizer,
    )


@pipe
def omnigen() -> tuple[Any, dict[str, Any]]:
    longer = "ab " * 60  # than what it avoids by default: what is shorter is padded in front
    return omnigen_of(Ids()), {"prompt": longer, "guidance_scale": 2.0, **SMALL}


@pipe
def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    built = assembled(
        HunyuanDiTPipeline,
        "hunyuan_dit",
        DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        requires_safety_checker=False,
        **encoders("safety_checker", "feature_extractor"),
    )
    more = {f"{name}_2": noise(1, 256, 32, seed=seed) for seed, name in enumerate(texts(32), 3)}
    ones = {f"{which}prompt_attention_mask": torch.ones(1, 77).long() for which in ("", "negative_")}
    more |= ones | {f"{name}_2": torch.ones(1, 256).long() for name in ones}
    return built, {**texts(32, 77), **more, "guidance_scale": 5.0, "use_resolution_binning": False, **SMALL}


@pipe
def sana() -> tuple[Any, dict[str, Any]]:
    given = masks(prompt_attention_mask=5, negative_prompt_attention_mask=3)
    size = {"height": 128, "width": 192, "use_resolution_binning": False, "negative_prompt": None}
    return assembled(SanaPipeline, "sana"), {**texts(8), **given, "guidance_scale": 4.0, **size}


@pipe
def ltx() -> tuple[Any, dict[str, Any]]:
    given = masks(prompt_attention_mask=5, negative_prompt_attention_mask=3)
    size = {"height": 128, "width": 192, "num_frames": 9}
    return assembled(LTXPipeline, "ltx"), {**texts(16), **given, "guidance_scale": 4.0, **size}


@pipe
def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    built = assembled(HunyuanVideoPipeline, "hunyuan_video", **encoders("text_encoder_2", "tokenizer_2"))
    pooled = {"pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8, seed=2)}
    given = masks(prompt_attention_mask=5, negative_prompt_attention_mask=3)
    return built, {**texts(16), **pooled, **given, "true_cfg_scale": 3.0, "num_frames": 5, **SMALL}


@pipe
def cogvideox() -> tuple[Any, dict[str, Any]]:
    built = assembled(CogVideoXPipeline, "cogvideox", CogVideoXDDIMScheduler(clip_sample=False))
    return built, {**texts(8), "guidance_scale": 4.0, "num_frames": 5, **SMALL}


@pipe
def skyreels() -> tuple[Any, dict[str, Any]]:
    built = assembled(
        SkyReelsV2Pipeline,
        "skyreels",
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    return built, {**texts(32, 8), "guidance_scale": 4.0, "num_frames": 5, **SMALL}


def built(name: str) -> tuple[Any, dict[str, Any], Any]:
    """A quiet pipeline, the arguments of its call, and its denoiser."""
    pipe, given = PIPES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, given, pipe.unet if hasattr(pipe, "unet") else pipe.transformer
