"""Pipelines around the small denoisers, given text states in place of prompts: no text encoder, no weights."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny_models import MODELS

PIPES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def pipe(function: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    """List a pipeline with the arguments of its call."""
    PIPES[function.__name__] = function
    return function


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=channels,
    ).eval()


def encoders(*names: str) -> dict[str, None]:
    return dict.fromkeys(names)


def texts(width: int, length: int = 6) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": noise(1, length, width), "negative_prompt_embeds": noise(1, length, width, seed=2)}


@pipe
def sd15() -> tuple[Any, dict[str, Any]]:
    return (
        StableDiffusionPipeline(
            vae=vae(),
            unet=MODELS["sd15"](),
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
            requires_safety_checker=False,
            **encoders("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        ),
        {**texts(8), "guidance_scale": 5.0, "height": 16, "width": 24},
    )


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
