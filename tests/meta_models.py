"""Denoisers with the configurations of the released models, on the meta device: shapes and counts without weights.

Written out from the released models' published architectures, since nothing can be downloaded; what is not said is the
default of the class in diffusers, which for FLUX.1 and Wan is the released model itself.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn


def without_memory(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """The model with weights of this type that have shapes and nothing in them."""
    with torch.device("meta"):
        model = build().eval().requires_grad_(False)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(weight, dtype=dtype), requires_grad=False)
    return model


def sd15() -> Any:
    return diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sdxl() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def sd3_of(layers: int, **options: Any) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=layers,
        attention_head_dim=64,
        caption_projection_dim=64 * layers,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
        **options,
    )


def sd3_medium() -> Any:
    return sd3_of(24)


def sd35_large() -> Any:
    return sd3_of(38, qk_norm="rms_norm")


def sd35_medium() -> Any:
    return sd3_of(24, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))


def pixart() -> Any:
    return diffusers.PixArtTransformer2DModel(sample_size=128, caption_channels=4096, use_additional_conditions=False)


def flux_dev() -> Any:
    return diffusers.FluxTransformer2DModel(guidance_embeds=True)


def wan_14b() -> Any:
    return diffusers.WanTransformer3DModel()


def wan_1b() -> Any:
    return diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)
