"""What losses over the words of a prompt share: which words, their responses, step sizes, repetition, memory."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffguide.errors import ParamError
from diffguide.maps import Watch
from diffguide.method import Context, Mover
from diffguide.params import param
from diffguide.site import Grid
from diffguide.targets import bare_phrase, smooth
from diffguide.tokens import find_groups

FACTOR = 100.0  # of the maps before a softmax over words, as Attend-and-Excite has it


def find_concepts(context: Context, owner: str, phrases: Sequence[str], least: int = 1) -> list[list[list[int]]]:
    """For each picture the columns of each of its concepts; without phrases, of the noun phrases of its prompt.

    The phrases are kept as `context.memory["words"]`, for the report. A prompt in which fewer than `least` are found is
    told by a warning: there is nothing to be done in its picture.

    Raises:
        ParamError: fewer than `least` concepts are named, or none is found.
        PromptError: a phrase is not in its prompt.
    """
    found = []
    context.memory["words"] = words = []
    for b, prompt in enumerate(context.prompts):
        named = tuple(phrases) or tuple(find_groups(prompt or ""))
        if len(named) < least:
            wants = "no noun phrase" if not named else f"only {', '.join(map(repr, named))}"
            told = f"{owner}: {wants} found in {prompt!r}; name {least} or more words or phrases"
            if phrases or not named:
                raise ParamError(told)
            warnings.warn(f"{told}, or nothing is done in this picture", stacklevel=2)
        words.append([bare_phrase(phrase) for phrase in named])
        found.append([context.find(b, phrase, None) for phrase in words[-1]])
    return found


def last_column(context: Context, normalize_eot: bool) -> list[int]:
    """Where the softmax over words stops in each picture: before the end token, or before the last column of all."""
    return [max(context.content(b)) + 1 if normalize_eot else -1 for b in range(len(context.prompts))]


def over_words(A: Tensor, stop: int, factor: float = FACTOR) -> Tensor:
    """Maps [N, T] as shares among the words 1 to `stop`: softmax of `factor` times the map, [N, T']."""
    return (factor * A[:, 1:stop]).softmax(-1)


def responses(A: Tensor, columns: Sequence[Sequence[int]], stop: int, grid: Grid, factor: float = FACTOR) -> Tensor:
    """Smoothed response [S, h, w] of each concept, from a map [N, T]; the shares of several columns add up."""
    X = over_words(A, stop, factor)
    return smooth(torch.stack([X[:, [c - 1 for c in each]].sum(-1) for each in columns]).unflatten(1, grid))


def decay(scale: float, context: Context) -> float:
    """The step size of Attend-and-Excite and its successors: scale times sqrt of 1 falling linearly to 1/2."""
    return scale * (1 - 0.5 * context.step / max(1, context.steps - 1)) ** 0.5


class Carried:
    """What each picture showed in the step before, however many passes this step takes."""

    def __init__(self) -> None:
        self.now: dict[int, tuple[int, Any]] = {}
        self.before: dict[int, Any] = {}

    def __call__(self, picture: int, step: int, value: Any) -> Any:
        """Keep `value` as the latest; what the picture showed in an earlier step, None in the first."""
        latest = self.now.get(picture)
        if latest is not None and latest[0] < step:
            self.before[picture] = latest[1]
        self.now[picture] = (step, value)
        return self.before.get(picture)


@dataclass(frozen=True)
class OnOneGrid(Mover):
    """A method that watches words on one grid and moves latents by the steps of Attend-and-Excite."""

    scale: float = param(
        20.0, "step size: 0 changes nothing, too high spoils the picture", low=0.0, high=1000.0, kw_only=True
    )
    side: int = param(16, "grid of the maps: the nearest the model has, in tokens", low=4, high=64, kw_only=True)

    neutral = {"scale": 0.0}

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"cross": Watch("cross", (self.side,))}

    def rate(self, context: Context) -> float:
        return decay(self.scale, context)


@dataclass(frozen=True)
class Repeated(OnOneGrid):
    """A method whose move is repeated at a few steps, whatever the interval."""

    refine: tuple[float, ...] = param(
        (0.0, 0.2, 0.4), "progress at which the move is repeated", low=0.0, high=1.0, kw_only=True
    )
    iterations: int = param(20, "most repetitions at one of them", low=1, high=100, kw_only=True)

    def acts_at(self, step: int, steps: int) -> bool:
        return super().acts_at(step, steps) or (self.within(step, steps) and self.number(step, steps) is not None)

    def number(self, step: int, steps: int) -> int | None:
        """The number, in `refine`, of the progress that a step stands for."""
        repeated = [round(at * steps) for at in self.refine]
        return repeated.index(step) if step in repeated else None

    def most(self, context: Context) -> int:
        return 1 if self.number(context.step, context.steps) is None else self.iterations + 1


@dataclass(frozen=True)
class Refined(Repeated):
    """A method whose move is repeated until a loss of its own is below a target."""

    targets: tuple[float, ...] = param(
        (0.05, 0.5, 0.8), "response to reach at each of them", low=0.0, high=1.0, kw_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.refine) != len(self.targets):
            raise ParamError(
                f"{type(self).__name__}.targets has {len(self.targets)} values, refine has {len(self.refine)}"
            )

    def goal(self, context: Context) -> float | None:
        """The loss to get below at this step before the step's own move, if it is one of those that refine."""
        number = self.number(context.step, context.steps)
        return None if number is None else 1 - self.targets[number]

    def again(self, history: Tensor, context: Context) -> Tensor:
        """While above the goal; after the first pass that began below it, once more; if the very first did, once."""
        goal = self.goal(context)
        if goal is None or len(history) == 1:
            return history[-1] > 0
        below = history <= goal
        return (history[-1] > 0) & ~below[0] & ~below[:-2].any(0)
