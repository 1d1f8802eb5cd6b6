"""What a gradient pass keeps for its backward, counted before a run on tensors without memory."""

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffguide import passes
from diffguide.descent import PLAIN, Thrift
from diffguide.family import Family
from diffguide.maps import Watch
from diffguide.report import MIB
from diffguide.site import Grid, Site


def gradient_memory(
    family: Family,
    model: nn.Module,
    size: Grid,
    watched: dict[str, tuple[Watch, list[Site]]],
    grids: dict[Site, Grid],
    thrift: Thrift = PLAIN,
) -> float:
    """MiB that a gradient pass saves for its backward, for one picture, counted on tensors without memory.

    With nothing watched, that of a whole forward. Weights may be on any device, the meta device among them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved = _Storages()
    largest = 0  # of the blocks that are run once more

    def counted(block: Callable[..., Any], *inputs: Any) -> Any:
        nonlocal largest
        for t in inputs:
            if isinstance(t, Tensor):
                saved.keep(t)
        inside = _Storages()
        try:
            with torch.autograd.graph.saved_tensors_hooks(inside.keep, lambda t: t):
                return block(*inputs)
        finally:
            largest = max(largest, inside.total(besides=free | saved.held.keys()))

    wishes = {(i, name): wish for i, (name, wish) in enumerate(watched.items())}
    blocks = passes.checkpointed(model, counted) if thrift.checkpoints(model) else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, passes.differentiable(model), blocks:
        weights = [fake.from_tensor(p) for p in model.parameters()]  # views of them are saved, too
        free = {w.untyped_storage()._cdata for w in weights}
        args, kwargs = family.example(model, size)
        z = family.argument(args, kwargs).clone().requires_grad_()
        args, kwargs = family.with_argument(args, kwargs, z)
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda t: t),
            _Fused(),
            passes.looking(model, family, args, kwargs, wishes, grids, words=family.words(args, kwargs)),
        ):
            return (saved.total(besides=free) + largest) / MIB


class _Storages:
    """What is kept for a backward pass, each storage once; held, so that no address comes twice."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def keep(self, t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            self.held[storage._cdata] = storage
        return t

    def total(self, besides: Collection[int]) -> int:
        """Bytes, those at other addresses left out."""
        return sum(s.nbytes() for address, s in self.held.items() if address not in besides)


class _Fused(TorchFunctionMode):
    """Attention keeps what a fused kernel keeps, whatever kernel torch would take for tensors without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        return _Kept.apply(*(given.get(name) for name in names))


class _Kept(torch.autograd.Function):
    """Queries, keys, values, mask, output and a float32 for each row are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("counted, never run")
