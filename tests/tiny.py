"""Random-weight pipelines of the real classes that run in a blink, with the tokenizer of the embedded world."""

import inspect
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffguide.zoo.tokenizer import build_tokenizer

PROMPT = "a red circle and a blue square on a white background"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).eval()


def text_encoder(tokenizer: Any, projection: int | None = None) -> Any:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=projection or 8,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def unet(**options: Any) -> UNet2DConditionModel:
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**(settings | options)).eval()


def sd(scheduler: Any = None, cls: Any = StableDiffusionPipeline, **options: Any) -> Any:
    """A Stable Diffusion 1 pipeline (or another class of the same parts); `options` go to the U-Net."""
    tokenizer = build_tokenizer()
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(**options),
        "scheduler": scheduler or DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    known = inspect.signature(cls.__init__).parameters
    pipe = cls(**{name: part for name, part in parts.items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path) -> Path:
    """Write the Stable Diffusion 1 pipeline into a folder, to be loaded as a user's model would be; returns the folder.

    It draws 32x32 pixels from latents of 16x16, with attention at 16x16 and 8x8.
    """
    sd().save_pretrained(folder)
    return folder


def sdxl(scheduler: Any = None) -> Any:
    tokenizer = build_tokenizer()
    model = unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=16,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(tokenizer),
        text_encoder_2=text_encoder(tokenizer, projection=32),
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
        unet=model,
        scheduler=scheduler or EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3(**options: Any) -> Any:
    """Stable Diffusion 3 without T5, which is how many use it; `options` go to the transformer."""
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    settings: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 32,
    }
    encoder = text_encoder(tokenizer, projection=8)
    pipe = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(settings | options)).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet() -> ControlNetModel:
    return ControlNetModel.from_unet(unet(), conditioning_channels=3, conditioning_embedding_out_channels=(4, 8)).eval()


def call(pipe: Any, prompt: Any = PROMPT, seed: int = 3, **options: Any) -> torch.Tensor:
    """Latents of a short run, [B, 4, h, w]."""
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"}
    if "image" not in options:
        settings |= {"height": 32, "width": 32}
    settings["generator"] = torch.Generator().manual_seed(seed)
    return pipe(prompt, **(settings | options)).images
