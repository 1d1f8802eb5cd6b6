"""Describe a denoiser that diffguide does not know, here AuraFlow's: guides then work on its pipelines."""

from typing import Any

from diffusers import AuraFlowTransformer2DModel

import diffguide as dg
from diffguide.family import Batch, blank, third, together
from diffguide.registry import of_model
from diffguide.site import Site


@dg.register_family
class AuraFlow(dg.Family):
    """Words first, behind eight tokens that are learned; a token of the image is 2x2 latent cells."""

    models = ("AuraFlowTransformer2DModel",)
    latent = ("hidden_states", 0)

    def sites(self, model: Any) -> list[Site]:
        """Two kinds of blocks, attention joint in both."""
        blocks = [*model.joint_transformer_blocks, *model.single_transformer_blocks]
        return [Site(f"block {i}", "joint", third(i, len(blocks)), 1, b.attn) for i, b in enumerate(blocks)]

    def spans(self, site: Site, grid: Any, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        """Where the image tokens are, and the words."""
        return slice(8 + words, queries), slice(8, 8 + words)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """[uncond, cond] in one call."""
        return together(pipe, batch)

    def example(self, model: Any, size: Any) -> Any:
        """Arguments of a call, for estimates of memory."""
        zeros, width = blank(model), model.config.joint_attention_dim
        states = {"encoder_hidden_states": zeros(1, 256, width), "timestep": zeros(1)}
        return (), {"hidden_states": zeros(1, model.config.in_channels, *size), **states}


model = AuraFlowTransformer2DModel(8, num_mmdit_layers=1, num_single_dit_layers=2, num_attention_heads=2)
print([site.name for site in of_model(model).sites(model)])
