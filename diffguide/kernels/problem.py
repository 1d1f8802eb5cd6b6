"""One evaluation of attention with all that is asked of it, checked before any work."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from diffguide.errors import KernelError
from diffguide.kernels.options import Blend, Blocks, Capture, Regions
from diffguide.kernels.windows import Window

OPTIONS = {"capture": Capture, "regions": Regions, "window": Window, "blocks": Blocks, "blend": Blend}
ROOM = 2**26  # bytes of a mask that may exist, or be kept, at a time


@dataclass(frozen=True, eq=False)
class Problem:
    """What `attend` was given; `v` is None where only maps are wanted."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    mask: Tensor | None = None
    scale: float | None = None
    capture: Capture | None = None
    regions: Regions | None = None
    window: Window | None = None
    blocks: Blocks | None = None
    blend: Blend | None = None

    def check(self) -> None:
        """Raise KernelError where tensors and options do not fit each other."""
        q, k, v = self.q, self.k, self.v
        self._check_types()
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x is not None and (x.ndim != 4 or not x.is_floating_point()):
                raise KernelError(f"{name} is {x.dtype} {list(x.shape)}; expected real numbers [B, H, tokens, D]")
        if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise KernelError(
                f"k is {list(k.shape)}, q {list(q.shape)}; expected the same B and D, and heads that divide q's"
            )
        if v is not None and v.shape[:3] != k.shape[:3]:
            raise KernelError(f"v is {list(v.shape)}, k {list(k.shape)}; expected the same B, heads and tokens")
        if (
            len({x.dtype for x in (q, k, v) if x is not None}) > 1
            or len({x.device for x in (q, k, v) if x is not None}) > 1
        ):
            raise KernelError("q, k and v differ in dtype or device; move them together")
        if self.mask is not None:
            try:
                torch.broadcast_shapes(self.mask.shape, self.shape)
            except RuntimeError:
                raise KernelError(
                    f"mask is {list(self.mask.shape)}; expected what broadcasts to {self.shape}"
                ) from None
        B, H, N, M = self.shape
        if self.capture is not None:
            self.capture.check(B, N, M)
        if self.regions is not None:
            self.regions.check(B, N, M)
        if self.window is not None:
            self.window.check(N, M)
        if self.blocks is not None:
            self.blocks.check(B, H, N, M)
        if self.blend is not None:
            self.blend.check(H, N, M)

    def _check_types(self) -> None:
        for name, x in (("q", self.q), ("k", self.k), ("v", self.v), ("mask", self.mask)):
            if not isinstance(x, Tensor) and (x is not None or name in "qk"):
                raise KernelError(f"{name} is {type(x).__name__}; expected a tensor")
        for name, kind in OPTIONS.items():
            if (option := getattr(self, name)) is not None and not isinstance(option, kind):
                raise KernelError(f"{name} is {option!r:.60}; expected diffguide.kernels.{kind.__name__}(...)")
        s = self.scale
        if s is not None and (isinstance(s, bool) or not isinstance(s, int | float) or s != s):
            raise KernelError(f"scale = {s!r} is not a number that logits can be multiplied with")
        if self.mask is not None and not (self.mask.dtype == torch.bool or self.mask.is_floating_point()):
            raise KernelError(f"mask is {self.mask.dtype}; expected booleans, or real numbers that are added to logits")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, H, N, M."""
        B, H, N, _ = self.q.shape
        return B, H, N, self.k.shape[2]

    @property
    def factor(self) -> float:
        """What logits are multiplied with."""
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @cached_property
    def differentiated(self) -> bool:
        """Whether somebody may ask for gradients."""
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def sparse(self) -> bool:
        """Whether an option (not the mask) hides keys."""
        return any(option is not None for option in (self.regions, self.window, self.blocks))

    def without(self, *names: str) -> "Problem":
        """The same without some options."""
        return replace(self, **dict.fromkeys(names))

    def asked(self) -> list[str]:
        """The names of the options that are there."""
        extra = [field.name for field in fields(self) if field.name not in ("q", "k", "v", "scale")]
        return [name for name in extra if getattr(self, name) is not None]

    def with_all_heads(self) -> "Problem":
        """The same with keys and values for each head of q."""
        groups = self.q.shape[1] // self.k.shape[1]
        if groups == 1:
            return self
        k = self.k.repeat_interleave(groups, 1)
        return replace(self, k=k, v=None if self.v is None else self.v.repeat_interleave(groups, 1))

    def of_heads(self, heads: Sequence[int]) -> "Problem":
        """The part that some heads do; keys have as many heads as queries."""
        own = list(heads)
        blocks = self.blocks
        if blocks is not None and blocks.chosen.shape[1] > 1:
            blocks = replace(blocks, chosen=blocks.chosen[:, own])
        mask = self.mask
        if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1:
            mask = mask[..., own, :, :]
        v = None if self.v is None else self.v[:, own]
        return replace(self, q=self.q[:, own], k=self.k[:, own], v=v, mask=mask, blocks=blocks)

    def mask_bytes(self) -> int:
        """Of the mask that `added` makes for all rows."""
        B, H, N, M = self.shape
        wide = self.blocks is not None
        rows = B if wide or (self.regions is not None and len(self.regions.query_bits) > 1) else 1
        return rows * (H if wide and self.blocks.chosen.shape[1] > 1 else 1) * N * M * self.q.element_size()  # type: ignore[union-attr]

    def added(self, rows: slice = slice(None)) -> Tensor | None:
        """All masks of some queries as one that is added to the logits, broadcastable to [B, H, n, M].

        The mask that was given comes back untouched where there is nothing else.
        """
        _, _, N, M = self.shape
        given = rows_of(self.mask, rows)
        if not self.sparse:
            return given
        dtype, device = self.q.dtype, self.q.device
        found: Tensor | None = None
        if self.regions is not None:
            found = self.regions.added(dtype, rows).to(device)
        hidden: list[Tensor] = []
        own = range(N)[rows]
        if self.window is not None:
            hidden.append(_hidden(self.window, own, M, device))
        if self.blocks is not None:
            hidden.append(~self.blocks.visible(own, M).to(device))
        if given is not None:
            if given.dtype == torch.bool:
                hidden.append(~given)
            else:
                found = given.to(dtype) if found is None else found + given.to(dtype)
        for closed in hidden:
            if found is None:
                found = torch.zeros(closed.shape, dtype=dtype, device=device).masked_fill_(closed, float("-inf"))
            else:
                found = found.masked_fill(closed, float("-inf"))
        return found if found is None or found.ndim in (2, 4) else found[(None,) * (4 - found.ndim)]


def rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some queries."""
    return mask[..., rows, :] if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1 else mask


def _hidden(window: Window, rows: range, M: int, device: torch.device) -> Tensor:
    whole = len(rows) == M
    if whole and M * M <= ROOM:
        return _kept(window, M, device)
    return ~window.visible(rows, M).to(device)


@functools.lru_cache(4)
def _kept(window: Window, M: int, device: torch.device) -> Tensor:
    return ~window.visible(range(M), M).to(device)
