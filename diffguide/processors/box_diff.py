"""BoxDiff. J. Xie et al., ICCV 2023, arXiv 2307.10816."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.concepts import OnOneGrid, last_column, responses
from diffguide.layout import cells
from diffguide.maps import Maps
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.site import Grid
from diffguide.targets import Placed, find_targets


@dataclass(frozen=True)
class BoxDiff(OnOneGrid, Placed):
    r"""Inside a box the highest responses rise, outside they fall, and the map's profiles end where the box does.

    With $X$ as in Attend-and-Excite and $M$ the boxes of a phrase, the sum over phrases of
    $\max(0, 1 - \mathrm{top}_P(X M)) + \mathrm{top}_P(X (1 - M))$ and of
    $\mathrm{mean}\,|\max X - \max M|$ over columns and over rows, near the sides of the boxes alone. $\mathrm{top}_P$
    is the mean of the highest share $P$ of the cells. A phrase of several tokens counts with their sum (our choice).
    """

    share: float = param(0.2, "P: share of the cells whose responses count", low=0.01, high=1.0)
    reach: int = param(1, "L: cells to either side of a box's sides where profiles are compared", low=0, high=8)
    inner: float = param(1.0, "weight of the responses inside", low=0.0, high=10.0)
    outer: float = param(1.0, "weight of the responses outside", low=0.0, high=10.0)
    corner: float = param(1.0, "weight of the profiles", low=0.0, high=10.0)
    normalize_eot: bool = param(False, "leave the end token out of the softmax over words too (SD2: true)")
    window: Window = param((0.0, 0.5), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    paper = "arXiv 2307.10816"

    def prepare(self, context: Context) -> None:
        context.memory["targets"] = find_targets(context, self.layout)
        context.memory["stop"] = last_column(context, self.normalize_eot)

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, grid = maps.mean("cross", self.side)  # [B, N, T]
        losses = []
        for row, b in enumerate(context.pictures):
            targets = context.memory["targets"][b]
            if not targets:
                losses.append(A[row].sum() * 0)
                continue
            X = responses(A[row], [t.columns for t in targets], context.memory["stop"][b], grid)
            terms = [t.region.weight * self.of_phrase(x, t.region.instances) for x, t in zip(X, targets, strict=True)]
            losses.append(torch.stack(terms).sum())
        return torch.stack(losses)

    def of_phrase(self, X: Tensor, boxes: Sequence[tuple[float, float, float, float]]) -> Tensor:
        """The loss of one phrase from its response [h, w]."""
        M, near_x, near_y = inside_and_sides(boxes, (X.shape[0], X.shape[1]), self.reach)
        M, near_x, near_y = M.to(X), near_x.to(X), near_y.to(X)
        inside = (1 - top(X * M, self.share * M.sum())).relu()
        outside = top(X * (1 - M), self.share * (1 - M).sum())
        profiles = sum(((X.amax(axis) - M.amax(axis)).abs() * near).mean() for axis, near in ((0, near_x), (1, near_y)))
        return self.inner * inside + self.outer * outside + self.corner * profiles


def top(X: Tensor, count: Tensor) -> Tensor:
    """Mean of the highest `count` values, at least one."""
    return X.flatten().topk(max(1, int(count))).values.mean()


def inside_and_sides(
    boxes: Sequence[tuple[float, float, float, float]], grid: Grid, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells inside the boxes [h, w]; columns [w] and rows [h] within `reach` of a side of one of them."""
    M, near_x, near_y = torch.zeros(grid), torch.zeros(grid[1]), torch.zeros(grid[0])
    for box in boxes:
        y0, y1, x0, x1 = cells(box, *grid)
        M[y0:y1, x0:x1] = 1
        for near, sides in ((near_x, (x0, x1)), (near_y, (y0, y1))):
            for at in sides:
                near[max(0, at - reach) : at + reach + 1] = 1
    return M, near_x, near_y
