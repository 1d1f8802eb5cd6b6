"""Attention in float64 the long way round, and inputs for it: what the fused kernels are held against."""

import math
from typing import Any

import torch
from torch import Tensor


def oracle(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and side_out of `flash` in the dtype of q, float64; rows without a key are 0, with lse = -inf."""
    H, N, M = q.shape[1], q.shape[2], k.shape[2]
    own = torch.arange(H) // (H // k.shape[1])
    k, v = k[:, own], v[:, own]
    scale = given.get("scale") or q.shape[3] ** -0.5
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
    may = torch.ones(1, N, M, dtype=torch.bool)
    if given.get("query_bits") is not None:
        asked, held = given["query_bits"], given["key_bits"]
        meet = [(asked >> bit & 1)[:, :, None] * (held >> bit & 1)[:, None, :] for bit in range(32)]
        may = torch.stack(meet).sum(0) > 0
        if given.get("bias") is not None:
            for bit, row in enumerate(given["bias"]):
                logits = logits + ((asked >> bit & 1)[:, None, :, None] * row).to(q.dtype)
    if given.get("blocks") is not None:
        listed = torch.zeros(N, M, dtype=torch.bool)
        for i, row in enumerate(given["blocks"].tolist()):
            for j in (number for number in row if number >= 0):
                listed[64 * i : 64 * i + 64, 64 * j : 64 * j + 64] = True
        may = may & listed
    logits = torch.where(may[:, None], logits, -math.inf)
    top = logits.amax(-1, keepdim=True)
    weights = torch.where(may[:, None], (logits - torch.where(top == -math.inf, 0, top)).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    p = weights / torch.where(total == 0, 1, total)
    out, side = p @ v, given.get("side")
    if given.get("blend") is not None:
        rows = given.get("blend_rows") or slice(None)
        w = torch.zeros(H, N, 1, dtype=q.dtype)
        w[:, rows] = given["blend"].to(q.dtype)[:, None, None]
        out = out + w * (v - out if v.shape == out.shape else torch.nn.functional.pad(v, (0, 0, 0, N))[:, :, :N] - out)
    return out, (top + total.log())[..., 0], None if side is None else p @ side.to(q.dtype)


def tensors(
    B: int = 1, H: int = 2, N: int = 70, M: int = 77, D: int = 64, R: int = 0, *,
    keys: int | None = None, dtype: torch.dtype = torch.float32, regions: int = 0, bias: bool = False, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `flash`, heads inside tokens as the processors of diffusers have them; query 3 is in no region."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for name, heads, tokens in (("q", H, N), ("k", keys or H, M), ("v", keys or H, M)):
        made[name] = torch.randn(B, tokens, heads, D, generator=draw).to(dtype).transpose(1, 2)
    if R:
        made["side"] = torch.rand(1, 1, M, R, generator=draw).half().float()
    if regions:
        for name, tokens in (("query_bits", N), ("key_bits", M)):
            made[name] = torch.randint(1, 2**regions, (1, tokens), generator=draw, dtype=torch.int32)
        made["query_bits"][:, 3:4] = 0
    if bias:
        made["bias"] = torch.randn(regions, M, generator=draw)
    return made


def exact(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64, except what is whole numbers."""
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in given.items()}


def error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth||."""
    x, truth = x.detach().double(), truth.detach()
    return float((x - truth).norm() / truth.norm().clamp_min(1e-300))
