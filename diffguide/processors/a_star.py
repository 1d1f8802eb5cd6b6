"""A-STAR. A. Agarwal et al., ICCV 2023, arXiv 2306.14544."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from diffguide.concepts import FACTOR, Carried, OnOneGrid, find_concepts, last_column, responses
from diffguide.layout import Layout
from diffguide.maps import Maps
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.targets import check_layouts, find_targets

EPS = 1e-8
FEWEST = 4 / 256  # of the cells; fewer above the threshold are no region


@dataclass(frozen=True)
class AStar(OnOneGrid):
    r"""Concepts are kept apart (segregation) and alive (retention).

    $L_{seg} = \sum_{m<n} \frac{\sum \min(A^m, A^n)}{\sum (A^m + A^n)}$ and
    $L_{ret} = \sum_m 1 - \frac{\sum \min(A^m, B^m)}{\sum (A^m + B^m)}$, $B^m$ the region that concept $m$ held in the
    step before, or its region in `layout` (equations 2 to 4). The paper leaves step size, normalisation and threshold
    open: they are our choice, see the method's page.
    """

    layout: Layout | Sequence[Layout] | None = None  # regions to hold from the first step on, in place of $B$
    words: tuple[str, ...] = param((), "the concepts, words or phrases of the prompt; none: found in the prompt")
    segregation: float = param(1.0, "weight of L_seg, concepts apart", low=0.0, high=10.0)
    retention: float = param(1.0, "weight of L_ret, concepts kept where they were", low=0.0, high=10.0)
    threshold: float = param(0.5, "of a map in 0..1, above which a cell is held", low=0.0, high=1.0)
    iou: str = param("sum", "denominator of both: the sum, as printed, or the union", choices=("sum", "union"))
    reduce: str = param("sum", "over pairs and over concepts", choices=("sum", "mean"))
    factor: float = param(
        FACTOR,
        "of the maps before the softmax over words: lower for maps already strong",
        low=0.1,
        high=1000.0,
    )
    normalize_eot: bool = param(False, "leave the end token out of the softmax over words too (SD2: true)")
    window: Window = param((0.0, 1.0), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    paper = "arXiv 2306.14544"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout is not None:
            check_layouts("AStar", self.layout)

    def prepare(self, context: Context) -> None:
        if self.layout is None:
            context.memory["columns"] = find_concepts(context, "AStar.words", self.words)
        else:
            targets = find_targets(context, self.layout)
            context.memory["columns"] = [[list(t.columns) for t in each] for each in targets]
            context.memory["regions"] = [[t.region for t in each] for each in targets]
        context.memory["stop"] = last_column(context, self.normalize_eot)
        context.memory["held"] = Carried()

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, grid = maps.mean("cross", self.side)  # [B, N, T]
        losses = []
        for row, b in enumerate(context.pictures):
            columns, stop = context.memory["columns"][b], context.memory["stop"][b]
            X = responses(A[row], columns, stop, grid, self.factor)  # [S, h, w]
            scaled = to_unit(X)
            seen = context.memory["held"](b, context.step, claims(scaled.detach(), self.threshold))
            if "regions" in context.memory:
                cells = [Layout(r).rasterise(*grid)[0] for r in context.memory["regions"][b]]
                seen = torch.stack([torch.from_numpy(c) for c in cells]).ge(0.5).to(X)
            apart = [overlap(X[m], X[n], self.iou) for m, n in combinations(range(len(X)), 2)]
            lost = (
                [] if seen is None else [1 - overlap(a, held, self.iou) for a, held in zip(scaled, seen, strict=True)]
            )
            losses.append(self.segregation * self.over(apart, X) + self.retention * self.over(lost, X))
        return torch.stack(losses)

    def over(self, terms: list[Tensor], X: Tensor) -> Tensor:
        if not terms:
            return X.sum() * 0
        return torch.stack(terms).sum() / (len(terms) if self.reduce == "mean" else 1)


def overlap(a: Tensor, b: Tensor, iou: str = "sum") -> Tensor:
    """Shared mass of two maps: 0 where they are disjoint; where they are equal 1/2 of the sum, 1 of the union."""
    shared, total = torch.minimum(a, b).sum(), (a + b).sum()
    return shared / (total - (shared if iou == "union" else 0) + EPS)


def to_unit(X: Tensor) -> Tensor:
    """Each map [S, h, w] brought to 0..1; the gradient does not go through its ends."""
    low, high = X.detach().amin((1, 2), keepdim=True), X.detach().amax((1, 2), keepdim=True)
    return (X - low) / (high - low + EPS)


def claims(scaled: Tensor, threshold: float) -> Tensor:
    """What each concept holds [S, h, w], 0 or 1: its cells above the threshold, at least the highest tenth.

    A cell that two of them claim goes to the one whose map is higher there.
    """
    flat = scaled.flatten(1)
    count = flat.shape[1]
    few = (flat > threshold).sum(1) < FEWEST * count
    tenth = flat.topk(max(1, round(0.1 * count)), 1).values[:, -1:]
    held = torch.where(few[:, None], flat >= tenth, flat > threshold)
    strongest = torch.where(held, flat, -1.0).argmax(0)
    own = strongest[None] == torch.arange(len(flat), device=flat.device)[:, None]
    return (held & own).to(scaled).reshape(scaled.shape)
