"""The meaning of the fused kernels in plain PyTorch, forward and backward: what runs where no kernel can."""

import torch
from torch import Tensor

from diffguide.kernels.fused.settings import LISTED


def column_map(q: Tensor, k: Tensor, lse: Tensor, scale: float, head_mean: bool) -> Tensor:
    """exp(q kᵀ · scale - lse): [B, N, R] float32, or [B, H, N, R] without `head_mean`."""
    shares = (_exact(q) @ _exact(_spread(k, q.shape[1])).mT * scale - _finite(lse)[..., None]).exp()
    return (shares.mean(1) if head_mean else shares).float()


def flash(
    q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None, key_bits: Tensor | None,
    bias: Tensor | None, blocks: Tensor | None, blend: Tensor | None, first: int, last: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Out [B, H, N, D] in the precision of the sum, lse [B, H, N] and side_out [B, H, N, R]."""
    s = logits(q, k, query_bits, key_bits, bias, blocks, scale)
    lse = s.logsumexp(-1)
    p = (s - _finite(lse)[..., None]).exp()
    values = _exact(_spread(v, q.shape[1]))
    out = p @ values
    side_out = out.new_zeros(*p.shape[:3], 0) if side is None else p @ side.to(p.dtype)
    if blend is not None:
        w = blend.to(out.dtype)[:, None, None]
        out[:, :, first:last] = (1 - w) * out[:, :, first:last] + w * values[:, :, first:last]
    return out, lse, side_out


def flash_backward(
    d_out: Tensor, d_side: Tensor, q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None,
    key_bits: Tensor | None, bias: Tensor | None, blocks: Tensor | None, out: Tensor, lse: Tensor, side_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [B, H, N, D], dk and dv [B, H of k, M, D]."""
    p = (logits(q, k, query_bits, key_bits, bias, blocks, scale) - _finite(lse)[..., None]).exp()
    d_out = d_out.to(p.dtype)
    dp = d_out @ _exact(_spread(v, q.shape[1])).mT
    delta = (d_out * out).sum(-1)
    if side is not None:
        dp = dp + d_side.to(p.dtype) @ side.to(p.dtype).mT
        delta = delta + (d_side * side_out).sum(-1)
    dz = p * (dp - delta[..., None]) * scale
    dq = dz @ _exact(_spread(k, q.shape[1]))
    groups = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    dk, dv = ((x.mT @ y).unflatten(1, groups[1:]).sum(2) for x, y in ((dz, _exact(q)), (p, d_out)))
    return dq, dk, dv


def logits(
    q: Tensor, k: Tensor, query_bits: Tensor | None, key_bits: Tensor | None,
    bias: Tensor | None, blocks: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """[B, H, N, M], -inf where a query may not attend."""
    s = _exact(q) @ _exact(_spread(k, q.shape[1])).mT * scale
    if query_bits is not None and key_bits is not None:
        if bias is not None:
            number = torch.arange(bias.shape[0], dtype=torch.int32, device=bias.device)
            s = s + (((query_bits[..., None] >> number) & 1).to(s.dtype) @ bias.to(s.dtype))[:, None]
        s = s.masked_fill(((query_bits[..., :, None] & key_bits[..., None, :]) == 0)[:, None], float("-inf"))
    if blocks is not None:
        s = s.masked_fill(~allowed(blocks, q.shape[2], k.shape[2]), float("-inf"))
    return s


def allowed(blocks: Tensor, N: int, M: int) -> Tensor:
    """A block list as booleans [N, M]."""
    tiles = -(-M // LISTED)
    named = torch.zeros(blocks.shape[0], tiles + 1, dtype=torch.bool, device=blocks.device)
    named.scatter_(1, torch.where((blocks >= 0) & (blocks < tiles), blocks, tiles).long(), True)
    return named[:, :tiles].repeat_interleave(LISTED, 0)[:N].repeat_interleave(LISTED, 1)[:, :M]


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(k: Tensor, heads: int) -> Tensor:
    """Keys or values for each query head."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def _finite(lse: Tensor) -> Tensor:
    """+inf in place of the -inf of a row without a key, so that its shares are 0 and not nan."""
    return lse.masked_fill(lse == float("-inf"), float("inf"))
