"""Attention in plain PyTorch: what every faster route must agree with."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
        [B, N, K], or [B, H, N, K] without `head_mean`; K is the number of columns. Differentiable.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(exact), k.to(exact)
    logits = (q * (scale if scale is not None else q.shape[-1] ** -0.5)) @ k.mT
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(exact)
    chosen = slice(None) if columns is None else columns
    maps = (logits[..., chosen] - logits.logsumexp(-1, keepdim=True)).exp()
    return maps.mean(1) if head_mean else maps
