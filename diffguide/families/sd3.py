"""Stable Diffusion 3 and 3.5: one stream of image and text tokens, image first."""

import math
from dataclasses import replace
from typing import Any

from torch import nn

from diffguide import tokens
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, calls_of, third, together
from diffguide.site import Site


class SD3(Family):
    """`SD3Transformer2DModel`: joint attention in every block, in 3.5 image-only self-attention beside it in some.

    Text states are the 77 of both CLIP encoders, then those of T5; a word has columns in both parts.
    """

    models = ("SD3Transformer2DModel",)
    latent = ("hidden_states", 0)
    streams = ("encoder_hidden_states", "hidden_states")
    kinds = ("joint", "self")
    alike = ("prompt_2", "prompt_3")

    def sites(self, model: nn.Module) -> list[Site]:
        """`attn` (joint) and `attn2` (self) of the transformer blocks."""
        model = bare(model)
        blocks: Any = model.transformer_blocks
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        sites = []
        for number, block in enumerate(blocks):
            part = third(number, len(blocks))
            sites.append(
                Site(f"transformer_blocks.{number}.attn", "joint", part, level, block.attn, calls_of(block.attn))
            )
            if getattr(block, "attn2", None) is not None:
                sites.append(Site(f"transformer_blocks.{number}.attn2", "self", part, level, block.attn2))
        return sites

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """[uncond, cond]; with skipped layers a second call of the prompt alone."""
        return {"skip": slice(0, batch.rows)} if batch.call else together(pipe, batch)

    def example(self, model: nn.Module, size: tuple[int, ...]) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "encoder_hidden_states": zeros(1, 333, config.joint_attention_dim),
            "pooled_projections": zeros(1, config.pooled_projection_dim),
            "timestep": zeros(1),
        }

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        """In the part of both CLIP encoders; and in that of T5 where the pipeline has it, which may hold more."""
        clip = pipe.tokenizer_max_length
        found = [replace(self._text(pipe, prompt, encoding), states=min(clip, encoding.states))]
        if getattr(pipe, "text_encoder_3", None) is not None:
            found.append(tokens.Text(pipe.tokenizer_3, prompt, states=max(0, encoding.states - clip), first=clip))
        return found
