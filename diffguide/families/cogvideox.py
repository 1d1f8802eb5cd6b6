"""CogVideoX: one stream of text and video tokens, text first."""

import math
from typing import Any

from torch import nn

from diffguide.family import LARGE, Arguments, Batch, Family, bare, blank, third, together
from diffguide.site import Grid, Site


class CogVideoX(Family):
    """`CogVideoXTransformer3DModel`: latents are [B, frames, C, h, w]."""

    models = ("CogVideoXTransformer3DModel",)
    latent = ("hidden_states", 0)
    channels_at = 2
    text_first = True
    lacks = {"self maps": LARGE}
    shared = ("image_rotary_emb",)

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        blocks: Any = model.transformer_blocks
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        return [
            Site(f"transformer_blocks.{i}.attn1", "joint", third(i, len(blocks)), level, block.attn1)
            for i, block in enumerate(blocks)
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        shape = self.argument(args, kwargs).shape
        return shape[1], shape[3], shape[4]

    def refusals(self, pipe: Any) -> list[str]:
        config: Any = bare(pipe.transformer).config
        if (config.patch_size_t or 1) > 1:
            return ["this CogVideoX packs frames into tokens, which is not supported; use CogVideoX 1.0"]
        return []

    def example_size(self, model: nn.Module) -> Grid:
        config: Any = bare(model).config
        return (
            (config.sample_frames - 1) // config.temporal_compression_ratio + 1,
            config.sample_height,
            config.sample_width,
        )

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        frames, h, w = size
        kwargs: dict[str, Any] = {
            "hidden_states": zeros(1, frames, config.in_channels, h, w),
            "encoder_hidden_states": zeros(1, config.max_text_seq_length, config.text_embed_dim),
            "timestep": zeros(1),
        }
        if config.use_rotary_positional_embeddings:
            tokens = frames * (h // config.patch_size) * (w // config.patch_size)
            kwargs["image_rotary_emb"] = (zeros(tokens, config.attention_head_dim),) * 2
        return (), kwargs
