"""What can be asked of attention beside its output: frozen, checked when made, and again beside the tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from diffguide.errors import KernelError

Heads = Literal["mean", "none"]
BITS = 31  # of an int32, the sign left out


@dataclass(frozen=True, eq=False)
class Capture:
    """The attention map A reduced over keys, A G, as it is made.

    Attributes:
        columns: numbers of the keys to see, each a column of G.
        weights: G itself, [M, R] or [B or 1, M, R]: R weighted sums of keys. Not differentiated.
        rows: the queries whose rows are wanted, without a step.
        heads: `"mean"` averages over heads, giving [B, N, R]; `"none"` keeps them, [B, H, N, R].

    Raises:
        KernelError: neither or both of columns and weights, or one that is malformed.
    """

    columns: Sequence[int] | None = None
    weights: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    heads: Heads = "mean"

    def __post_init__(self) -> None:
        if (self.columns is None) == (self.weights is None):
            raise KernelError("Capture needs either columns (numbers of keys) or weights [M, R], not both or neither")
        if self.columns is not None:
            found = list(self.columns)
            if not all(_whole(c) and c >= 0 for c in found):
                raise KernelError(f"Capture.columns = {found!r:.60} are not numbers of keys, counted from 0")
            object.__setattr__(self, "columns", tuple(found))
        if self.weights is not None and not (self.weights.ndim in (2, 3) and self.weights.is_floating_point()):
            kind = f"{self.weights.dtype} {list(self.weights.shape)}"
            raise KernelError(f"Capture.weights is {kind}; expected real numbers [M, R] or [B or 1, M, R]")
        _check_rows("Capture", self.rows)
        if self.heads not in ("mean", "none"):
            raise KernelError(f'Capture.heads = {self.heads!r} is neither "mean" nor "none"')

    @property
    def width(self) -> int:
        """R, how many columns the maps have."""
        return len(self.columns) if self.columns is not None else self.weights.shape[-1]  # type: ignore[union-attr]

    @property
    def mean(self) -> bool:
        return self.heads == "mean"

    def check(self, B: int, N: int, M: int) -> None:
        """Raise KernelError where this does not fit B rows of N queries and M keys."""
        if self.columns and max(self.columns) >= M:
            raise KernelError(f"Capture.columns has {max(self.columns)}, but there are {M} keys, 0 to {M - 1}")
        G = self.weights
        if G is not None and (G.shape[-2] != M or (G.ndim == 3 and G.shape[0] not in (1, B))):
            raise KernelError(
                f"Capture.weights is {list(G.shape)}; {M} keys and {B} rows need [{M}, R] or [{B}, {M}, R]"
            )
        _check_end("Capture", self.rows, N)

    def matrix(self, M: int, like: Tensor) -> Tensor:
        """G as [1 or B, 1, M, R] on the device and in the dtype of a tensor."""
        if self.weights is not None:
            G = self.weights.to(like.device, like.dtype).detach()
            return G.reshape(-1, 1, *G.shape[-2:])
        G = torch.zeros(M, self.width, device=like.device, dtype=like.dtype)
        G[list(self.columns or ()), range(self.width)] = 1
        return G[None, None]


@dataclass(frozen=True, eq=False)
class Regions:
    """A query sees a key where they share a region: `query_bits & key_bits != 0`, each bit a region.

    Attributes:
        query_bits: whole numbers [N] or [B or 1, N].
        key_bits: whole numbers [M] or [B or 1, M].
        bias: [regions, M], for each region what its queries add to the logits of all keys they see; log w makes a
            key weigh w times as much before rows are normalised. Not differentiated.

    Raises:
        KernelError: a tensor has another shape or type.
    """

    query_bits: Tensor
    key_bits: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("query_bits", "key_bits"):
            bits = getattr(self, name)
            if bits.ndim not in (1, 2) or bits.dtype not in (torch.int32, torch.int64):
                raise KernelError(
                    f"Regions.{name} is {bits.dtype} {list(bits.shape)}; expected int32 [tokens] or [B or 1, tokens]"
                )
            object.__setattr__(self, name, bits.reshape(-1, bits.shape[-1]).to(torch.int32))
        b = self.bias
        if b is not None and not (b.ndim == 2 and b.is_floating_point() and 0 < b.shape[0] <= BITS):
            raise KernelError(f"Regions.bias is {b.dtype} {list(b.shape)}; expected real numbers [1 to {BITS} bits, M]")

    def check(self, B: int, N: int, M: int) -> None:
        """Raise KernelError where this does not fit B rows of N queries and M keys."""
        for name, bits, n in (("query_bits", self.query_bits, N), ("key_bits", self.key_bits, M)):
            if bits.shape[-1] != n or bits.shape[0] not in (1, B):
                raise KernelError(f"Regions.{name} is {list(bits.shape)}; expected [{n}] or [{B}, {n}]")
        if self.bias is not None and self.bias.shape[1] != M:
            raise KernelError(f"Regions.bias is {list(self.bias.shape)}, but there are {M} keys")

    def shared(self, rows: slice = slice(None)) -> Tensor:
        """The bits that queries and keys share, [B or 1, 1, n, M]."""
        return self.query_bits[:, None, rows, None] & self.key_bits[:, None, None, :]

    def added(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """What is added to the logits, [B or 1, 1, n, M], -inf where nothing is seen. Kept while the object lives."""
        whole = rows == slice(None)
        if whole and dtype in self._kept:
            return self._kept[dtype]
        shared = self.shared(rows)
        found = torch.zeros(shared.shape, dtype=dtype, device=shared.device)
        if self.bias is not None:
            number = torch.arange(len(self.bias), device=shared.device)
            inside = (self.query_bits[:, None, rows, None] >> number & 1).to(dtype)
            found += inside @ self.bias.detach().to(shared.device, dtype)
        found.masked_fill_(shared == 0, float("-inf"))
        if whole:
            self._kept[dtype] = found
        return found

    @cached_property
    def _kept(self) -> dict[torch.dtype, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which blocks of consecutive keys a query, or a block of queries, sees.

    Attributes:
        chosen: booleans [B or 1, H or 1, query blocks, key blocks]; dimensions that lack at the front count as 1.
        keys: how many keys a block has; the last may be shorter.
        queries: how many queries choose together; 1 where each chooses for itself.

    Raises:
        KernelError: a shape, a type or a size is wrong.
    """

    chosen: Tensor
    keys: int
    queries: int = 1

    def __post_init__(self) -> None:
        if self.chosen.dtype != torch.bool or not 2 <= self.chosen.ndim <= 4:
            kind = f"{self.chosen.dtype} {list(self.chosen.shape)}"
            raise KernelError(f"Blocks.chosen is {kind}; expected booleans [B or 1, H or 1, query blocks, key blocks]")
        object.__setattr__(self, "chosen", self.chosen[(None,) * (4 - self.chosen.ndim)])
        for name in ("keys", "queries"):
            if not _whole(size := getattr(self, name)) or size < 1:
                raise KernelError(f"Blocks.{name} = {size!r} is not a number of tokens of at least 1")

    def check(self, B: int, H: int, N: int, M: int) -> None:
        """Raise KernelError where this does not fit B rows, H heads, N queries and M keys."""
        wanted = (-(-N // self.queries), -(-M // self.keys))
        b, h, *found = self.chosen.shape
        if tuple(found) != wanted or b not in (1, B) or h not in (1, H):
            raise KernelError(
                f"Blocks.chosen is {list(self.chosen.shape)}; {N} queries in blocks of {self.queries} and {M} keys in "
                f"blocks of {self.keys} need [{B} or 1, {H} or 1, {wanted[0]}, {wanted[1]}]"
            )

    def visible(self, rows: range, M: int) -> Tensor:
        """Which keys some queries see, [B or 1, H or 1, n, M]."""
        own = torch.arange(rows.start, rows.stop, device=self.chosen.device) // self.queries
        key = torch.arange(M, device=self.chosen.device) // self.keys
        return self.chosen[:, :, own][..., key]


@dataclass(frozen=True, eq=False)
class Blend:
    """The output moved towards each token's own value: (1 - w) o + w v. Maps are those of the attention itself.

    Attributes:
        weight: w in [0, 1], one number or one for each head; a tensor [H] will do.
        rows: the tokens it is for, without a step; needs as many keys as queries.

    Raises:
        KernelError: a weight is outside [0, 1].
    """

    weight: float | Sequence[float] | Tensor
    rows: slice = field(default_factory=lambda: slice(None))

    def __post_init__(self) -> None:
        if isinstance(self.weight, Tensor):
            object.__setattr__(self, "weight", self.weight.tolist())
        weights = self.weight if isinstance(self.weight, Sequence) else (self.weight,)
        for w in weights:
            if isinstance(w, bool) or not isinstance(w, int | float) or not 0 <= w <= 1:
                raise KernelError(f"Blend.weight has {w!r}; expected numbers in [0, 1]: 0 keeps the output, 1 gives v")
        _check_rows("Blend", self.rows)

    def check(self, H: int, N: int, M: int) -> None:
        """Raise KernelError where this does not fit H heads, N queries and M keys."""
        if isinstance(self.weight, Sequence) and len(self.weight) != H:
            raise KernelError(f"Blend.weight has {len(self.weight)} numbers, but there are {H} heads")
        if N != M:
            raise KernelError(f"Blend gives each token its own value: {N} queries and {M} keys are no such pairs")
        _check_end("Blend", self.rows, N)

    def weights(self, H: int) -> list[float]:
        return [float(w) for w in self.weight] if isinstance(self.weight, Sequence) else [float(self.weight)] * H

    def apply(self, out: Tensor, v: Tensor) -> Tensor:
        """The blended output, [B, H, N, D]."""
        if not any(weights := self.weights(out.shape[1])):
            return out
        exact = torch.promote_types(out.dtype, torch.float32)
        w = torch.tensor(weights, device=out.device, dtype=exact)[:, None, None]
        own = torch.lerp(out[:, :, self.rows].to(exact), v[:, :, self.rows].to(exact), w).to(out.dtype)
        if self.rows == slice(None):
            return own
        blended = out.clone()
        blended[:, :, self.rows] = own
        return blended


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool)


def _check_rows(name: str, rows: slice) -> None:
    if not isinstance(rows, slice) or rows.step not in (None, 1):
        raise KernelError(f"{name}.rows = {rows!r} is not a slice without a step")


def _check_end(name: str, rows: slice, N: int) -> None:
    if not range(N)[rows] or (rows.stop or 0) > N:
        raise KernelError(f"{name}.rows = {rows.start}:{rows.stop} are not among the {N} queries")
