"""LTX-Video: packed video tokens, separate self- and cross-attention, padding masked."""

from typing import Any

from torch import nn

from diffguide.family import LARGE, Arguments, Batch, Family, bare, blank, self_and_cross, together
from diffguide.site import Grid, Site


class LTX(Family):
    """`LTXVideoTransformer3DModel`: a token is a latent cell; frames, height and width come as numbers."""

    models = ("LTXVideoTransformer3DModel",)
    latent = ("hidden_states", 0)
    channels_at = 2
    kinds = ("self", "cross")
    lacks = {"self maps": LARGE}

    def sites(self, model: nn.Module) -> list[Site]:
        return self_and_cross(model, "transformer_blocks", level=0)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        return kwargs["num_frames"], kwargs["height"], kwargs["width"]

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The largest of a call's: frames that are given stand lower."""
        return super().timestep(args, kwargs).max()

    def example_size(self, model: nn.Module) -> Grid:
        return 21, 16, 22

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        frames, height, width = size
        return (), {
            "hidden_states": zeros(1, frames * height * width, config.in_channels),
            "encoder_hidden_states": zeros(1, 128, config.caption_channels),
            "encoder_attention_mask": zeros(1, 128) + 1,
            "timestep": zeros(1),
            "num_frames": frames,
            "height": height,
            "width": width,
        }
