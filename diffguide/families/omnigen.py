"""OmniGen: one causal sequence of words, a time token, and the picture."""

import math
import re
from typing import Any

import torch
from torch import nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, third
from diffguide.site import Grid, Site

PICTURE = re.compile(r"<\|image_(\d+)\|>")
SIDE = 16  # pixels of a picture's token
START = 1  # the id of the start token, which the pipeline leaves out behind a picture


class WithPictures:
    """A tokenizer for prompts with pictures in them: the text is cut at each, which takes `sizes` tokens."""

    def __init__(self, tokenizer: Any, sizes: list[int]) -> None:
        self.tokenizer, self.sizes = tokenizer, sizes
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
        """Tokens of pictures lie outside of the text."""
        coded: dict[str, list[Any]] = {"input_ids": [], "offset_mapping": [], "special_tokens_mask": []}
        begin = 0
        for picture in [*PICTURE.finditer(text), None]:
            part = self.tokenizer(text[begin : picture.start() if picture else len(text)], **options)
            skip = int(begin > 0 and part["input_ids"][:1] == [START])
            coded["input_ids"] += part["input_ids"][skip:]
            coded["offset_mapping"] += [(begin + a, begin + b) for a, b in part["offset_mapping"][skip:]]
            coded["special_tokens_mask"] += part["special_tokens_mask"][skip:]
            if picture is not None:
                n = self.sizes[int(picture[1]) - 1]
                coded["input_ids"] += [0] * n
                coded["offset_mapping"] += [(-1, -1)] * n
                coded["special_tokens_mask"] += [0] * n
                begin = picture.end()
        return coded


class OmniGen(Family):
    """`OmniGenTransformer2DModel`: [cond, uncond], with pictures to start from [cond, uncond, picture only]."""

    models = ("OmniGenTransformer2DModel",)
    latent = ("hidden_states", 0)
    lacks = {"second prompt": "its words and its picture come as one sequence of tokens"}
    encoder = "check_inputs"  # its prompts go straight to the denoiser

    def sites(self, model: nn.Module) -> list[Site]:
        model = bare(model)
        blocks: Any = model.layers
        level = round(math.log2(model.config.patch_size))  # type: ignore[union-attr]
        return [
            Site(f"layers.{i}.self_attn", "joint", third(i, len(blocks)), level, block.self_attn)
            for i, block in enumerate(blocks)
        ]

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        """The picture comes last, a time token before it."""
        return slice(queries - math.prod(grid), queries), slice(0, words)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        names = ("cond", "uncond", "picture") if batch.kwargs.get("input_img_latents") else ("cond", "uncond")
        n = batch.rows // len(names)
        return {name: slice(i * n, (i + 1) * n) for i, name in enumerate(names)}

    def channels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return bare(model).config.in_channels  # type: ignore[union-attr]

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tokens before the time token, those of pictures to start from included."""
        ids = kwargs["input_ids"]
        return 0 if ids is None else ids.shape[1]

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: torch.Tensor, rows: int) -> Arguments:
        """Pictures to start from are listed by row."""
        args, cut = super().take(args, kwargs, index, rows)
        sizes: dict[int, Any] = kwargs["input_image_sizes"]
        if sizes:
            first, order = {}, 0
            for row in sorted(sizes):
                first[row] = order
                order += len(sizes[row])
            kept = [row for row in index.tolist() if row in sizes]
            cut["input_image_sizes"] = {new: sizes[row] for new, row in enumerate(index.tolist()) if row in sizes}
            pictures = kwargs["input_img_latents"]
            cut["input_img_latents"] = [p for row in kept for p in pictures[first[row] : first[row] + len(sizes[row])]]
        return args, cut

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        """An instruction around the prompt; padding stands in front, pictures at their places in it."""
        before, _, after = pipe.multimodal_processor.add_prefix_instruction("{}").partition("{}")
        tokenizer = pipe.tokenizer
        if PICTURE.search(prompt):
            tokenizer = WithPictures(tokenizer, self.pictures(pipe, prompt, encoding))
        return [tokens.Text(tokenizer, prompt, tokens.Template(before, after, left=True), encoding.states)]

    def pictures(self, pipe: Any, prompt: str, encoding: Encoding) -> list[int]:
        """How many tokens each of the prompt's pictures takes."""
        prompts = encoding.given.get("prompt") or []
        if prompts.count(prompt) != 1 or not encoding.given.get("input_images"):
            raise PromptError(
                "the words behind a picture can be told in a run alone, of a prompt that no other in the batch repeats"
            )
        process = pipe.multimodal_processor.process_image
        shapes = [process(image).shape for image in encoding.given["input_images"][prompts.index(prompt)]]
        return [shape[-2] * shape[-1] // SIDE**2 for shape in shapes]

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        words, n = 64, (size[0] // config.patch_size) * (size[1] // config.patch_size)
        length = words + 1 + n
        return (), {
            "hidden_states": zeros(1, config.in_channels, *size),
            "timestep": zeros(1),
            "input_ids": zeros(1, words).long(),
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": zeros(1, length, length) + 1,
            "position_ids": torch.arange(length, device=zeros(1).device)[None],
        }
