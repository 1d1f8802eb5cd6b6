"""FLUX.2: FLUX.1's layout with four ids a token; the single blocks project everything at once."""

from typing import Any

import torch
from torch import nn

from diffguide import tokens
from diffguide.errors import PromptError, SteeringError
from diffguide.families.flux import Flux
from diffguide.family import Arguments, bare, blank
from diffguide.site import Grid, Site


class Flux2(Flux):
    """`Flux2Transformer2DModel`: pictures to start from come behind the picture, with another first id."""

    models = ("Flux2Transformer2DModel",)
    shared = ()  # ids come for each row
    prompts = ("prompt",)
    tokenizer = "tokenizer"

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        if keys != queries:
            raise SteeringError(
                f"{site.name}: keys of reference pictures come from a cache, which cannot be steered; use "
                "Flux2Pipeline, which has none"
            )
        return super().spans(site, grid, words, queries, keys)

    def template(self, pipe: Any) -> tokens.Template:
        raise PromptError(
            "FLUX.2 pads its chat template on a side that depends on its processor; words cannot be looked up yet"
        )

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        h, w = size[0] // 2, size[1] // 2
        ids = zeros(1, h, w, len(config.axes_dims_rope))
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        kwargs = {
            "hidden_states": zeros(1, h * w, config.in_channels),
            "encoder_hidden_states": zeros(1, 512, config.joint_attention_dim),
            "timestep": zeros(1),
            "img_ids": ids.flatten(1, 2),
            "txt_ids": zeros(1, 512, len(config.axes_dims_rope)),
        }
        return (), kwargs | ({"guidance": zeros(1)} if config.guidance_embeds else {})
