"""PixArt: a transformer with separate self- and cross-attention, T5 words."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffguide.family import Arguments, Batch, Family, bare, blank, self_and_cross, together
from diffguide.site import Grid, Site


class PixArt(Family):
    """`PixArtTransformer2DModel` (alpha and Sigma): half of the predicted channels are variance."""

    models = ("PixArtTransformer2DModel",)
    latent = ("hidden_states", 0)
    kinds = ("self", "cross")

    def sites(self, model: nn.Module) -> list[Site]:
        """`attn1` (self) and `attn2` (cross) of the transformer blocks."""
        level = round(math.log2(bare(model).config.patch_size))  # type: ignore[union-attr]
        return self_and_cross(model, "transformer_blocks", level)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def channels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return bare(model).config.in_channels  # type: ignore[union-attr]

    def term(self, model: nn.Module, d: Tensor) -> Tensor:
        """The variance half stays."""
        mean = bare(model).config.in_channels  # type: ignore[union-attr]
        return torch.cat([d[:, :mean], torch.zeros_like(d[:, mean:])], 1)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "encoder_hidden_states": zeros(1, 120, config.caption_channels),
            "encoder_attention_mask": zeros(1, 120) + 1,
            "timestep": zeros(1),
            "added_cond_kwargs": {"resolution": zeros(1, 2), "aspect_ratio": zeros(1, 1)},
        }
