"""Z-Image: one stream of image and caption tokens, both padded to multiples of 32; pictures come as lists."""

from typing import Any

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, third
from diffguide.site import Grid, Site

MULTIPLE = 32


class ZImage(Family):
    """`ZImageTransformer2DModel`: [cond, uncond] in one list; what is predicted points from noise to image."""

    models = ("ZImageTransformer2DModel",)
    latent = ("x", 0)
    lacks = {"second prompt": "its captions come as a list, each of its own length"}

    def sites(self, model: nn.Module) -> list[Site]:
        """The main layers; refiners of image alone and of caption alone are left alone."""
        blocks: Any = bare(model).layers
        return [
            Site(f"layers.{i}.attention", "joint", third(i, len(blocks)), 1, block.attention)
            for i, block in enumerate(blocks)
        ]

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        n = grid[0] * grid[1]
        padded = -(-n // MULTIPLE) * MULTIPLE
        return slice(0, n), slice(padded, padded + words)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        if not pipe.do_classifier_free_guidance or batch.rows == batch.pictures:
            return {"cond": slice(0, batch.rows)}
        return {"cond": slice(0, batch.rows // 2), "uncond": slice(batch.rows // 2, batch.rows)}

    def at_scheduler(self, pipe: Any) -> int:
        """Normalised guidance, if it is asked for; the pipeline turns predictions round."""
        return -1 if getattr(pipe, "_cfg_normalization", False) else 0

    def captions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs["cap_feats"] if "cap_feats" in kwargs else args[2]

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Of the longest caption; a shorter one is padded behind its own."""
        return max(len(caption) for caption in self.captions(args, kwargs))

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        return tuple(self.argument(args, kwargs)[0].shape[-2:])

    def latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return torch.stack(list(self.argument(args, kwargs))).squeeze(2)

    def with_latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Arguments:
        return self.with_argument(args, kwargs, list(z.unsqueeze(2).unbind()))

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, rows: int) -> Arguments:
        """Lists are cut item by item."""
        numbers = index.tolist()

        def cut(value: Any) -> Any:
            if isinstance(value, list) and len(value) == rows:
                return [value[i] for i in numbers]
            return value[index.to(value.device)] if isinstance(value, Tensor) and len(value) == rows else value

        return tuple(cut(v) for v in args), {k: cut(v) for k, v in kwargs.items()}

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        t = kwargs["t"] if "t" in kwargs else args[1]
        return (1 - t) * 1000  # the pipeline counts from noise to image, in 0..1

    def prediction(self, out: Any) -> Tensor:
        return torch.stack(list(super().prediction(out))).squeeze(2)

    def with_prediction(self, out: Any, y: Tensor) -> Any:
        return super().with_prediction(out, list(y.unsqueeze(2).unbind()))  # type: ignore[arg-type]

    def refusals(self, pipe: Any) -> list[str]:
        if "Omni" in type(pipe).__name__:
            return [f"{type(pipe).__name__} puts other pictures between caption and picture; use ZImagePipeline"]
        return []

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """The tokenizer's own chat template."""
        turn = [{"role": "user", "content": "{}"}]
        render = pipe.tokenizer.apply_chat_template
        text = render(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        before, _, after = text.partition("{}")
        return tokens.Template(before, after)

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        return ([zeros(config.in_channels, 1, *size)], zeros(1), [zeros(256, config.cap_feat_dim)]), {}
