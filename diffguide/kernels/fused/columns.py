"""Columns of the attention map from q, the selected keys and the row sums that some fast attention left behind.

P[n, r] = exp(q_n k_r · scale - lse_n), averaged over the heads inside the kernel, so that the map is written once.
"""

# pyright: reportArgumentType=false
# a constant of a kernel is a tl.constexpr inside and a plain number at the call

import triton
import triton.language as tl

from diffguide.kernels.fused.tiles import LOG2E, load, product, second


@triton.jit
def columns(
    Q, K, Lse, Map, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, l_b, l_h, l_n, m_b, m_h, m_n,
    heads, group, N, R, scale2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MEAN: tl.constexpr,
    EXACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of the map [B, N, R] of all heads (MEAN), or [B, H, N, R] of one head."""
    across = tl.cdiv(R, BN)
    down = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    rest = pid // across
    b = rest // down
    h0 = 0
    if not MEAN:
        h0 = b % heads
        b = b // heads
    b = b.to(tl.int64)
    rows = (rest % down) * BM + tl.arange(0, BM)
    keys = (pid % across) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, heads if MEAN else 1):
        h = b * 0 + h0 + i
        q = Q + (b * q_b + h * q_h) * UNIT
        k = K + (b * k_b + (h // group) * k_h) * UNIT
        q0 = load(q, rows, N, q_n, q_d, 0, D0, D, True, UNIT)
        k0 = load(k, keys, R, k_n, k_d, 0, D0, D, True, UNIT)
        q1 = second(q, rows, N, q_n, q_d, q0, D0, D1, D, True, UNIT)
        k1 = second(k, keys, R, k_n, k_d, k0, D0, D1, D, True, UNIT)
        s = product(q0, q1, k0, k1, tl.zeros((BM, BN), tl.float32), D1 > 0, EXACT) * scale2
        lse = tl.load(Lse + b * l_b + h * l_h + rows.to(tl.int64) * l_n, mask=rows < N, other=float("-inf"))
        # a row that may attend to nothing has lse = -inf and no share anywhere
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        acc += tl.exp2(s - lse[:, None])
    if MEAN:
        acc = acc / heads
    at = Map + b * m_b + h0 * m_h + rows.to(tl.int64)[:, None] * m_n + keys[None, :]
    tl.store(at, acc, mask=(rows < N)[:, None] & (keys < R)[None, :])
