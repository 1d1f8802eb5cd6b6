"""Qwen-Image: one stream of text and packed image tokens, text first; guidance is renormalised."""

from typing import Any

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, in_turn, third
from diffguide.site import Grid, Site


def listed(value: Any) -> list[Any]:
    """Nothing, one or several as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class QwenImage(Family):
    """`QwenImageTransformer2DModel`: a token packs 2x2 latent cells; pictures to edit come behind the picture."""

    models = ("QwenImageTransformer2DModel",)
    latent = ("hidden_states", 0)
    streams = ("encoder_hidden_states", "hidden_states")
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

    def refusals(self, pipe: Any) -> list[str]:
        if "Layered" in type(pipe).__name__:
            return [
                f"{type(pipe).__name__} draws several layers at once, which is not supported; use QwenImagePipeline"
            ]
        return []

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """Pictures to edit stand before the prompt, in as many tokens as are not words."""
        before, after = pipe.prompt_template_encode.split("{}")
        edits = "Edit" in type(pipe).__name__
        if edits and len(listed(encoding.given.get("prompt"))) > 1:
            raise PromptError(
                "pictures to edit take places of their own in each prompt, whose words cannot be told then; draw one "
                "prompt at a time"
            )
        if "EditPlus" in type(pipe).__name__:
            before += "".join(
                f"Picture {i}: <|vision_start|><|image_pad|><|vision_end|>"
                for i, _ in enumerate(listed(encoding.given.get("image")), 1)
            )
        return tokens.Template(before, after, pipe.prompt_template_encode_start_idx, left=edits)

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
