"""Attention in plain PyTorch: what every faster route must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOM = 2**27  # bytes of logits


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q kᵀ · scale + mask) v.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        v: values [B, H, M, D].
        mask: additive bias, or booleans with True for "may attend", broadcastable to [B, H, N, M].
        scale: factor of the logits, D ** -0.5 if not given.

    Returns:
        [B, H, N, D] in the dtype of `q`.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def probabilities(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    columns: list[int] | None = None,
    head_mean: bool = True,
) -> Tensor:
    """The attention map itself, in float32 (float64 of float64): how much each query attends to each key.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D].
        mask: as for `attention`.
        scale: as for `attention`.
        columns: the keys to return, all M if not given. Rows are normalised over all keys either way.
        head_mean: average over heads, as the map is made.

    Returns:
        [B, N, K], or [B, H, N, K] without `head_mean`; K is the number of columns. Differentiable. No more than `ROOM`
        bytes of logits (or those of one head) exist at a time; the backward pass computes them again.
    """
    heads = q.shape[1]
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    some = max(1, ROOM // (4 * q.shape[0] * q.shape[2] * k.shape[2]))
    if some >= heads:
        maps = _columns(q, k, mask, scale, columns)
        return maps.mean(1) if head_mean else maps
    parts: list[Tensor] = []
    for i in range(0, heads, some):
        own = slice(i, i + some)
        part = mask[..., own, :, :] if mask is not None and mask.ndim > 2 and mask.shape[-3] > 1 else mask
        given = (q[:, own], k[:, own], part, scale, columns)
        maps = checkpoint(_columns, *given, use_reentrant=False) if graph else _columns(*given)
        parts = [*parts, maps] if not head_mean else [sum(parts, maps.sum(1))]
    return parts[0] / heads if head_mean else torch.cat(parts, 1)


def _columns(q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None, columns: list[int] | None) -> Tensor:
    """Some columns of the map, [B, H, N, K]."""
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact), k.to(exact)
    logits = (q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(exact)
    chosen = slice(None) if columns is None else columns
    return (logits[..., chosen] - logits.logsumexp(-1, keepdim=True)).exp()
