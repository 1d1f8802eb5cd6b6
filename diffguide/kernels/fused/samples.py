"""Calls to look at: each kernel at each head width, with nothing and with everything it can do."""

from typing import Any

import torch

from diffguide.kernels.fused import launch
from diffguide.kernels.fused.launch import Launch, Problem
from diffguide.kernels.fused.settings import LISTED

WIDTHS = (40, 64, 80, 128, 160)
# side columns, region bits, rows of the bias table, tiles in a list
FLAGS: dict[str, dict[str, int]] = {
    "plain": {},
    "side": {"R": 16},
    "regions": {"R": 16, "bits": 4},
    "all": {"R": 32, "bits": 4, "bias": 4},
    "all, listed": {"R": 32, "bits": 4, "bias": 4, "tiles": 16},
}


def problem(
    arch: str, D: int, flags: str, dtype: torch.dtype, device: str = "meta", *,
    B: int = 2, H: int = 8, N: int = 4096, M: int = 4096, keys: int = 8,
) -> Problem:  # fmt: skip
    """Inputs of `flash` for one of `FLAGS`, heads inside tokens; on the meta device they take no memory.

    Args:
        arch: "sm_90" and the like: whose settings are used.
        D: head width.
        flags: a name of `FLAGS`.
        dtype: of q, k and v.
        device: where they are.
        B: rows.
        H: heads of q.
        N: queries.
        M: keys.
        keys: heads of k and v.
    """
    wants = FLAGS[flags]
    q, k, v = (
        torch.randn(B, tokens, heads, D, dtype=dtype, device=device).transpose(1, 2)
        for heads, tokens in ((H, N), (keys, M), (keys, M))
    )
    side_type = dtype if dtype == torch.float32 else torch.float16
    side = torch.rand(1, 1, M, wants["R"], device=device).to(side_type) if "R" in wants else None
    bits: dict[str, Any] = {"query_bits": None, "key_bits": None, "bias": None, "blocks": None}
    if "bits" in wants:
        for name, tokens in (("query_bits", N), ("key_bits", M)):
            bits[name] = torch.randint(0, 2 ** wants["bits"], (1, tokens), dtype=torch.int32, device=device)
    if "bias" in wants:
        bits["bias"] = torch.randn(wants["bias"], M, device=device)
    if "tiles" in wants:
        rows, columns = -(-N // LISTED), -(-M // LISTED)
        drawn = torch.rand(rows, columns, device=device).argsort(1)[:, : wants["tiles"]]
        bits["blocks"] = drawn.to(torch.int32)
    return Problem(q, k, v, side, **bits, scale=D**-0.5, arch=arch)


def sample(kernel: str, given: Problem) -> Launch:
    """The launch of one of `settings.KERNELS` for such inputs, into tensors of its own."""
    (B, H, N, D), device = given.q.shape, given.q.device
    lse = torch.zeros(B, H, N, device=device)
    sides = torch.zeros(B, H, N, given.sides, device=device)
    if kernel == "columns":
        return launch.column_map(given.q, given.k[:, :, :16], lse, lse.new_zeros(B, N, 16), D**-0.5, given.arch)
    if kernel == "forward":
        return launch.flash(given, torch.empty_like(given.q), lse, sides, None, (0, 0))
    if kernel == "delta":
        return launch.delta(given, given.q, given.q, sides, sides, lse)
    saved = {"DOut": given.q, "DSide": sides, "Lse": lse, "Delta": lse, "Factors": torch.ones(4, device=device)}
    if kernel == "queries_backward":
        return launch.queries_backward(given, saved, torch.empty_like(given.q))
    return launch.keys_backward(given, saved, torch.empty_like(given.k), torch.empty_like(given.v))
