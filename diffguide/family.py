"""What a family says about one kind of denoiser. It knows models, never methods."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.site import Grid, Site

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# what can be done with a family, unless its `lacks` says why not; the table of models has these columns
ABILITIES = ("attach", "word maps", "self maps", "gradient", "weak pass", "words", "second prompt")
OF_KIND = {"cross": "word maps", "self": "self maps"}  # what a wish to see maps of a kind needs
LARGE = "every cell's map to every cell of all frames is too large"  # why no family of videos has self maps


@dataclass(frozen=True)
class Batch:
    """One call of the denoiser, as far as it tells who is who in its rows.

    Attributes:
        rows: how many there are.
        call: its number among the calls of the step, from 0.
        pictures: how many pictures are drawn, 0 if this call is the one to find out from.
        encoded: arguments that the pipeline's `encode_prompt` was given, by name.
        kwargs: keyword arguments of the denoiser.
    """

    rows: int
    call: int
    pictures: int
    encoded: dict[str, Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Encoding:
    """What a run tells of how its prompt was encoded; nothing before a run.

    Attributes:
        states: how many text states the denoiser is given for each picture, 0 if unknown.
        given: arguments of the function that encodes the prompt, by name.
    """

    states: int = 0
    given: dict[str, Any] = field(default_factory=dict)


UNKNOWN = Encoding()


class Family(ABC):
    """Base of the families. Defaults fit denoisers that take [B, C, h, w] latents first, text states by keyword."""

    models: ClassVar[tuple[str, ...]] = ()  # class names of denoisers
    latent: ClassVar[tuple[str, int]] = ("sample", 0)  # name and position of the latents among the arguments
    channels_at: ClassVar[int] = 1  # the axis of their channels
    text_first: ClassVar[bool] = False  # the order of joint sequences
    streams: ClassVar[tuple[str, str]] = ("hidden_states", "encoder_hidden_states")  # as joint blocks give them
    shared: ClassVar[tuple[str, ...]] = ()  # arguments that all rows share, whatever their shape
    tokenizer: ClassVar[str] = "tokenizer"  # attribute of the pipeline
    encoder: ClassVar[str] = "encode_prompt"  # function of the pipeline that is given the words
    prompts: ClassVar[tuple[str, ...]] = ("prompt",)  # its arguments with the words, the first one given
    alike: ClassVar[tuple[str, ...]] = ()  # its arguments whose words share columns with those of the prompt
    kinds: ClassVar[tuple[str, ...]] = ("joint",)  # of attention among its sites
    lacks: ClassVar[dict[str, str]] = {}  # what cannot be done with it (see `ABILITIES`), each with the reason
    checkpoints: ClassVar[str] = ""  # why its gradient checkpointing gives other numbers, if it does

    # What is where in the model.

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """The attention modules, in no particular order."""
        ...

    def grid(self, site: Site, size: Grid) -> Grid:
        """Height and width, in tokens, of a site when the latents have this height and width; frames stay."""
        *frames, h, w = size
        return (*frames, h >> site.level, w >> site.level)

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        """Where the image tokens are among the queries, and the words among the keys; `words` says how many."""
        if site.kind == "cross":
            return slice(0, queries), slice(0, keys)
        if site.kind != "joint":
            return slice(0, queries), slice(0, 0)
        n = math.prod(grid)
        if self.text_first:
            return slice(words, words + n), slice(0, words)
        return slice(0, n), slice(n, n + words)

    # What is what in a call of the denoiser.

    @abstractmethod
    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """Which rows of a denoiser call belong to which branch."""
        ...

    def refusals(self, pipe: Any) -> list[str]:
        """Reasons why this pipeline cannot be steered, each with the fix."""
        return []

    def latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the scheduler works on, as the denoiser is given it, without the conditions that come along."""
        return self.argument(args, kwargs).narrow(self.channels_at, 0, self.channels(model, args, kwargs))

    def with_latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Arguments:
        """The arguments with other latents, the conditions as they were."""
        x, axis = self.argument(args, kwargs), self.channels_at
        if (rest := x.shape[axis] - z.shape[axis]) > 0:
            z = torch.cat([z, x.narrow(axis, z.shape[axis], rest)], axis)
        return self.with_argument(args, kwargs, z)

    def channels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many of the input channels are latents; the others (an inpainting mask, a depth map) are conditions."""
        config: Any = bare(model).config
        return min(self.argument(args, kwargs).shape[self.channels_at], config.out_channels or config.in_channels)

    def argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument that holds the latents."""
        name, position = self.latent
        return kwargs[name] if name in kwargs else args[position]

    def with_argument(self, args: tuple[Any, ...], kwargs: dict[str, Any], x: Any) -> Arguments:
        name, position = self.latent
        if name in kwargs:
            return args, {**kwargs, name: x}
        return (*args[:position], x, *args[position + 1 :]), kwargs

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs["timestep"] if "timestep" in kwargs else args[1]

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        """Height and width of the latents, in latent cells; frames first for video."""
        return tuple(self.argument(args, kwargs).shape[2:])

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many text states there are."""
        states = kwargs.get("encoder_hidden_states")
        return states.shape[1] if isinstance(states, Tensor) else 0

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], index: Tensor, rows: int) -> Arguments:
        """The arguments for some of the rows.

        A tensor whose first axis is a multiple of `rows` is cut in proportion; anything else is shared. Lists and
        dicts are rebuilt, since models may empty the ones they are given.
        """
        cut = {name: v if name in self.shared else cut_rows(v, index, rows) for name, v in kwargs.items()}
        return cut_rows(args, index, rows), cut

    def prediction(self, out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out.sample

    def with_prediction(self, out: Any, y: Tensor) -> Any:
        if isinstance(out, tuple):
            return (y, *out[1:])
        out.sample = y
        return out

    def at_scheduler(self, pipe: Any) -> int:
        """0 where a term added to every prediction arrives as it is.

        1 or -1 where the pipeline scales what it combined: the term is added, with this sign, to the scheduler's input.
        """
        return 0

    def term(self, model: nn.Module, d: Tensor) -> Tensor:
        """What to add to a prediction, from a difference of predictions."""
        return d

    # For an estimate, without a run.

    def example_size(self, model: nn.Module) -> Grid:
        """Height and width of the latents the model was made for, in cells."""
        side: Any = bare(model).config.sample_size  # type: ignore[union-attr]
        return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))

    @abstractmethod
    def example(self, model: nn.Module, size: Grid) -> Arguments:
        """Arguments of one denoiser call for one picture of this latent size, of zeros, to estimate memory with."""
        ...

    # Words.

    def columns(
        self, pipe: Any, prompt: str | None, phrase: str, occurrence: int | None, encoding: Encoding = UNKNOWN
    ) -> list[int]:
        """Columns of a phrase in the text states; raises PromptError when they cannot be found."""
        return self._of_each(pipe, prompt, phrase, encoding, lambda text: text.find(phrase, occurrence))

    def content(self, pipe: Any, prompt: str | None, encoding: Encoding = UNKNOWN) -> list[int]:
        """Columns of all words of the prompt: without start, end and padding."""
        return self._of_each(pipe, prompt, "every word", encoding, lambda text: text.columns())

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        """The prompt as each encoder is given it, for those whose states have columns of their own."""
        return [self._text(pipe, prompt, encoding)]

    def template(self, pipe: Any, encoding: Encoding) -> tokens.Template:
        """What the pipeline writes around the prompt; raises PromptError where that cannot be told."""
        return tokens.PLAIN

    def written(self, pipe: Any, prompt: str, encoding: Encoding) -> str:
        """The prompt as the pipeline rewrites it.

        Some clean it or take its capitals away; textual inversion writes out tokens of several vectors.
        """
        clean = getattr(pipe, "_text_preprocessing", None)
        if clean is not None:
            (prompt,) = clean([prompt], clean_caption=encoding.given.get("clean_caption", False))
        convert: Any = getattr(pipe, "maybe_convert_prompt", None)
        return convert(prompt, getattr(pipe, self.tokenizer)) if convert is not None else prompt

    def _text(self, pipe: Any, prompt: str, encoding: Encoding) -> tokens.Text:
        words, around = self.written(pipe, prompt, encoding), self.template(pipe, encoding)
        return tokens.Text(getattr(pipe, self.tokenizer), words, around, encoding.states)

    def _of_each(
        self,
        pipe: Any,
        prompt: str | None,
        phrase: str,
        encoding: Encoding,
        of: Callable[[tokens.Text], list[int]],
    ) -> list[int]:
        """Columns in the part of every encoder, or in those that hold the phrase: one may hold more than another."""
        if prompt is None:
            raise PromptError(
                f"{phrase!r} cannot be looked up: the pipeline was given embeddings; tell the prompt they came from by "
                "Guide(..., prompt=...)"
            )
        if getattr(pipe, self.tokenizer, None) is None:
            raise PromptError(f"{phrase!r} cannot be looked up: the pipeline has no tokenizer")
        for name in self.alike:
            if encoding.given.get(name) not in (None, prompt, encoding.given.get("prompt")):
                raise PromptError(
                    f"{phrase!r} cannot be looked up: {name} puts other words into the same columns; give one prompt"
                )
        found: list[int] = []
        fault = None
        for text in self.texts(pipe, prompt, encoding):
            try:
                found += of(text)
            except PromptError as error:
                fault = fault or error
        if fault is not None and not found:
            raise fault
        return found


def cut_rows(value: Any, index: Tensor, rows: int) -> Any:
    """Some rows of every tensor of a batch of so many rows; a tensor may have several for each, as frames."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] == 0 or value.shape[0] % rows or rows == len(index) == 1:
            return value
        group = value.shape[0] // rows
        index = index.to(value.device)
        wide = (index[:, None] * group + torch.arange(group, device=value.device)).flatten()
        return value[wide]
    if isinstance(value, dict):
        return {k: cut_rows(v, index, rows) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(cut_rows(v, index, rows) for v in value)
    return value


def blank(model: nn.Module) -> Callable[..., Tensor]:
    """`zeros(*shape)` of the model's type, on its device."""
    weight = next(model.parameters())
    return lambda *shape: torch.zeros(shape, dtype=weight.dtype, device=weight.device)


def third(number: int, count: int) -> str:
    """The part of a transformer that block `number` of `count` stands in, named like a U-Net's."""
    return ("down", "mid", "up")[min(2, 3 * number // max(1, count))]


def self_and_cross(model: nn.Module, blocks: str, level: int, calls: int = 1) -> list[Site]:
    """`attn1` (self) and `attn2` (cross) of each block of a transformer.

    `calls` of cross-attention go through one processor, the last one of them to words.
    """
    every: Any = getattr(bare(model), blocks)
    sites = []
    for number, block in enumerate(every):
        part = third(number, len(every))
        sites.append(Site(f"{blocks}.{number}.attn1", "self", part, level, block.attn1))
        sites.append(Site(f"{blocks}.{number}.attn2", "cross", part, level, block.attn2, calls, calls - 1))
    return sites


def calls_of(module: nn.Module) -> int:
    """Attention calls of a module's processor: an IP-Adapter goes on to its pictures, those whose scale is not 0."""
    return 0 if hasattr(getattr(module, "processor", None), "to_k_ip") else 1


def together(pipe: Any, batch: Batch) -> dict[str, slice]:
    """[uncond, cond] in one call under classifier-free guidance, else only cond."""
    guided = getattr(pipe, "do_classifier_free_guidance", batch.encoded.get("do_classifier_free_guidance", False))
    if not guided or batch.rows == batch.pictures:
        return {"cond": slice(0, batch.rows)}
    half = batch.rows // 2
    return {"uncond": slice(0, half), "cond": slice(half, batch.rows)}


def in_turn(batch: Batch) -> dict[str, slice]:
    """A call each: the conditional one first."""
    return {"uncond" if batch.call else "cond": slice(0, batch.rows)}


def is_modular(pipe: Any) -> bool:
    """Whether the pipeline is one of Modular Diffusers, whose guider calls the denoiser once for each prediction."""
    return hasattr(pipe, "update_components") and getattr(pipe, "guider", None) is not None


def bare(model: nn.Module) -> nn.Module:
    """The model itself, where `torch.compile` has put another around it."""
    return getattr(model, "_orig_mod", model)
