"""Sana: linear self-attention, which has no maps, and cross-attention to Gemma's words."""

import inspect
from typing import Any

from torch import nn

from diffguide import tokens
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, third, together
from diffguide.site import Grid, Site

LINEAR = "its self-attention is linear, without a softmax to look at or to replace"


class Sana(Family):
    """`SanaTransformer2DModel`: only `attn2` is steered; `attn1` is linear attention, without a softmax to look at."""

    models = ("SanaTransformer2DModel",)
    latent = ("hidden_states", 0)
    kinds = ("cross",)
    lacks = {"self maps": LINEAR, "weak pass": LINEAR}

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        blocks: Any = model.transformer_blocks
        level = model.config.patch_size.bit_length() - 1  # type: ignore[union-attr]
        return [
            Site(f"transformer_blocks.{i}.attn2", "cross", third(i, len(blocks)), level, block.attn2)
            for i, block in enumerate(blocks)
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """An instruction before the prompt, all but the first of whose states are cut off."""
        default = inspect.signature(pipe.__call__).parameters["complex_human_instruction"].default
        lines = encoding.given.get("complex_human_instruction", default)
        if not lines:
            return tokens.PLAIN
        before = "\n".join(lines)
        return tokens.Template(before, dropped=len(pipe.tokenizer.encode(before)) - 2)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "encoder_hidden_states": zeros(1, 300, config.caption_channels),
            "encoder_attention_mask": zeros(1, 300) + 1,
            "timestep": zeros(1),
        }
