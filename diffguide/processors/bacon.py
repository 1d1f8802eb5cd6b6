"""BACON / MAC, reconstructed. H. Chen et al., arXiv 2411.10495.

Only the abstract was at hand: three losses on cross-attention maps, constrained at the boundary of the layout and
aligned by self-attention, move the latents. Every formula below is our own reading of that; do not take it for the
authors'.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.concepts import decay
from diffguide.layout import cells
from diffguide.maps import Maps, Watch, resize
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.site import Grid
from diffguide.targets import Placed, find_targets, pick, union

EPS = 1e-6


@dataclass(frozen=True)
class Bacon(Placed):
    r"""Objects of the right place, size and number, by attention at the boundary of boxes (reconstructed).

    For each object, $a = (1 - \lambda) c + \lambda S c$ is its cross-attention map $c$ spread by self-attention $S$,
    and $\mathcal L = w_{reg} L_{reg} + w_{out} L_{out} + w_{in} L_{in}$: all of $a$ in the boxes with a peak in each;
    nothing just outside a box, nor where two boxes of one phrase meet; something at each of its four sides.
    """

    scale: float = param(100.0, "step size: 0 changes nothing, too high spoils the picture", low=0.0, high=1000.0)
    first_iterations: int = param(5, "most moves in the first step", low=1, high=100)
    iterations: int = param(1, "most moves in a later step", low=1, high=100)
    threshold: float = param(0.2, "loss below which a picture is left alone", low=0.0, high=10.0)
    region: float = param(1.0, "weight of L_reg, place and number", low=0.0, high=10.0)
    outer: float = param(1.0, "weight of L_out, no leak over the edge", low=0.0, high=10.0)
    inner: float = param(0.5, "weight of L_in, size", low=0.0, high=10.0)
    align: float = param(0.3, "spread of cross-attention by self-attention: 0 not at all, 1 wholly", low=0.0, high=1.0)
    boundary: str = param(
        "rings", "outer and inner loss by rings, or by row and column profiles", choices=("rings", "marginal")
    )
    sides: tuple[int, ...] = param((8, 16), "grids of the maps: the nearest the model has, in tokens", low=4, high=64)
    window: Window = param((0.0, 0.2), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    neutral = {"scale": 0.0}
    paper = "arXiv 2411.10495, reconstructed"

    def prepare(self, context: Context) -> None:
        context.memory["targets"] = targets = find_targets(context, self.layout)
        context.memory["columns"] = union(targets)

    def watch(self, context: Context) -> dict[str, Watch]:
        columns = context.memory.get("columns")
        wishes = {f"cross {side}": Watch("cross", (side,), columns) for side in self.sides}
        if self.align:
            wishes |= {f"self {side}": Watch("self", (side,)) for side in self.sides}
        return wishes

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        return torch.stack([self.at(side, maps, context) for side in self.sides]).mean(0)

    def at(self, side: int, maps: Maps, context: Context) -> Tensor:
        """The loss [B] on one grid."""
        C, grid = maps.mean(f"cross {side}")  # [B, N, K]
        S = maps.mean(f"self {side}")[0].detach() if self.align else None  # [B, N, N]; no way for the gradient
        shrink = max(1, round((grid[0] * grid[1]) ** 0.5 / side))
        small = (max(1, grid[0] // shrink), max(1, grid[1] // shrink))
        losses = []
        for row, b in enumerate(context.pictures):
            terms = []
            for target in context.memory["targets"][b]:
                c = pick(C[row], target.columns, context.memory["columns"])
                a = c if S is None else torch.lerp(c, S[row] @ c, self.align)
                a = resize(a[None, :, None], grid, small)[0, :, 0].unflatten(0, small)
                M = instances(target.region.instances, small).to(a.device)
                terms.append(target.region.weight * self.of_object(a, M))
            losses.append(torch.stack(terms).mean() if terms else C[row].sum() * 0)
        return torch.stack(losses)

    def of_object(self, a: Tensor, M: Tensor) -> Tensor:
        """The loss of one object from its map [h, w] and the masks of its instances [K, h, w]."""
        region = region_loss(a, M)
        if self.boundary == "marginal":
            return self.region * region + (self.outer + self.inner) / 2 * marginal_loss(a, M)
        return self.region * region + self.outer * outer_loss(a, M) + self.inner * inner_loss(a, M)

    def rate(self, context: Context) -> float:
        return decay(self.scale, context)

    def most(self, context: Context) -> int:
        return self.first_iterations if context.step == 0 else self.iterations

    def again(self, history: Tensor, context: Context) -> Tensor:
        return history[-1] > self.threshold


def instances(boxes: Sequence[tuple[float, float, float, float]], grid: Grid) -> Tensor:
    """Masks [K, h, w] of boxes, edges rounded to the nearest cell, at least one cell each."""
    M = torch.zeros(len(boxes), *grid)
    for k, box in enumerate(boxes):
        y0, y1, x0, x1 = cells(box, *grid)
        M[k, y0:y1, x0:x1] = 1
    return M


def ring_width(M: Tensor) -> int:
    """Width of the boundary: one cell of a 16x16 grid."""
    return max(1, min(M.shape[-2:]) // 16)


def dilate(M: Tensor, w: int) -> Tensor:
    return F.max_pool2d(M[:, None], 2 * w + 1, 1, w)[:, 0]


def erode(M: Tensor, w: int) -> Tensor:
    """Outside the grid counts as inside, so that a box at the border keeps its cells there."""
    return -F.max_pool2d(-M[:, None], 2 * w + 1, 1, w)[:, 0]


def region_loss(a: Tensor, M: Tensor) -> Tensor:
    """All mass in the union of the boxes, and in each box a peak of at least 0.8 of the highest."""
    U = M.amax(0)
    highest = a.amax().detach() + EPS
    peaks = (a * M).flatten(1).amax(1)
    return (1 - (a * U).sum() / (a.sum() + EPS)) ** 2 + ((1 - peaks / (0.8 * highest)).relu() ** 2).mean()


def outer_loss(a: Tensor, M: Tensor) -> Tensor:
    """Mass in a ring around each box. Only cores of sibling boxes are excused: where two touch, a trench is wanted."""
    w = ring_width(M)
    core = erode(M, w)
    leaks = []
    for k in range(len(M)):
        others = torch.cat([core[:k], core[k + 1 :], torch.zeros_like(core[:1])]).amax(0)
        D = dilate(M[k : k + 1], w)[0] * (1 - M[k]) * (1 - others)
        leaks.append((a * D).sum() / ((a * D).sum() + (a * M[k]).sum() + EPS))
    return torch.stack(leaks).mean()


def inner_loss(a: Tensor, M: Tensor) -> Tensor:
    """At each side of each box a response of at least half its peak; sides that face a sibling box are left out."""
    w = ring_width(M)
    terms = []
    for k in range(len(M)):
        siblings = torch.cat([M[:k], M[k + 1 :], torch.zeros_like(M[:1])]).amax(0)
        rows, cols = M[k].any(1).nonzero()[:, 0], M[k].any(0).nonzero()[:, 0]
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1
        peak = (a * M[k]).amax().detach() + EPS
        sides = {
            "top": (slice(top, top + w), slice(left, right), slice(max(0, top - w), top), slice(left, right)),
            "bottom": (
                slice(max(top, bottom - w), bottom),
                slice(left, right),
                slice(bottom, bottom + w),
                slice(left, right),
            ),
            "left": (slice(top, bottom), slice(left, left + w), slice(top, bottom), slice(max(0, left - w), left)),
            "right": (
                slice(top, bottom),
                slice(max(left, right - w), right),
                slice(top, bottom),
                slice(right, right + w),
            ),
        }
        for inside_y, inside_x, outside_y, outside_x in sides.values():
            if siblings[outside_y, outside_x].any():
                continue
            reach = (a * M[k])[inside_y, inside_x].amax() / peak
            terms.append((1 - reach / 0.5).relu())
    return torch.stack(terms).mean() if terms else a.sum() * 0


def marginal_loss(a: Tensor, M: Tensor) -> Tensor:
    """The other reading of "boundary": row and column profiles of the map follow those of each box near its edges."""
    w = ring_width(M)
    highest = a.amax().detach() + EPS
    terms = []
    for box in M:
        for axis in (0, 1):
            profile, wanted = (a / highest).amax(axis), box.amax(axis)
            edge = (dilate(wanted[None, None], w) - erode(wanted[None, None], w))[0, 0]
            terms.append(((profile - wanted).abs() * edge).sum() / edge.sum().clamp_min(1))
    return torch.stack(terms).mean()
