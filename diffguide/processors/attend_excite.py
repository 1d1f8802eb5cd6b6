"""Attend-and-Excite. H. Chefer et al., SIGGRAPH 2023, arXiv 2301.13826."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.concepts import Refined, find_concepts, last_column, responses
from diffguide.maps import Maps
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.site import Grid


@dataclass(frozen=True)
class AttendExcite(Refined):
    r"""No subject may be neglected: the weakest of their strongest responses is raised.

    $\mathcal L = \max_s (1 - \max_i G(A^s)_i)$ with $A$ = softmax over the words of 100 times the cross-attention
    map, the start token left out, and $G$ a 3x3 smoothing. A phrase of several tokens counts with their sum (our
    choice; the paper lists single tokens). Without words, the noun phrases of the prompt are taken by a light rule.

    `refine` repeats the move at a few steps, until the loss is below a target.
    """

    words: tuple[str, ...] = param((), "words or phrases of the prompt that must appear; none: found in the prompt")
    tokens: tuple[int, ...] = param((), "columns of the text states, instead of words")
    normalize_eot: bool = param(False, "leave the end token out of the softmax over words too (SD2: true)")
    window: Window = param((0.0, 0.5), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    paper = "arXiv 2301.13826"

    def prepare(self, context: Context) -> None:
        context.memory["columns"] = (
            [[[t] for t in self.tokens]] * len(context.prompts)
            if self.tokens
            else find_concepts(context, "AttendExcite.words", self.words)
        )
        context.memory["stop"] = last_column(context, self.normalize_eot)

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, grid = maps.mean("cross")  # [B, N, T]
        return torch.stack(
            [
                excite(A[row], context.memory["columns"][b], context.memory["stop"][b], grid)
                for row, b in enumerate(context.pictures)
            ]
        )


def excite(A: Tensor, columns: list[list[int]], stop: int, grid: Grid) -> Tensor:
    """The loss of one picture from its map [N, T]; `columns` of each subject."""
    return (1 - responses(A, columns, stop, grid).flatten(1).amax(1)).relu().amax()
