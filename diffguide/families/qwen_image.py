"""Qwen-Image: one stream of text and packed image tokens, text first; guidance is renormalised."""

from typing import Any

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import Arguments, Batch, Family, bare, blank, in_turn, third
from diffguide.site import Grid, Site


class QwenImage(Family):
    """`QwenImageTransformer2DModel`: a token packs 2x2 latent cells; pictures to edit come behind the picture."""

    models = ("QwenImageTransformer2DModel",)
    latent = ("hidden_states", 0)
    channels_at = 2
    text_first = True
    shared = ("img_shapes",)

    def sites(self, model: nn.Module) -> list[Site]:
        blocks: Any = bare(model).transformer_blocks
        return [
            Site(f"transformer_blocks.{i}.attn", "joint", third(i, len(blocks)), 1, block.attn)
            for i, block in enumerate(blocks)
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return in_turn(batch)

    def at_scheduler(self, pipe: Any) -> int:
        """True guidance gives its sum the length of the conditional prediction, token by token."""
        return 1

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        shape = kwargs["img_shapes"][0]
        _, rows, columns = shape[0] if isinstance(shape, list) else shape
        return 2 * rows, 2 * columns

    def latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        h, w = self.size(args, kwargs)
        return self.argument(args, kwargs)[:, : h * w // 4]

    def with_latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Arguments:
        return self.with_argument(args, kwargs, torch.cat([z, self.argument(args, kwargs)[:, z.shape[1] :]], 1))

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().timestep(args, kwargs) * 1000  # the pipeline divides it

    def template(self, pipe: Any) -> tokens.Template:
        if "Edit" in type(pipe).__name__:
            raise PromptError("pictures to edit stand among the words, whose columns cannot be told then")
        before, after = pipe.prompt_template_encode.split("{}")
        return tokens.Template(before, after, pipe.prompt_template_encode_start_idx)

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        h, w = size[0] // 2, size[1] // 2
        return (), {
            "hidden_states": zeros(1, h * w, config.in_channels),
            "encoder_hidden_states": zeros(1, 256, config.joint_attention_dim),
            "encoder_hidden_states_mask": None,
            "timestep": zeros(1),
            "img_shapes": [(1, h, w)],
        }
