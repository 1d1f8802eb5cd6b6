"""AnimateDiff: a Stable Diffusion U-Net drawing every frame, with attention between frames in motion modules."""

from dataclasses import replace
from typing import Any

from torch import nn

from diffguide.families.unet import UNet
from diffguide.family import Arguments, bare, blank
from diffguide.site import Grid, Site


class AnimateDiff(UNet):
    """`UNetMotionModel`: latents [B, C, frames, h, w]; in attention every frame, or every place, is a row."""

    models = ("UNetMotionModel",)

    def sites(self, model: nn.Module) -> list[Site]:
        """Those of the U-Net, frames apart; modules between frames are `"temporal"`."""
        found = []
        for site in super().sites(model):
            kind = "temporal" if "motion_modules" in site.name else site.kind
            found.append(replace(site, kind=kind, apart=kind != "temporal"))
        return found

    def grid(self, site: Site, size: Grid) -> Grid:
        frames, h, w = size
        return (frames,) if site.kind == "temporal" else (frames, *super().grid(site, (h, w)))

    def example_size(self, model: nn.Module) -> Grid:
        return 16, *super().example_size(model)

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        states = zeros(size[0], 77, config.cross_attention_dim)  # one for each frame
        return (zeros(1, config.in_channels, *size), zeros()), {"encoder_hidden_states": states}
