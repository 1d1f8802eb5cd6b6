"""Windows of attention on a grid of tokens: which tokens see which, as arithmetic on whole numbers, axis by axis.

Neighborhood attention with stride and dilation: A. Hassani et al., arXiv 2504.16922, as NATTEN 0.21 has it; FreeSwim's
inward window (arXiv 2511.14712) is that of size 2 d + 1, sliding tile attention (arXiv 2502.04507) that of stride
tile. Cyclic shifts: Z. Liu et al., arXiv 2103.14030. Short windows at the ends: SeedVR, arXiv 2501.01320.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffguide.errors import KernelError

Borders = Literal["inward", "cut", "wrap", "parted", "short"]
BORDERS = ("inward", "cut", "wrap", "parted", "short")
Size = int | tuple[int, ...]


class Axis(NamedTuple):
    """One axis of n tokens: i sees j where `group[i] == group[j]` and `start[i] <= rank[j] < stop[i]`."""

    group: tuple[int, ...]
    rank: tuple[int, ...]  # place in the own group
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def sees(self, i: int, j: int) -> bool:
        return self.group[i] == self.group[j] and self.start[i] <= self.rank[j] < self.stop[i]

    def members(self) -> list[list[int]]:
        """The tokens of each group in the order of their ranks."""
        found: dict[int, list[tuple[int, int]]] = {}
        for i, (group, rank) in enumerate(zip(self.group, self.rank, strict=True)):
            found.setdefault(group, []).append((rank, i))
        return [[i for _, i in sorted(found[group])] for group in sorted(found)]

    def table(self, queries: Tensor | None = None) -> Tensor:
        """Booleans [n or chosen queries, n]."""
        group, rank, start, stop = (torch.tensor(values) for values in self)
        own = slice(None) if queries is None else queries
        inside = (start[own, None] <= rank) & (rank < stop[own, None])
        return inside & (group[own, None] == group)


@dataclass(frozen=True)
class Window:
    """Each token of a grid sees those in a window around it, or in the part of the grid it belongs to.

    Numbers may be given once for all axes. The tokens lie row-major, the last axis fastest, frames first in video.

    Attributes:
        shape: sides of the grid in tokens, one to three.
        size: sides of the window in tokens; one that is as long as the grid, or longer, sees the whole axis.
        stride: how many neighbours share one window: 1 slides token by token, `size` gives separate blocks.
        dilation: distance of the tokens seen; they are every d-th.
        borders: what windows do at the borders of the grid. `"inward"` moves them inside, so that every token sees as
            many; `"cut"` lets them end there. The other three part the grid into windows, with neither stride nor
            dilation: `"wrap"` shifts them cyclically, so that those at the ends join both ends; `"parted"` does the
            same, but what was apart does not see each other; `"short"` begins with a window of `shift` tokens and ends
            with what is left.
        shift: of the windows of `"wrap"`, `"parted"` and `"short"`, in tokens; 0 is none.
        order: sides of tiles if the tokens come tile by tile, row-major inside each, see `tile_order`.
        first: where the grid begins in the sequence. All other tokens (text) are seen by all and see all.

    Raises:
        KernelError: the numbers do not fit the grid.
    """

    shape: tuple[int, ...]
    size: Size
    stride: Size = 1
    dilation: Size = 1
    borders: Borders = "inward"
    shift: Size = 0
    order: tuple[int, ...] | None = None
    first: int = 0

    def __post_init__(self) -> None:
        shape = self.shape
        if not isinstance(shape, tuple) or not 1 <= len(shape) <= 3 or not all(_above(n, 1) for n in shape):
            raise KernelError(f"Window.shape = {shape!r} is not one to three sides in tokens, such as (64, 64)")
        if self.borders not in BORDERS:
            raise KernelError(f"Window.borders = {self.borders!r} is none of {', '.join(BORDERS)}")
        for name, least in (("size", 1), ("stride", 1), ("dilation", 1), ("shift", 0), ("order", 1)):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._each(name, given, least))
        object.__setattr__(self, "size", tuple(min(k, n) for k, n in zip(self.sizes, shape, strict=True)))
        if not _above(self.first, 0):
            raise KernelError(f"Window.first = {self.first!r} is not a place in the sequence, counted from 0")
        for n, k, s, d, shift in self._numbers():
            if self.borders in ("inward", "cut"):
                _check_sliding(n, k, s, d, shift, self.borders)
            else:
                _check_parts(n, k, s, d, shift, self.borders)

    @classmethod
    def seedvr(
        cls, shape: tuple[int, int, int], *, shifted: bool, windows: tuple[int, int, int] = (4, 3, 3)
    ) -> "Window":
        """SeedVR's windows on a grid of frames, height and width: so many on each axis of a 720p video.

        Their sides keep the area they have at 45 x 80 tokens and follow the shape. Layers alternate between plain and
        shifted windows. (Its text tokens are repeated in each window and averaged over them; here they see all.)
        """
        t, h, w = shape
        scale = math.sqrt(45 * 80 / (h * w))
        sides = (min(t, 30), round(h * scale), round(w * scale))
        size = tuple(math.ceil(side / count) for side, count in zip(sides, windows, strict=True))
        shift = tuple(k // 2 if shifted and k < n else 0 for k, n in zip(size, shape, strict=True))
        return cls(shape, size, borders="short", shift=shift)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.size  # type: ignore[return-value]

    @property
    def tokens(self) -> int:
        """How many the grid has."""
        return math.prod(self.shape)

    @property
    def place(self) -> slice:
        """The grid's tokens in the sequence."""
        return slice(self.first, self.first + self.tokens)

    def axes(self) -> list[Axis]:
        """Who sees whom along each axis; a token sees another where it does along all."""
        return [_axis(*numbers, self.borders) for numbers in self._numbers()]

    @property
    def whole(self) -> bool:
        """Whether every token sees every other."""
        return all(all(axis.table().all(1)) for axis in self.axes()) if self._may_be_whole() else False

    def check(self, N: int, M: int) -> None:
        """Raise KernelError where this does not fit N queries and M keys."""
        if N != M or self.place.stop > M:
            raise KernelError(
                f"Window.shape {'x'.join(map(str, self.shape))} from token {self.first} on does not fit {N} queries "
                f"and {M} keys: a window needs the same tokens as queries and keys, {self.place.stop} at least"
            )

    def visible(self, rows: range, M: int) -> Tensor:
        """Which of M keys some queries see, booleans [n, M]."""
        own = torch.arange(rows.start, rows.stop)
        of_grid = (own >= self.first) & (own < self.place.stop)
        seen = torch.ones(len(rows), M, dtype=torch.bool)
        raster = self.raster()[own[of_grid] - self.first]
        found = torch.ones(len(raster), 1, dtype=torch.bool)
        for axis, at in zip(self.axes(), torch.unravel_index(raster, self.shape), strict=True):
            found = (found[:, :, None] & axis.table(at)[:, None, :]).flatten(1)
        seen[of_grid, self.place] = found[:, self.raster()]
        return seen

    def tiled(self, tile: int, M: int) -> Tensor | None:
        """Which tiles of so many consecutive tokens, of M, see which, booleans [tiles, tiles].

        None where a pair is seen in part, or may be: it is told for tokens that come tile by tile, of `order`, alone.
        """
        order = (tile,) if self.order is None and len(self.shape) == 1 else self.order
        if order is None or math.prod(order) != tile or self.first % tile:
            return None
        if any(n % t for n, t in zip(self.shape, order, strict=True)):
            return None
        seen = torch.ones(1, 1, dtype=torch.bool)
        for axis, t in zip(self.axes(), order, strict=True):
            pairs = axis.table().unflatten(0, (-1, t)).unflatten(2, (-1, t)).transpose(1, 2).flatten(2)
            if not torch.equal(own := pairs.any(2), pairs.all(2)):
                return None
            seen = (seen[:, None, :, None] & own[None, :, None, :]).flatten(0, 1).flatten(1)
        own = slice(self.first // tile, self.place.stop // tile)
        found = torch.ones(2 * [-(-M // tile)], dtype=torch.bool)
        found[own, own] = seen
        return found

    def raster(self) -> Tensor:
        """The row-major number of each of the grid's tokens, in the order they come."""
        return torch.arange(self.tokens) if self.order is None else tile_order(self.shape, self.order)

    def _numbers(self) -> list[tuple[int, int, int, int, int]]:
        each: Any = (self.shape, self.size, self.stride, self.dilation, self.shift)
        return list(zip(*each, strict=True))

    def _may_be_whole(self) -> bool:
        return all(k == n or self.borders == "cut" for n, k in zip(self.shape, self.sizes, strict=True))

    def _each(self, name: str, given: Any, least: int) -> tuple[int, ...]:
        each = given if isinstance(given, tuple) else (given,) * len(self.shape)
        if len(each) != len(self.shape) or not all(_above(n, least) for n in each):
            raise KernelError(
                f"Window.{name} = {given!r}; expected a whole number of at least {least}, or one for each of the "
                f"{len(self.shape)} axes"
            )
        return each


def tile_order(shape: tuple[int, ...], tile: tuple[int, ...]) -> Tensor:
    """The row-major numbers of a grid's tokens, tile by tile: `x[..., tile_order(...), :]` puts tokens in that order.

    Neighbours on the grid then are neighbours in the sequence, so that blocks of the map are all seen or not at all.
    Tiles at the far ends hold what is left. `inverse` gives the way back.
    """
    at = torch.unravel_index(torch.arange(math.prod(shape)), shape)
    key = torch.zeros(math.prod(shape), dtype=torch.long)
    for n, t, x in zip(shape, tile, at, strict=True):
        key = key * -(-n // t) + x // t
    for t, x in zip(tile, at, strict=True):
        key = key * t + x % t
    return key.argsort()


def inverse(order: Tensor) -> Tensor:
    """Where each token of the old order is in the new one."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@functools.lru_cache(256)
def _axis(n: int, k: int, s: int, d: int, shift: int, borders: Borders) -> Axis:
    if borders in ("inward", "cut"):
        return _sliding(n, k, s, d, borders == "inward")
    ends = _short(n, k, shift) if borders == "short" else _rolled(n, k, shift, borders == "parted")
    group = [0] * n
    rank = [0] * n
    for number, members in enumerate(ends):
        for place, i in enumerate(members):
            group[i], rank[i] = number, place
    sizes = [len(ends[g]) for g in group]
    return Axis(tuple(group), tuple(rank), (0,) * n, tuple(sizes))


def _sliding(n: int, k: int, s: int, d: int, inward: bool) -> Axis:
    """NATTEN's window: k tokens of those d apart, one of the middle of each s."""
    group, rank, start, stop = [], [], [], []
    for i in range(n):
        g, r = i % d, i // d
        m = n // d + (g < n % d)  # tokens of the group
        leader = min(r // s * s + s // 2, m - 1)
        first = leader - k // 2
        if inward:
            first = min(max(first, 0), m - k)
        group.append(g)
        rank.append(r)
        start.append(max(first, 0))
        stop.append(min(first + k, m))
    return Axis(tuple(group), tuple(rank), tuple(start), tuple(stop))


def _short(n: int, k: int, shift: int) -> list[list[int]]:
    """Windows of k tokens after a first one of `shift`."""
    edges = sorted({0, *range(shift, n, k), n})
    return [list(range(a, b)) for a, b in itertools.pairwise(edges)]


def _rolled(n: int, k: int, shift: int, parted: bool) -> list[list[int]]:
    """Windows of the grid rolled by `shift`, tokens that came around the end apart from the others if `parted`."""
    windows: list[list[int]] = []
    for begin in range(0, n, k):
        members = [(p + shift) % n for p in range(begin, begin + k)]
        around = [i for i in members if i < shift and begin + k > n - shift]
        windows += [[i for i in members if i not in around], around] if parted and around else [members]
    return [w for w in windows if w]


def _check_sliding(n: int, k: int, s: int, d: int, shift: int, borders: str) -> None:
    if shift:
        raise KernelError(f'Window.shift = {shift} is for borders "wrap", "parted" and "short", not for {borders!r}')
    if k * d > n and d > 1:
        raise KernelError(f"Window.size {k} with dilation {d} reaches over {k * d} tokens, the grid has {n}: lower one")
    if s > k:
        raise KernelError(f"Window.stride {s} is above the size {k}: tokens between windows would be left out")


def _check_parts(n: int, k: int, s: int, d: int, shift: int, borders: str) -> None:
    if s != 1 or d != 1:
        raise KernelError(f"Window.borders = {borders!r} parts the grid: stride and dilation are 1, not {s} and {d}")
    if shift >= k and shift:
        raise KernelError(f"Window.shift = {shift} is not below the size {k}")
    if borders != "short" and n % k:
        raise KernelError(f'Window.size {k} does not divide the side {n}, as {borders!r} needs; use borders="short"')


def _above(n: Any, least: int) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= least
