"""OmniGen: one causal sequence of words, a time token, and the picture."""

import math
from typing import Any

import torch
from torch import nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import Arguments, Batch, Family, bare, blank, third
from diffguide.site import Grid, Site


class OmniGen(Family):
    """`OmniGenTransformer2DModel`: [cond, uncond], with pictures to start from [cond, uncond, picture only]."""

    models = ("OmniGenTransformer2DModel",)
    latent = ("hidden_states", 0)
    lacks = {"words": "OmniGen pads its words to those of the whole batch; words cannot be looked up yet"}

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        blocks: Any = model.layers
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        return [
            Site(f"layers.{i}.self_attn", "joint", third(i, len(blocks)), level, block.self_attn)
            for i, block in enumerate(blocks)
        ]

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        """The picture comes last, a time token before it."""
        return slice(queries - math.prod(grid), queries), slice(0, words)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        names = ("cond", "uncond", "picture") if batch.kwargs.get("input_img_latents") else ("cond", "uncond")
        n = batch.rows // len(names)
        return {name: slice(i * n, (i + 1) * n) for i, name in enumerate(names)}

    def channels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return bare(model).config.in_channels  # type: ignore[union-attr]

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tokens before the time token, those of pictures to start from included."""
        ids = kwargs["input_ids"]
        return 0 if ids is None else ids.shape[1]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: torch.Tensor, rows: int) -> Arguments:
        """Pictures to start from are listed by row."""
        args, cut = super().take(args, kwargs, index, rows)
        sizes: dict[int, Any] = kwargs["input_image_sizes"]
        if sizes:
            first, order = {}, 0
            for row in sorted(sizes):
                first[row] = order
                order += len(sizes[row])
            kept = [row for row in index.tolist() if row in sizes]
            cut["input_image_sizes"] = {new: sizes[row] for new, row in enumerate(index.tolist()) if row in sizes}
            pictures = kwargs["input_img_latents"]
            cut["input_img_latents"] = [p for row in kept for p in pictures[first[row] : first[row] + len(sizes[row])]]
        return args, cut

    def template(self, pipe: Any) -> tokens.Template:
        raise PromptError(self.lacks["words"])

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        words, n = 64, (size[0] // config.patch_size) * (size[1] // config.patch_size)
        length = words + 1 + n
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "timestep": zeros(1),
            "input_ids": zeros(1, words).long(),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": zeros(1, length, length) + 1,
            "position_ids": torch.arange(length, device=zeros(1).device)[None],
        }
