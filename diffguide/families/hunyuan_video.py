"""HunyuanVideo: one stream of video and text tokens, video first, padding masked."""

import math
import sys
from typing import Any

from torch import nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import LARGE, Arguments, Batch, Encoding, Family, bare, blank, in_turn, third
from diffguide.site import Grid, Site


class HunyuanVideo(Family):
    """`HunyuanVideoTransformer3DModel`: double-stream blocks, then single ones; its text refiner is left alone."""

    models = ("HunyuanVideoTransformer3DModel",)
    latent = ("hidden_states", 0)
    lacks = {"self maps": LARGE}

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        names = [
            f"{kind}.{number}.attn"
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for number in range(len(getattr(model, kind)))
        ]
        return [
            Site(name, "joint", third(i, len(names)), level, model.get_submodule(name)) for i, name in enumerate(names)
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """True classifier-free guidance makes a second call."""
        return in_turn(batch)

    def refusals(self, pipe: Any) -> list[str]:
        if getattr(bare(pipe.transformer).config, "image_condition_type", None) == "token_replace":
            return [
                f"this {type(pipe).__name__} keeps the first frame out of the scheduler's steps, where a move "
                "would be lost; use HunyuanVideoPipeline"
            ]
        return []

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """The one of the call, else the pipeline's default."""
        default = getattr(sys.modules[type(pipe).__module__], "DEFAULT_PROMPT_TEMPLATE", None)
        if default is None or "image_emb_start" in default:
            raise PromptError(
                f"{type(pipe).__name__} puts a picture among the words, whose columns cannot be told then"
            )
        given = encoding.given.get("prompt_template") or default
        if given.get("crop_start") is None:
            raise PromptError("this prompt_template does not say its crop_start, without which no word can be found")
        before, after = given["template"].split("{}")
        return tokens.Template(before, after, given["crop_start"])

    def example_size(self, model: nn.Module) -> Grid:
        return 33, 90, 160

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        kwargs = {
            "hidden_states": zeros(1, config.in_channels, *size),
            "timestep": zeros(1),
            "encoder_hidden_states": zeros(1, 256, config.text_embed_dim),
            "encoder_attention_mask": zeros(1, 256) + 1,
            "pooled_projections": zeros(1, config.pooled_projection_dim),
        }
        return (), kwargs | ({"guidance": zeros(1)} if config.guidance_embeds else {})
