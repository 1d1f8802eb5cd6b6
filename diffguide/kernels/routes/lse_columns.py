"""Maps from the normaliser of torch's fused attention: the output stays what it is, a few columns come on top."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffguide.kernels import fused as kernels
from diffguide.kernels import lse as lses
from diffguide.kernels.options import Capture
from diffguide.kernels.problem import ROOM, Problem, rows_of
from diffguide.kernels.route import Route

FEW = 4  # at least so many times fewer columns than keys, where the output is not wanted
SHORT = 512  # keys: the backward of so few costs less than the copies that ours makes


def reason(problem: Problem) -> str | None:
    capture = problem.capture
    if capture is None:
        return "no maps are asked for"
    if capture.weights is not None and problem.q.device.type == "cuda":
        return "weighted sums of keys go as side values on an accelerator"
    if problem.sparse and problem.mask_bytes() > ROOM:
        return f"its mask would take {problem.mask_bytes() / 2**20:.0f} MiB"
    if problem.sparse and problem.q.device.type == "cuda":
        return "torch's fused attention on an accelerator tells no lse with a mask"
    v = problem.k if problem.v is None else problem.v
    mask = problem.mask
    if problem.sparse and mask is not None and not mask.requires_grad:
        mask = None  # all are added up to one that every fused attention takes
    return lses.reason(problem.q, problem.k, v, mask, problem.scale)


def declines(problem: Problem) -> str | None:
    R, M = problem.capture.width, problem.k.shape[2]  # type: ignore[union-attr]
    if problem.v is None and R * FEW > M:
        return f"{R} of {M} columns without an output are cheaper by themselves"
    if problem.differentiated and M <= SHORT and problem.q.shape[-1] >= R:
        return f"with a gradient, {R} maps of {M} keys are cheaper as side values"
    return None


def run(problem: Problem) -> tuple[Tensor | None, Tensor]:
    capture = problem.capture
    assert capture is not None
    v = problem.k.detach() if problem.v is None else problem.v
    M = problem.k.shape[2]
    rows = slice(*capture.rows.indices(problem.q.shape[2])[:2])
    columns, G = chosen(capture, M, problem.q)
    mean = capture.mean and G is None
    given = (problem.q, problem.k, v, problem.added(), problem.factor, columns, rows, mean)
    if problem.differentiated:
        out, maps = _Columns.apply(*given)
    else:
        out, lse = lses.attention(problem.q, problem.k, v, given[3], problem.factor)
        maps = _by_kernel(problem, lse, columns, rows) if G is None else None
        maps = probabilities(problem.q, problem.k, lse, *given[3:]) if maps is None else maps
    if G is not None:
        maps = maps @ G
        maps = maps.mean(1) if capture.mean else maps
    return None if problem.v is None else out, maps


def chosen(capture: Capture, M: int, q: Tensor) -> tuple[Any, Tensor | None]:
    """The keys to look at, as an index, and G for them if it is not one column for each."""
    if capture.columns is not None:
        c = capture.columns
        runs = len(c) > 0 and c == tuple(range(c[0], c[-1] + 1))
        return slice(c[0], c[-1] + 1) if runs else torch.tensor(c, dtype=torch.long, device=q.device), None
    G = capture.matrix(M, q).to(torch.promote_types(q.dtype, torch.float32))
    touched = (G != 0).any(-1).any(0)[0].nonzero()[:, 0]
    return touched, G[:, :, touched]


def _by_kernel(problem: Problem, lse: Tensor, columns: Any, rows: slice) -> Tensor | None:
    """Columns by our own kernel, which reads queries once for all heads; None where it is not to be had."""
    if problem.q.device.type == "cpu" or problem.mask is not None or problem.sparse:
        return None
    if kernels.reason(problem.q.device, problem.q.dtype, problem.q.shape[-1], False):
        return None
    capture = problem.capture
    assert capture is not None
    q, k = problem.q[:, :, rows], problem.k[:, :, columns]
    return kernels.column_map(q, k, lse[:, :, rows], scale=problem.factor, head_mean=capture.mean)


def probabilities(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, scale: float, columns: Any, rows: slice, mean: bool
) -> Tensor:
    """Columns of the map of some rows, [B, n, R] or [B, H, n, R], as exact as lse; some heads at a time."""
    q, lse = q[:, :, rows], lse[:, :, rows, None]
    k = k[:, :, columns]
    mask = _cut(mask, rows, columns, k)
    heads = q.shape[1]
    some = max(1, ROOM // max(1, 4 * q.shape[0] * q.shape[2] * k.shape[2]))
    parts: list[Tensor] = []
    for i in range(0, heads, some):
        own = slice(i, i + some)
        A = _columns(q[:, own], k[:, own], lse[:, own], _of_heads(mask, own), scale)
        parts = [*parts, A] if not mean else [sum(parts, A.mean(1) if some >= heads else A.sum(1) / heads)]
    return parts[0] if mean or len(parts) == 1 else torch.cat(parts, 1)


def _columns(q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = q.to(lse.dtype) @ (k.to(lse.dtype) * scale).mT  # there are fewer of these keys than of queries
    if mask is not None:
        logits = logits + mask
    return logits.sub_(lse).exp_()


def _cut(mask: Tensor | None, rows: slice, columns: Any, k: Tensor) -> Tensor | None:
    """An additive mask for these rows and columns."""
    if mask is None:
        return None
    mask = lses.additive(rows_of(mask, rows), k)
    assert mask is not None
    return mask[..., columns] if mask.shape[-1] > 1 else mask


def _of_heads(mask: Tensor | None, heads: slice) -> Tensor | None:
    return mask[..., heads, :, :] if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1 else mask


class _Columns(torch.autograd.Function):
    """Output and columns, differentiated as one: torch's own backward with one more value for what the maps ask."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, columns: Any, rows: slice, mean: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse = lses.attention(q, k, v, mask, scale)
        ctx.save_for_backward(q, k, v, mask, out, lse, columns if isinstance(columns, Tensor) else None)
        ctx.settings = scale, columns if isinstance(columns, slice) else None, rows, mean
        ctx.set_materialize_grads(False)
        return out, probabilities(q, k, lse, mask, scale, columns, rows, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, go: Tensor | None, gm: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v, mask, out, lse, columns = ctx.saved_tensors
        scale, run_of_columns, rows, mean = ctx.settings
        if gm is None:
            grads = (None,) * 3 if go is None else lses.backward(go, q, k, v, out, lse, mask, scale)
            return *grads, *(None,) * 5
        go = torch.zeros_like(out) if go is None else go
        columns = run_of_columns if columns is None else columns
        grads = _gradients(go, gm, q, k, v, out, lse, mask, scale, columns, rows, mean)
        return *grads, *(None,) * 5


def _gradients(
    go: Tensor,
    gm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    columns: Any,
    rows: slice,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Let $\delta_i = \sum_j g_{ij} P_{ij}$ over the columns: $dS_{ij} = P_{ij} (dP_{ij} - \delta^o_i - \delta_i)$ for
    all keys.

    That is torch's backward with $\delta$ as the product of one more output and its gradient 1, whose values are 0; and
    $P_{ij} g_{ij}$ on top in the columns.
    """
    D = q.shape[-1]
    qc, kc = q[:, :, rows].to(lse.dtype), k[:, :, columns].to(lse.dtype)
    P = probabilities(q, k, lse, mask, scale, columns, rows, mean=False)
    gS = P * (gm[:, None] / q.shape[1] if mean else gm)
    delta = torch.zeros_like(lse)
    delta[:, :, rows] = gS.sum(-1)
    t = _factor(go, delta)  # float16 holds neither the gradient of a mean over thousands of pixels nor its products
    pad = (0, 8)
    o, g = F.pad(out, pad), F.pad(go if t == 1 else (go.to(lse.dtype) * t).to(go.dtype), pad)
    o[..., D], g[..., D] = (delta * t).to(o.dtype), 1
    wide = lses.backward(g, F.pad(q, pad), F.pad(k, pad), F.pad(v, pad), o, lse, mask, scale)
    dq, dk, dv = (x[..., :D] if t == 1 else x[..., :D].to(lse.dtype) / t for x in wide)
    dq = dq.to(lse.dtype)
    dq[:, :, rows] += gS @ (kc * scale)
    dk = dk.to(lse.dtype).index_add(2, _index(columns, k), gS.mT @ qc * scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _factor(go: Tensor, delta: Tensor) -> float:
    """The power of two that brings the larger of the two near 1."""
    if go.dtype != torch.float16:
        return 1.0
    largest = max(float(go.abs().max()), float(delta.abs().max()))
    return 2.0 ** round(-torch.tensor(largest).log2().item()) if largest > 0 else 1.0


def _index(columns: Any, k: Tensor) -> Tensor:
    return torch.arange(k.shape[2], device=k.device)[columns]


ROUTE = Route(
    "lse-columns",
    reason,
    run,
    "torch's fused attention, and single columns from its normaliser on top",
    declines,
    exact=True,
)
