"""The gradient of the queries: dq = scale · dS k, with dS = P ∘ (d_out vᵀ + d_side sideᵀ - delta)."""

# pyright: reportArgumentType=false
# a constant of a kernel is a tl.constexpr inside and a plain number at the call

import triton
import triton.language as tl

from diffguide.kernels.fused.tiles import (
    LIFT,
    LOG2E,
    bias_tile,
    bits_of,
    dot,
    load,
    membership,
    product,
    second,
    store,
)


@triton.jit
def step(
    dq0, dq1, q0, q1, do0, do1, ds, lse, row_delta, bits, member, start, K, V, Side, KeyBits, Bias,
    k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2, unside, shrink,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, REGION: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds."""
    keys = start + tl.arange(0, BN)
    k0 = load(K, keys, M, k_n, k_d, 0, D0, D, True, UNIT)
    k1 = second(K, keys, M, k_n, k_d, k0, D0, D1, D, True, UNIT)
    s = product(q0, q1, k0, k1, tl.zeros((q0.shape[0], BN), tl.float32), D1 > 0, EXACT) * scale2
    if BITS > 0:
        high, low = bias_tile(Bias, keys, M, t_r, t_n, ROWS, BITS)
        s = dot(member, tl.trans(low), dot(member, tl.trans(high), s, EXACT), EXACT)
    s = tl.where((keys < M)[None, :], s, float("-inf"))
    if REGION:
        own = bits_of(KeyBits, keys, M, kb_n, True)
        s = tl.where((bits[:, None] & own[None, :]) != 0, s, float("-inf"))
    p = tl.exp2(s - lse[:, None])
    dp = tl.zeros((q0.shape[0], BN), tl.float32)
    if RP > 0:
        dp = dot(ds, tl.trans(load(Side, keys, M, g_n, g_r, 0, RP, R, True, 1)), dp, EXACT) * unside
    v0 = load(V, keys, M, v_n, v_d, 0, D0, D, True, UNIT)
    v1 = second(V, keys, M, v_n, v_d, v0, D0, D1, D, True, UNIT)
    dp = product(do0, do1, v0, v1, dp, D1 > 0, EXACT)
    dz = (p * ((dp - row_delta[:, None]) * shrink)).to(k0.dtype)
    dq0 = dot(dz, k0, dq0, EXACT)
    if D1 > 0:
        dq1 = dot(dz, k1, dq1, EXACT)
    return dq0, dq1


@triton.jit
def queries_backward(
    Q, K, V, Side, DOut, DSide, Lse, Delta, Factors, DQ, QueryBits, KeyBits, Bias, Blocks, Counts,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, g_b, g_h, g_n, g_r,
    do_b, do_h, do_n, do_d, ds_b, ds_h, ds_n, ds_r, dq_b, dq_h, dq_n, qb_b, qb_n, kb_b, kb_n, t_r, t_n,
    heads, group, N, M, width, scale, scale2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    REGION: tl.constexpr, LIST: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head against all keys, or those of the tile's list."""
    down = tl.cdiv(N, BM)
    tile = tl.program_id(0) % down
    bh = (tl.program_id(0) // down).to(tl.int64)
    b = bh // heads
    h = bh % heads
    Q += (b * q_b + h * q_h) * UNIT
    K += (b * k_b + (h // group) * k_h) * UNIT
    V += (b * v_b + (h // group) * v_h) * UNIT
    DOut += (b * do_b + h * do_h) * UNIT
    rows = tile * BM + tl.arange(0, BM)
    q0 = load(Q, rows, N, q_n, q_d, 0, D0, D, True, UNIT)
    q1 = second(Q, rows, N, q_n, q_d, q0, D0, D1, D, True, UNIT)
    do0 = load(DOut, rows, N, do_n, do_d, 0, D0, D, True, UNIT)
    do1 = second(DOut, rows, N, do_n, do_d, do0, D0, D1, D, True, UNIT)
    bits = rows
    member = rows
    ds = do0
    unside = 1.0
    shrink = tl.load(Factors + 2)
    if RP > 0:
        Side += b * g_b + h * g_h
        unside = tl.load(Factors + 1)
        ds = load(DSide + b * ds_b + h * ds_h, rows, N, ds_n, ds_r, 0, RP, R, True, 1) * tl.load(Factors)
        ds = ds.to(Side.dtype.element_ty)
    if REGION:
        KeyBits += b * kb_b
        bits = bits_of(QueryBits + b * qb_b, rows, N, qb_n, True)
    if BITS > 0:
        member = membership(bits, BITS)
    lse = tl.load(Lse + bh * N + rows, mask=rows < N, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E - LIFT)
    row_delta = tl.load(Delta + bh * N + rows, mask=rows < N, other=0.0)
    dq0 = tl.zeros((BM, D0), tl.float32)
    dq1 = tl.zeros((BM, D1 if D1 > 0 else 1), tl.float32)
    if LIST:
        for i in range(0, tl.load(Counts + tile)):
            at = tl.load(Blocks + tile * width + i)
            start = tl.where(at < 0, M, at * BN)  # padding is a tile behind the last key
            dq0, dq1 = step(
                dq0, dq1, q0, q1, do0, do1, ds, lse, row_delta, bits, member, start, K, V, Side, KeyBits, Bias,
                k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2, unside, shrink,
                D, D0, D1, R, RP, ROWS, BITS, BN, REGION, EXACT, UNIT)  # fmt: skip
    else:
        for start in range(0, M, BN):
            dq0, dq1 = step(
                dq0, dq1, q0, q1, do0, do1, ds, lse, row_delta, bits, member, start, K, V, Side, KeyBits, Bias,
                k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2, unside, shrink,
                D, D0, D1, R, RP, ROWS, BITS, BN, REGION, EXACT, UNIT)  # fmt: skip
    back = scale * tl.load(Factors + 3)
    DQ += (b * dq_b + h * dq_h) * UNIT
    store(DQ, rows, N, dq_n, 1, dq0 * back, 0, D0, D, UNIT)
    if D1 > 0:
        store(DQ, rows, N, dq_n, 1, dq1 * back, D0, D1, D, UNIT)
