"""A second prompt beside the first: rows of the same latents with its words go through the denoiser as well."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffguide.errors import SteeringError
from diffguide.family import Arguments, Family
from diffguide.method import Method

ROWS = "second"  # what its rows are called in `Call.rows`


def asking(methods: list[Method]) -> Method | None:
    """The method that has a second prompt, if one has."""
    return next((m for m in methods if m.second_prompt is not None), None)


@dataclass
class SecondPrompt:
    """How the words of the first prompt are exchanged for those of the second.

    Attributes:
        first: text states [B, T, C] and masks [B, T] of the prompt, as the pipeline encoded them.
        second: the same of the second prompt.
    """

    first: list[Tensor]
    second: list[Tensor]

    @classmethod
    def encoded(
        cls, encode: Callable[..., Any], arguments: dict[str, Any], out: Any, words: str, family: Family
    ) -> "SecondPrompt":
        """From what the pipeline's function that encodes words was given and gave: it is asked once more."""
        told = {name: _replaced(v, words) if name.startswith("prompt") else v for name, v in arguments.items()}
        if not any(isinstance(told.get(name), str | list) for name in family.prompts):
            return cls([], [])
        pairs = zip(_tensors(out), _tensors(encode(**told)), strict=False)
        kept = [(a, b) for a, b in pairs if a is not None and b is not None and a.ndim in (2, 3)]
        return cls([a for a, _ in kept], [b for _, b in kept])

    def join(self, call: Arguments, family: Family, own: slice, rows: int, name: str) -> tuple[Arguments, slice]:
        """A denoiser call of so many rows with those of the second prompt behind them; and which they are.

        `own` are the conditional rows. Raises SteeringError where the words are not found among the arguments, or are
        of another length.
        """
        args, kwargs = call
        count, found = own.stop - own.start, 0

        def widen(value: Any, states: bool) -> Any:
            nonlocal found
            if isinstance(value, Tensor):
                times = value.shape[0] // rows if value.ndim else 0
                if not times or value.shape[0] % rows or (times > 1 and not states):
                    return value  # shared by all rows
                part = value[own.start * times : own.stop * times]
                other = self._of(part, name) if states else None
                found += other is not None and value.ndim == 3
                return torch.cat([value, part if other is None else other])
            if isinstance(value, dict):
                return {k: widen(v, False) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(widen(v, False) for v in value)
            return value

        wide = {k: v if k in family.shared else widen(v, _tells(k, v)) for k, v in kwargs.items()}
        wide_args = tuple(widen(v, i != family.latent[1] and _tells("", v)) for i, v in enumerate(args))
        if not found:
            raise SteeringError(
                f"{name}: the words of the prompt are not found among the denoiser's arguments; give the pipeline a "
                f"prompt rather than embeddings, or {name} the text states of its own"
            )
        return (wide_args, wide), slice(rows, rows + count)

    def _of(self, part: Tensor, name: str) -> Tensor | None:
        """The second prompt's in place of states or a mask of the first."""
        for first, second in zip(self.first, self.second, strict=True):
            if first.ndim != part.ndim or part.shape[0] % first.shape[0] or part.shape[1:] != first.shape[1:]:
                continue
            times = part.shape[0] // first.shape[0]
            if torch.equal(first.to(part).repeat_interleave(times, 0), part):
                if first.shape[1:] != second.shape[1:]:
                    raise SteeringError(
                        f"{name}: its prompt has {second.shape[1]} text states, the picture's {first.shape[1]}, and "
                        "this model does not pad them; give two of one length"
                    )
                return second.to(part).repeat_interleave(part.shape[0] // second.shape[0], 0)
        return None


def given_states(states: Any, kwargs: dict[str, Any], own: slice, rows: int) -> SecondPrompt:
    """A second prompt whose states are given, for those that the denoiser calls `encoder_hidden_states`."""
    first = kwargs.get("encoder_hidden_states")
    if not isinstance(states, Tensor) or not isinstance(first, Tensor):
        return SecondPrompt([], [])
    times = len(first) // rows  # frames of a video may have words of their own
    return SecondPrompt([first[own.start * times : own.stop * times]], [states])


def _tells(name: str, value: Any) -> bool:
    """Whether an argument may be text states or their mask; the vector of a whole prompt stays that of the first."""
    return isinstance(value, Tensor) and (value.ndim == 3 or (value.ndim == 2 and "mask" in name))


def _replaced(value: Any, words: str) -> Any:
    """Other words in place of words; what holds none stays."""
    if isinstance(value, str):
        return words
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return [words] * len(value)
    return value


def _tensors(out: Any) -> list[Tensor | None]:
    values = out if isinstance(out, list | tuple) else [out]
    return [v if isinstance(v, Tensor) else None for v in values]
