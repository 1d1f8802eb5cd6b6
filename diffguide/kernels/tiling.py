"""Windows cut into tiles of queries that share their keys, so that attention is dense inside each tile.

All tiles of a plan have the same size: shorter ones are filled up with queries whose result nobody reads, and with keys
that nobody sees.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffguide.kernels.windows import Axis, Window, inverse

GATHER = 24.0  # what fetching a key and its value costs, in queries that attend to it; a guess that CPUs do not mind


class Cut(NamedTuple):
    """One axis in pieces: `queries` [G, tq] and `keys` [G, tk] are numbers along it, `sees` [G, tq, tk] booleans.

    `own` [G, tq] tells the queries that are no filling.
    """

    queries: Tensor
    own: Tensor
    keys: Tensor
    sees: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """Tiles of a grid in a sequence of tokens.

    Attributes:
        cuts: of each axis; a tile is a piece of each.
        queries: [tiles, tq] places in the sequence.
        back: [grid tokens] where each token's result is among tiles times tq.
        pieces: [tiles, axes] which piece of each axis a tile is.
    """

    cuts: tuple[Cut, ...]
    queries: Tensor
    keys: Tensor
    back: Tensor
    pieces: Tensor

    @property
    def masked(self) -> bool:
        """Whether some query of some tile does not see all of its keys."""
        return not all(bool(cut.sees.all()) for cut in self.cuts)

    def hidden(self, tiles: slice) -> Tensor:
        """What queries of some tiles do not see, [tiles, tq, tk]; [1, tq, tk] where it is the same in all."""
        pieces = self.pieces[tiles]
        parts = []
        for axis, cut in enumerate(self.cuts):
            part = cut.sees[pieces[:, axis]]
            parts.append(part[:1] if bool((part == part[:1]).all()) else part)
        found = parts[0]
        for part in parts[1:]:
            found = found[:, :, None, :, None] & part[:, None, :, None, :]
            found = found.flatten(3, 4).flatten(1, 2)
        return ~found


@functools.lru_cache(16)
def plan(window: Window, device: torch.device) -> Plan:
    """The plan of the least cost."""
    return _plan(window, cheapest(window), device)


def cheapest(window: Window) -> tuple[int, ...]:
    """How many queries along each axis make the tiles of the least cost."""
    axes = window.axes()
    choices = [_sizes(axis, stride) for axis, stride in zip(axes, window.stride, strict=True)]  # type: ignore[arg-type]
    return min(itertools.product(*choices), key=lambda sizes: cost(axes, sizes))


def cost(axes: list[Axis], sizes: tuple[int, ...]) -> float:
    """Of attention by tiles, in pairs of a query and a key."""
    counts = [_extent(axis, size) for axis, size in zip(axes, sizes, strict=True)]
    tiles, queries, keys = (math.prod(each) for each in zip(*counts, strict=True))
    return tiles * keys * (queries + GATHER)


def _sizes(axis: Axis, stride: int) -> list[int]:
    longest = max(map(len, axis.members()))
    doubled = [stride * 2**i for i in range(12)]
    return sorted({min(size, longest) for size in doubled if size < 2 * longest})


@functools.lru_cache(512)
def _extent(axis: Axis, size: int) -> tuple[int, int, int]:
    """How many pieces an axis has, and the queries and keys of the largest."""
    pieces = _pieces(axis, size)
    return len(pieces), max(len(q) for q, _ in pieces), max(len(k) for _, k in pieces)


def _pieces(axis: Axis, size: int) -> list[tuple[list[int], list[int]]]:
    """Queries that stand next to each other in a group, `size` of them, and all keys that one of them sees."""
    found = []
    for members in axis.members():
        for begin in range(0, len(members), size):
            own = members[begin : begin + size]
            first, last = min(axis.start[i] for i in own), max(axis.stop[i] for i in own)
            found.append((own, members[first:last]))
    return found


def _cut(axis: Axis, size: int) -> Cut:
    pieces = _pieces(axis, size)
    _, tq, tk = _extent(axis, size)
    queries = torch.tensor([own + own[:1] * (tq - len(own)) for own, _ in pieces])
    keys = torch.tensor([seen + seen[:1] * (tk - len(seen)) for _, seen in pieces])
    own = torch.tensor([[i < len(q) for i in range(tq)] for q, _ in pieces])
    there = torch.tensor([[i < len(k) for i in range(tk)] for _, k in pieces])
    sees = torch.stack([axis.table(q)[:, k] for q, k in zip(queries, keys, strict=True)]) & there[:, None]
    return Cut(queries, own, keys, sees)


def _plan(window: Window, sizes: tuple[int, ...], device: torch.device) -> Plan:
    cuts = tuple(_cut(axis, size) for axis, size in zip(window.axes(), sizes, strict=True))
    places = inverse(window.raster()) + window.first
    pieces = torch.cartesian_prod(*(torch.arange(len(cut.queries)) for cut in cuts)).reshape(-1, len(cuts))
    queries = places[_flat([cut.queries for cut in cuts], pieces, window.shape)]
    keys = places[_flat([cut.keys for cut in cuts], pieces, window.shape)]
    own = _flat([cut.own.long() for cut in cuts], pieces, (1,) * len(cuts)) == len(cuts)
    back = torch.empty(window.tokens, dtype=torch.long)
    at = own.flatten().nonzero()[:, 0]
    back[queries.flatten()[at] - window.first] = at
    moved = (Cut(*(t.to(device) for t in cut)) for cut in cuts)
    return Plan(tuple(moved), queries.to(device), keys.to(device), back.to(device), pieces.to(device))


def _flat(numbers: list[Tensor], pieces: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Row-major numbers [tiles, tokens] of the tokens of tiles, from those along each axis."""
    found = torch.zeros(len(pieces), 1, dtype=torch.long)
    for axis, (number, n) in enumerate(zip(numbers, shape, strict=True)):
        found = (found[:, :, None] * n + number[pieces[:, axis]][:, None, :]).flatten(1)
    return found
