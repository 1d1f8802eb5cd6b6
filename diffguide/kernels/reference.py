"""Attention in plain PyTorch: what every faster route must agree with."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffguide.kernels.problem import Problem

ROOM = 2**27  # bytes of logits


def attention(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    r"""$o = A v$ and its maps $A G$, $A = softmax(q k^T s + mask)$, with every logit in memory.

    In float32 (float64 of float64). A query that sees nothing gives 0 in both.

    Returns:
        The output [B, H, N, D] in the dtype of q, None without v; the maps [B, n, R] or [B, H, n, R] in float32, None
        if none were asked for. The blend is not done.
    """
    exact = torch.promote_types(problem.q.dtype, torch.float32)
    logits = masked(problem.q.to(exact) @ problem.k.to(exact).mT * problem.factor, problem.added())
    empty = logits.detach().amax(-1, keepdim=True) == float("-inf")
    A = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    out = None if problem.v is None else (A @ problem.v.to(exact)).to(problem.q.dtype)
    capture = problem.capture
    if capture is None:
        return out, None
    maps = A[:, :, capture.rows] @ capture.matrix(A.shape[-1], A)
    return out, maps.mean(1) if capture.mean else maps


def masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with an additive mask, or with booleans that are True for "may attend"."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    columns: list[int] | None = None,
    weights: Tensor | None = None,
    head_mean: bool = True,
) -> Tensor:
    """The attention map itself, in float32 (float64 of float64): how much each query attends to each key.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        mask: additive bias, or booleans with True for "may attend", broadcastable to [B, H, N, M].
        scale: factor of the logits, D ** -0.5 if not given.
        columns: the keys to return, all M if not given. Rows are normalised over all keys either way.
        weights: sums of keys to return in their place, [B or 1, 1, M, R].
        head_mean: average over heads, as the map is made.

    Returns:
        [B, N, K], or [B, H, N, K] without `head_mean`; K is the number of columns. Differentiable. No more than `ROOM`
        bytes of logits (or those of one head) exist at a time; the backward pass computes them again.
    """
    heads = q.shape[1]
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    some = max(1, ROOM // (4 * q.shape[0] * q.shape[2] * k.shape[2]))
    if some >= heads:
        maps = _columns(q, k, mask, scale, columns, weights)
        return maps.mean(1) if head_mean else maps
    parts: list[Tensor] = []
    for i in range(0, heads, some):
        own = slice(i, i + some)
        part = mask[..., own, :, :] if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1 else mask
        given = (q[:, own], k[:, own], part, scale, columns, weights)
        maps = checkpoint(_columns, *given, use_reentrant=False) if graph else _columns(*given)
        parts = [*parts, maps] if not head_mean else [sum(parts, maps.sum(1))]
    return parts[0] / heads if head_mean else torch.cat(parts, 1)


def _columns(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float | None,
    columns: list[int] | None,
    weights: Tensor | None,
) -> Tensor:
    """Some columns of the map, or weighted sums of them, [B, H, N, K]."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact), k.to(exact)
    logits = masked((q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.mT, mask)
    empty = None
    if mask is not None:
        empty = logits.detach().amax(-1, keepdim=True) == float("-inf")
        logits = logits.masked_fill(empty, 0.0)
    chosen = slice(None) if columns is None else columns
    A = (logits[..., chosen] - logits.logsumexp(-1, keepdim=True)).exp()
    A = A if empty is None else A.masked_fill(empty, 0.0)
    return A if weights is None else A @ weights.to(exact)
