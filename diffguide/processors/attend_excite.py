"""Attend-and-Excite. H. Chefer et al., SIGGRAPH 2023, arXiv 2301.13826."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.errors import ParamError
from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method, Window, param
from diffguide.targets import bare_phrase, smooth
from diffguide.tokens import find_groups


@dataclass(frozen=True)
class AttendExcite(Method):
    r"""No subject may be neglected: the weakest of their strongest responses is raised.

    $\mathcal L = \max_s (1 - \max_i G(A^s)_i)$ with $A$ = softmax over the words of 100 times the cross-attention
    map, the start token left out, and $G$ a 3x3 smoothing. A phrase of several tokens counts with their mean (our
    choice; the paper lists single tokens). Without words, the noun phrases of the prompt are taken by a light rule.

    `refine` repeats the move at a few steps, until the loss is below a target.
    """

    words: tuple[str, ...] = param((), "words or phrases of the prompt that must appear; none: found in the prompt")
    tokens: tuple[int, ...] = param((), "columns of the text states, instead of words")
    scale: float = param(20.0, "step size: 0 changes nothing, too high spoils the picture", low=0.0, high=1000.0)
    refine: tuple[float, ...] = param((0.0, 0.2, 0.4), "progress at which the move is repeated", low=0.0, high=1.0)
    targets: tuple[float, ...] = param((0.05, 0.5, 0.8), "response to reach at each of them", low=0.0, high=1.0)
    iterations: int = param(20, "most repetitions at one of them", low=1, high=100)
    normalize_eot: bool = param(False, "leave the end token out of the softmax over words too (SD2: true)")
    side: int = param(16, "grid of the maps: the nearest the model has, in tokens", low=4, high=64)
    window: Window = param((0.0, 0.5), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    neutral = {"scale": 0.0}
    paper = "arXiv 2301.13826"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.refine) != len(self.targets):
            raise ParamError(f"AttendExcite.targets has {len(self.targets)} values, refine has {len(self.refine)}")

    def prepare(self, context: Context) -> None:
        columns = []
        for b, prompt in enumerate(context.prompts):
            if self.tokens:
                columns.append([[t] for t in self.tokens])
                continue
            phrases = self.words or tuple(find_groups(prompt or ""))
            if not phrases:
                raise ParamError(f"AttendExcite.words: no noun phrase found in {prompt!r}; name the words")
            columns.append([context.find(b, bare_phrase(p), None) for p in phrases])
        context.memory["columns"] = columns
        # the last column of the softmax: the last one of all is dropped, or the end token and what follows it
        context.memory["stop"] = [
            max(context.content(b)) + 1 if self.normalize_eot else -1 for b in range(len(context.prompts))
        ]

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"cross": Watch("cross", (self.side,))}

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, (h, w) = maps.mean("cross")  # [B, N, T]
        return torch.stack(
            [
                excite(A[row], context.memory["columns"][b], context.memory["stop"][b], (h, w))
                for row, b in enumerate(context.pictures)
            ]
        )

    def rate(self, context: Context) -> float:
        """20 sqrt(1 - progress / 2)."""
        last = max(1, context.steps - 1)
        return self.scale * (1 - 0.5 * context.step / last) ** 0.5

    def goal(self, context: Context) -> float | None:
        """The loss to get below at this step before the step's own move, if it is one of those that refine."""
        goals = {round(at * context.steps): 1 - target for at, target in zip(self.refine, self.targets, strict=True)}
        return goals.get(context.step)

    def most(self, context: Context) -> int:
        return 1 if self.goal(context) is None else self.iterations + 1

    def again(self, history: Tensor, context: Context) -> Tensor:
        """While above the goal; after the first pass that began below it, once more; if the very first did, once."""
        goal = self.goal(context)
        if goal is None or len(history) == 1:
            return history[-1] > 0
        below = history <= goal
        return (history[-1] > 0) & ~below[0] & ~below[:-2].any(0)


def excite(A: Tensor, columns: list[list[int]], stop: int, grid: tuple[int, int]) -> Tensor:
    """The loss of one picture from its map [N, T]; `columns` of each subject."""
    X = (100 * A[:, 1:stop]).softmax(-1)  # [N, T'], start token left out
    subjects = torch.stack([X[:, [c - 1 for c in each]].mean(-1) for each in columns])  # [S, N]
    strongest = smooth(subjects.unflatten(1, grid)).flatten(1).amax(1)
    return (1 - strongest).relu().amax()
