"""Describe a denoiser that diffguide does not know, here AuraFlow's, and look at its attention to words.

Weights are random and small, so that nothing is downloaded; a real pipeline is steered with `Guide(pipe, ...)` as ever.
"""

from typing import Any

import torch
from diffusers import AuraFlowTransformer2DModel
from torch import nn

import diffguide as dg
from diffguide import passes
from diffguide.family import Arguments, Batch, bare, blank, of_model, third, together
from diffguide.maps import Watch
from diffguide.site import Grid, Site


@dg.register_family
class AuraFlow(dg.Family):
    models = ("AuraFlowTransformer2DModel",)
    latent = ("hidden_states", 0)
    text_first = True

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        names = [
            f"{kind}.{number}.attn"
            for kind in ("joint_transformer_blocks", "single_transformer_blocks")
            for number in range(len(getattr(model, kind)))
        ]
        # a token is 2x2 latent cells: the grid is halved once
        return [Site(n, "joint", third(i, len(names)), 1, model.get_submodule(n)) for i, n in enumerate(names)]

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        first = 8  # learned tokens that this model puts before the words
        return slice(first + words, queries), slice(first, first + words)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "encoder_hidden_states": zeros(1, 16, config.joint_attention_dim),
            "timestep": zeros(1),
        }


def main() -> None:
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pos_embed_max_size=64,
    )
    family = of_model(model)
    args, kwargs = family.example(model, (8, 8))
    kwargs["hidden_states"] = torch.randn(1, 4, 8, 8)
    sites = family.sites(model)
    grids = {site: family.grid(site, (8, 8)) for site in sites}
    wishes = {(0, "words"): (Watch("cross"), sites)}
    words = family.words(args, kwargs)
    with torch.no_grad(), passes.looking(model, family, args, kwargs, wishes, grids, words=words) as maps:
        for seen in maps[0]["words"]:
            share = float(seen.values.sum(-1).mean())
            print(
                f"{seen.site.name}: {share:.0%} of the attention of {seen.grid[0]}x{seen.grid[1]} tokens goes to words"
            )


if __name__ == "__main__":
    main()
