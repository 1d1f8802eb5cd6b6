r"""Attention with the logarithm of its normaliser, by the kernel that torch's own attention takes here.

$P_{ij} = \exp(s\, q_i k_j - lse_i)$ then gives any column of the map without the others, and outputs over parts of
the keys merge to that over all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
FLASH, EFFICIENT, CUDNN = 1, 2, 3  # as torch numbers what scaled_dot_product_attention takes


def reason(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> str | None:
    """Why there is no lse of this call, None if there is."""
    if q.device.type not in ("cpu", "cuda", "meta"):
        return f"torch tells no lse on {q.device.type}"
    if torch.is_autocast_enabled(q.device.type if q.device.type != "meta" else "cpu"):
        return "autocast may choose another dtype for torch's fused attention"
    if mask is not None and mask.requires_grad:
        return "a mask with a gradient leaves torch's fused attention"
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cuda" and (graph or mask is not None or q.shape[-1] % 8):
        return "on an accelerator only without mask and gradient, with heads of a multiple of 8"
    if q.shape[-1] != v.shape[-1] or not q.shape[2] or not k.shape[2] or (mask is not None and mask.ndim not in (2, 4)):
        return "its shapes leave torch's fused attention"
    if q.is_meta or isinstance(q, FakeTensor):  # counted, never run
        return None
    taken = torch._fused_sdp_choice(q, k, v, mask, scale=scale)
    if taken != FLASH and (q.device.type == "cpu" or taken not in (EFFICIENT, CUDNN)):
        return "torch takes its unfused attention here"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D], bit for bit that of `scaled_dot_product_attention`, and lse [B, H, N] in float32.

    The natural logarithm; 0 where a query sees nothing (its output is 0, too). float64 gives float64. No gradient goes
    through lse. Only where `reason` has none.
    """
    if q.device.type != "cuda":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=additive(mask, q), scale=scale)
    taken = torch._fused_sdp_choice(q, k, v, None, scale=scale)
    if taken == FLASH:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    elif taken == EFFICIENT:
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse.flatten(2)[..., : q.shape[2]]  # rows may be padded


def backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` on a CPU."""
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        go, q, k, v, out, lse, 0.0, False, attn_mask=additive(mask, q), scale=scale
    )


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask as what is added, as torch makes it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""One softmax over the union of disjoint sets of keys, $o = \sum_i e^{l_i - l} o_i$, $l = \log \sum_i e^{l_i}$.

    Args:
        parts: outputs [..., N, D] and lse [..., N] over each set, -inf where a query sees nothing in it.

    Returns:
        Output in the dtype of the first, and lse; 0 and -inf where a query sees nothing at all.
    """
    total = torch.stack([lse for _, lse in parts]).logsumexp(0)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out = sum((o.to(total.dtype) * (lse - safe).exp()[..., None] for o, lse in parts[1:]), _share(*parts[0], safe))
    return out.to(parts[0][0].dtype), total  # type: ignore[union-attr]


def _share(out: Tensor, lse: Tensor, total: Tensor) -> Tensor:
    return out.to(total.dtype) * (lse - total).exp()[..., None]
