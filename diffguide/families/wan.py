"""Wan 2.1 and 2.2: video, separate self- and cross-attention.

Wan 2.2 has one denoiser for the first steps and one for the last.
"""

import sys
from typing import Any, ClassVar

from torch import nn

from diffguide.family import LARGE, Arguments, Batch, Encoding, Family, bare, blank, in_turn, self_and_cross
from diffguide.site import Grid, Site


class Wan(Family):
    """`WanTransformer3DModel`: tokens of 2x2 latent cells of a frame; a picture to start from is more keys."""

    models: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)
    latent = ("hidden_states", 0)
    kinds = ("self", "cross")
    lacks = {"self maps": LARGE}

    def sites(self, model: nn.Module) -> list[Site]:
        """Image-to-video in 2.1 attends to the picture first, then to the words, in one processor."""
        calls = 2 if bare(model).config.added_kv_proj_dim is not None else 1  # type: ignore[union-attr]
        return self_and_cross(model, "blocks", level=1, calls=calls)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return in_turn(batch)

    def written(self, pipe: Any, prompt: str, encoding: Encoding) -> str:
        """With entities of HTML written out, and single spaces."""
        clean = getattr(sys.modules[type(pipe).__module__], "prompt_clean", None)
        return super().written(pipe, clean(prompt) if clean is not None else prompt, encoding)

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The largest of a call's: frames that are given stand at 0."""
        return super().timestep(args, kwargs).max()

    def example_size(self, model: nn.Module) -> Grid:
        return 21, 60, 104

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        kwargs = {
            "hidden_states": zeros(1, config.in_channels, *size),
            "timestep": zeros(1),
            "encoder_hidden_states": zeros(1, 512, config.text_dim),
        }
        if config.image_dim is not None:
            kwargs["encoder_hidden_states_image"] = zeros(1, 257, config.image_dim)
        return (), kwargs


class SkyReels(Wan):
    """`SkyReelsV2Transformer3DModel`: Wan's blocks; refused where every frame has a noise level of its own."""

    models = ("SkyReelsV2Transformer3DModel",)

    def refusals(self, pipe: Any) -> list[str]:
        if "DiffusionForcing" in type(pipe).__name__:
            return [
                f"{type(pipe).__name__} gives every frame its own noise and steps a scheduler for each, so that there "
                "is no step of the whole video; use SkyReelsV2Pipeline or WanPipeline"
            ]
        return []
