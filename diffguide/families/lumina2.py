"""Lumina 2: one stream of caption and image tokens, caption first, packed without padding."""

import math
from typing import Any

from torch import nn

from diffguide import tokens
from diffguide.errors import SteeringError
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, in_turn, third
from diffguide.site import Site


class Lumina2(Family):
    """`Lumina2Transformer2DModel`: its refiners, of text alone and image alone, are left alone."""

    models = ("Lumina2Transformer2DModel",)
    latent = ("hidden_states", 0)
    text_first = True

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        blocks: Any = model.layers
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        return [
            Site(f"layers.{i}.attn", "joint", third(i, len(blocks)), level, block.attn)
            for i, block in enumerate(blocks)
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return in_turn(batch)

    def at_scheduler(self, pipe: Any) -> int:
        """Guidance is normalised by default, then turned round."""
        return -1

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many are not padding: the image begins right behind them."""
        lengths = {int(n) for n in kwargs["encoder_attention_mask"].sum(1)}
        if len(lengths) > 1:
            raise SteeringError(
                "captions of different lengths begin their pictures at different tokens; draw one prompt at a time"
            )
        return lengths.pop()

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """A system prompt before the prompt."""
        system = encoding.given.get("system_prompt")
        return tokens.Template((pipe.system_prompt if system is None else system) + " <Prompt Start> ")

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (1 - super().timestep(args, kwargs)) * 1000  # the pipeline counts from noise to image, in 0..1

    def example(self, model: nn.Module, size: tuple[int, ...]) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "timestep": zeros(1),
            "encoder_hidden_states": zeros(1, 256, config.cap_feat_dim),
            "encoder_attention_mask": zeros(1, 256).bool().logical_not(),
        }
