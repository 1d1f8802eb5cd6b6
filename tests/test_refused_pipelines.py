"""Pipelines that share a denoiser with one that is steered, and are refused by name when a guide is attached."""

from typing import Any

import diffusers
import pytest
from tiny_models import MODELS
from tiny_pipes import encoders

from diffguide import Guide
from diffguide.errors import AttachError
from diffguide.processors import PAG


def pipeline(name: str, model: Any, *more: str, vae: Any = None) -> Any:
    """A pipeline of nothing but a denoiser."""
    parts = encoders("text_encoder", "tokenizer", *more)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, name)(transformer=model, scheduler=scheduler, vae=vae, **parts)


def cogvideox_1_5() -> Any:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        patch_size=2,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )
    return pipeline("CogVideoXPipeline", model)


def first_frame_kept() -> Any:
    model = MODELS["hunyuan_video"]()
    model.register_to_config(image_condition_type="token_replace")
    names = ("text_encoder_2", "tokenizer_2", "image_processor")
    return pipeline("HunyuanVideoImageToVideoPipeline", model, *names)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: pipeline("SkyReelsV2DiffusionForcingPipeline", MODELS["skyreels"]()),
            "every frame its own noise .* use SkyReelsV2Pipeline or WanPipeline",
        ),
        (cogvideox_1_5, "packs frames into tokens.* use CogVideoX 1.0"),
        (
            lambda: pipeline("QwenImageLayeredPipeline", MODELS["qwen_image"](), "processor"),
            "several layers at once.* use QwenImagePipeline",
        ),
        (
            lambda: pipeline("ZImageOmniPipeline", MODELS["z_image"](), "siglip", "siglip_processor"),
            "other pictures between caption and picture; use ZImagePipeline",
        ),
        (
            lambda: pipeline("Flux2KleinKVPipeline", MODELS["flux2_klein"]()),
            "keys from a cache.* use Flux2KleinPipeline",
        ),
        (first_frame_kept, "keeps the first frame out of the scheduler's steps.* use HunyuanVideoPipeline"),
    ],
    ids=["skyreels", "cogvideox-1.5", "qwen-layered", "z-image-omni", "flux2-kv", "hunyuan-first-frame"],
)
def test_it_is_refused_with_the_reason_and_the_fix(build: Any, reason: str) -> None:
    pipe = build()
    with pytest.raises(AttachError, match=reason):
        Guide(pipe, PAG(layers="all")).attach()
