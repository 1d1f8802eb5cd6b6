"""From places in a picture to the cells of a grid, by exact area.

A cell holds the fraction of its area that a place covers, so nothing depends on the resolution a place was drawn at.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffguide.errors import LayoutError

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1, y down
Array = NDArray[np.float32]
Place = Sequence[Box] | Array  # the union of boxes, or a mask [H, W] in 0..1
Overlap = Literal["average", "first", "last"]
Exact = NDArray[np.float64]


def rasterise(places: Sequence[Place], h: int, w: int) -> Array:
    """The fraction of each cell that each place covers: [R, h, w], 0..1."""
    covered = [_gather(*_cover([place], h, w)) for place in places]
    return np.concatenate([np.zeros((0, h, w), np.float32), *covered])


def shares(places: Sequence[Place], h: int, w: int, overlap: Overlap) -> Array:
    """The fraction of each cell that belongs to each place: [R, h, w], 0..1, summing over R to what they cover.

    Where m of soft masks meet, their union is $1 - \\prod (1 - m)$ under every rule.
    """
    covered, ys, xs = _cover(places, h, w)
    if overlap == "average":
        total, union = covered.sum(0), 1 - np.prod(1 - covered, axis=0)
        return _gather(covered * np.divide(union, total, out=np.zeros_like(total), where=total > 0), ys, xs)
    order = slice(None) if overlap == "first" else slice(None, None, -1)
    taken = np.zeros_like(covered)
    free = np.ones(covered.shape[1:])
    for mine, cover in zip(taken[order], covered[order], strict=True):
        mine[:] = cover * free
        free -= mine
    return _gather(taken, ys, xs)


def _cover(places: Sequence[Place], h: int, w: int) -> tuple[Exact, Exact, Exact]:
    """Coverage [R, Y, X] on the h x w grid cut further along every edge of a box, and the cuts [Y + 1], [X + 1].

    Between cuts a box is all or nothing, so unions and overlaps are exact; a mask is its mean there.
    """
    if h < 1 or w < 1:
        raise LayoutError(f"a grid has at least one cell a side, got {h} x {w}")
    boxes = np.array([box for place in places if not isinstance(place, np.ndarray) for box in place]).reshape(-1, 4)
    xs = np.unique(np.concatenate([np.arange(w + 1.0), boxes[:, ::2].ravel() * w]))
    ys = np.unique(np.concatenate([np.arange(h + 1.0), boxes[:, 1::2].ravel() * h]))
    covered = np.zeros((len(places), len(ys) - 1, len(xs) - 1))
    for cover, place in zip(covered, places, strict=True):
        if isinstance(place, np.ndarray):
            cover[:] = _means(_means(place, ys / h).T, xs / w).T
            continue
        for x0, y0, x1, y1 in place:
            rows, columns = np.searchsorted(ys, [y0 * h, y1 * h]), np.searchsorted(xs, [x0 * w, x1 * w])
            cover[slice(*rows), slice(*columns)] = 1
    return covered, ys, xs


def _means(rows: Array | Exact, cuts: Exact) -> Exact:
    """Means of [n, m] between neighbouring cuts, fractions of its first axis: [len(cuts) - 1, m]."""
    total = np.concatenate([np.zeros((1, rows.shape[1])), np.cumsum(rows, axis=0, dtype=np.float64)])
    at = cuts * len(rows)
    i = np.minimum(at.astype(int), len(rows) - 1)
    part = (at - i)[:, None]
    width = np.maximum(np.diff(at), np.finfo(float).tiny)[:, None]
    return np.clip(np.diff(total[i] * (1 - part) + total[i + 1] * part, axis=0) / width, 0, 1)


def _gather(values: Exact, ys: Exact, xs: Exact) -> Array:
    """Area means over whole cells of values [R, Y, X] between the cuts: [R, h, w]."""
    areas = values * np.diff(ys)[:, None] * np.diff(xs)
    areas = np.add.reduceat(areas, np.searchsorted(ys, np.arange(round(ys[-1]))), axis=1)
    return np.add.reduceat(areas, np.searchsorted(xs, np.arange(round(xs[-1]))), axis=2).astype(np.float32)


def rasterise_box(box: Sequence[float], h: int, w: int) -> Array:
    """The fraction of each cell that a box, clipped to 0..1, covers: [h, w], summing to the box's area times h w."""
    x0, y0, x1, y1 = (min(max(float(v), 0.0), 1.0) for v in box)
    return rasterise([[(x0, y0, x1, y1)]], h, w)[0]


def cells(box: Sequence[float], h: int, w: int) -> tuple[int, int, int, int]:
    """The whole cells (y0, y1, x0, x1) of a box, ends excluded: its edges rounded half up and clipped to the grid.

    A box whose edges round together gets the one cell its middle lies in.
    """
    x0, y0, x1, y1 = box
    return *_range(y0, y1, h), *_range(x0, x1, w)


def _range(low: float, high: float, n: int) -> tuple[int, int]:
    start, stop = (min(max(math.floor(v * n + 0.5), 0), n) for v in (low, high))
    if start < stop:
        return start, stop
    middle = min(max(math.floor((low + high) / 2 * n), 0), n - 1)
    return middle, middle + 1
