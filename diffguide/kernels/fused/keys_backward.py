"""Gradients of keys and values: dk = scale · dSᵀ q and dv = Pᵀ d_out, summed over the query heads that share them.

Each tile of keys is one program that walks over all queries, so nothing is added in an order left to chance: the
same inputs give the same bits. The logits are computed transposed, keys down and queries across, so that Pᵀ and dSᵀ
enter the products as they lie in the registers.
"""

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
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, g, own, high, low, keys, start, Q, DOut, DSide, Lse, Delta, QueryBits,
    q_n, q_d, do_n, do_d, ds_n, ds_r, qb_n, N, M, scale2, side_up, unside, shrink,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr, REGION: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """What one tile of queries of one head adds."""
    rows = start + tl.arange(0, BM)
    q0 = load(Q, rows, N, q_n, q_d, 0, D0, D, True, UNIT)
    q1 = second(Q, rows, N, q_n, q_d, q0, D0, D1, D, True, UNIT)
    s = product(k0, k1, q0, q1, tl.zeros((k0.shape[0], BM), tl.float32), D1 > 0, EXACT) * scale2
    bits = bits_of(QueryBits, rows, N, qb_n, REGION)
    if BITS > 0:
        member = tl.trans(membership(bits, BITS))
        s = dot(low, member, dot(high, member, s, EXACT), EXACT)
    s = tl.where((keys < M)[:, None], s, float("-inf"))
    if REGION:
        s = tl.where((own[:, None] & bits[None, :]) != 0, s, float("-inf"))
    lse = tl.load(Lse + rows, mask=rows < N, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E - LIFT)
    p = tl.exp2(s - lse[None, :])
    do0 = load(DOut, rows, N, do_n, do_d, 0, D0, D, True, UNIT)
    do1 = second(DOut, rows, N, do_n, do_d, do0, D0, D1, D, True, UNIT)
    dv0 = dot(p.to(do0.dtype), do0, dv0, EXACT)
    if D1 > 0:
        dv1 = dot(p.to(do1.dtype), do1, dv1, EXACT)
    dp = tl.zeros((k0.shape[0], BM), tl.float32)
    if RP > 0:
        ds = load(DSide, rows, N, ds_n, ds_r, 0, RP, R, True, 1) * side_up
        dp = dot(g, tl.trans(ds.to(g.dtype)), dp, EXACT) * unside
    dp = product(v0, v1, do0, do1, dp, D1 > 0, EXACT)
    row_delta = tl.load(Delta + rows, mask=rows < N, other=0.0)
    dz = (p * ((dp - row_delta[None, :]) * shrink)).to(q0.dtype)
    dk0 = dot(dz, q0, dk0, EXACT)
    if D1 > 0:
        dk1 = dot(dz, q1, dk1, EXACT)
    return dk0, dk1, dv0, dv1


@triton.jit
def keys_backward(
    Q, K, V, Side, DOut, DSide, Lse, Delta, Factors, DK, DV, QueryBits, KeyBits, Bias, Takers, Counts,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, g_b, g_h, g_n, g_r,
    do_b, do_h, do_n, do_d, ds_b, ds_h, ds_n, ds_r, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    qb_b, qb_n, kb_b, kb_n, t_r, t_n, heads, group, N, M, width, scale, scale2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    REGION: tl.constexpr, LIST: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One tile of BN keys of one key head against all queries, or those tiles whose list names it."""
    down = tl.cdiv(M, BN)
    tile = tl.program_id(0) % down
    bk = tl.program_id(0) // down
    shared = heads // group
    b = (bk // shared).to(tl.int64)
    hk = (bk % shared).to(tl.int64)
    K += (b * k_b + hk * k_h) * UNIT
    V += (b * v_b + hk * v_h) * UNIT
    keys = tile * BN + tl.arange(0, BN)
    k0 = load(K, keys, M, k_n, k_d, 0, D0, D, True, UNIT)
    k1 = second(K, keys, M, k_n, k_d, k0, D0, D1, D, True, UNIT)
    v0 = load(V, keys, M, v_n, v_d, 0, D0, D, True, UNIT)
    v1 = second(V, keys, M, v_n, v_d, v0, D0, D1, D, True, UNIT)
    own = keys
    high = k0
    low = k0
    if REGION:
        QueryBits += b * qb_b
        own = bits_of(KeyBits + b * kb_b, keys, M, kb_n, True)
    if BITS > 0:
        high, low = bias_tile(Bias, keys, M, t_r, t_n, ROWS, BITS)
    side_up = 1.0
    unside = 1.0
    shrink = tl.load(Factors + 2)
    if RP > 0:
        side_up = tl.load(Factors)
        unside = tl.load(Factors + 1)
    dk0 = tl.zeros((BN, D0), tl.float32)
    dk1 = tl.zeros((BN, D1 if D1 > 0 else 1), tl.float32)
    dv0 = tl.zeros((BN, D0), tl.float32)
    dv1 = tl.zeros((BN, D1 if D1 > 0 else 1), tl.float32)
    for i in range(0, group):
        h = hk * group + i
        q = Q + (b * q_b + h * q_h) * UNIT
        do = DOut + (b * do_b + h * do_h) * UNIT
        ds = DSide
        g = k0
        lse = Lse + (b * heads + h) * N
        row_delta = Delta + (b * heads + h) * N
        if RP > 0:
            ds = DSide + b * ds_b + h * ds_h
            g = load(Side + b * g_b + h * g_h, keys, M, g_n, g_r, 0, RP, R, True, 1)
        if LIST:
            for j in range(0, tl.load(Counts + tile)):
                start = tl.load(Takers + tile * width + j) * BM
                dk0, dk1, dv0, dv1 = step(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, g, own, high, low, keys, start,
                    q, do, ds, lse, row_delta, QueryBits, q_n, q_d, do_n, do_d, ds_n, ds_r, qb_n,
                    N, M, scale2, side_up, unside, shrink,
                    D, D0, D1, R, RP, BITS, BM, REGION, EXACT, UNIT)  # fmt: skip
        else:
            for start in range(0, N, BM):
                dk0, dk1, dv0, dv1 = step(
                    dk0, dk1, dv0, dv1, k0, k1, v0, v1, g, own, high, low, keys, start,
                    q, do, ds, lse, row_delta, QueryBits, q_n, q_d, do_n, do_d, ds_n, ds_r, qb_n,
                    N, M, scale2, side_up, unside, shrink,
                    D, D0, D1, R, RP, BITS, BM, REGION, EXACT, UNIT)  # fmt: skip
    lower = tl.exp2(-LIFT)
    back = scale * tl.load(Factors + 3)
    DK += (b * dk_b + hk * dk_h) * UNIT
    DV += (b * dv_b + hk * dv_h) * UNIT
    store(DK, keys, M, dk_n, 1, dk0 * back, 0, D0, D, UNIT)
    store(DV, keys, M, dv_n, 1, dv0 * lower, 0, D0, D, UNIT)
    if D1 > 0:
        store(DK, keys, M, dk_n, 1, dk1 * back, D0, D1, D, UNIT)
        store(DV, keys, M, dv_n, 1, dv1 * lower, D0, D1, D, UNIT)
