"""Attention maps: what a method asks to see, and what was seen, reduced as it was made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from diffguide.site import Grid, Site, in_layers


@dataclass(frozen=True)
class Watch:
    """A wish to see maps.

    Attributes:
        kind: `"cross"` (image tokens to words) or `"self"` (image tokens to each other).
        sides: the wanted grid sides in tokens; for each the nearest one the model has is taken.
        columns: the keys wanted, None for all.
        head_mean: average over heads.
        blocks: parts of the model to look at.
    """

    kind: Literal["cross", "self"]
    sides: tuple[int, ...] = (16,)
    columns: tuple[int, ...] | None = None
    head_mean: bool = True
    blocks: tuple[str, ...] = ("down", "mid", "up")

    def choose(self, sites: list[Site], grids: dict[Site, Grid], layers: str = "") -> list[Site]:
        """The sites to look at: those on the grids nearest to the wanted sides (geometric mean of height and width).

        `layers` takes the place of `blocks`, see `site.in_layers`.
        """
        of_kind = [s for s in sites if s.kind in (self.kind, "joint")]
        of_kind = [s for s in of_kind if (s.block in self.blocks if not layers else in_layers(s, layers))]
        levels = {s.level: (grids[s][-2] * grids[s][-1]) ** 0.5 for s in of_kind}
        if not levels:
            return []
        nearest = {min(levels, key=lambda n: abs(levels[n] / side - side / levels[n])) for side in self.sides}
        return [s for s in of_kind if s.level in nearest]


@dataclass(frozen=True)
class Seen:
    """The map of one site: `values` [B, N, K] or [B, H, N, K], N row-major over `grid`."""

    site: Site
    grid: Grid
    values: Tensor


class Maps:
    """Maps by the name of the wish, in the order the model made them."""

    def __init__(self, seen: dict[str, list[Seen]]) -> None:
        self.seen = seen

    def __getitem__(self, name: str) -> list[Seen]:
        return self.seen[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.seen)

    def mean(self, name: str, side: int | None = None) -> tuple[Tensor, Grid]:
        """Mean over sites, [B, N, K] and its grid.

        Maps on a finer grid than the coarsest one seen are averaged down to it; with `side`, so are maps whose grid
        is at least twice that side ("cross" maps only: "self" maps are all on one grid).
        """
        seen = self.seen[name]
        grid = min((s.grid for s in seen), key=lambda g: g[0] * g[1])
        if side is not None:
            shrink = max(1, round((grid[0] * grid[1]) ** 0.5 / side))
            grid = (max(1, grid[0] // shrink), max(1, grid[1] // shrink))
        resized = [resize(s.values, s.grid, grid) for s in seen]
        return sum(resized[1:], resized[0]) / len(resized), grid


def resize(values: Tensor, grid: Grid, new: Grid) -> Tensor:
    """Average [B, N, K] maps over the cells of a coarser grid."""
    if grid == new:
        return values
    planes = values.transpose(1, 2).unflatten(2, grid)  # [B, K, h, w], or [B, K, frames, h, w]
    small = F.adaptive_avg_pool2d(planes.flatten(0, -3), (new[-2], new[-1]))
    return small.reshape(*planes.shape[:2], -1).transpose(1, 2)
