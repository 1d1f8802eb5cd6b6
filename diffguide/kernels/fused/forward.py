"""Flash attention forward, with side values: [out | side_out] = softmax(q kᵀ · scale + bias) [v | side].

Side values are further value columns that all heads may share, so a reduced map (its mean over a region, a few of its
columns) costs a few columns of the same product and no memory in the number of keys.
"""

# pyright: reportArgumentType=false
# a constant of a kernel is a tl.constexpr inside and a plain number at the call

import triton
import triton.language as tl

from diffguide.kernels.fused.tiles import (
    LN2,
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
    acc0, acc1, acc2, top, total, q0, q1, bits, member, start, K, V, Side, KeyBits, Bias,
    k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, REGION: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr, EDGE: tl.constexpr, EMPTY: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the running maximum, sum and weighted values of each row."""
    keys = start + tl.arange(0, BN)
    k0 = load(K, keys, M, k_n, k_d, 0, D0, D, EDGE, UNIT)
    k1 = second(K, keys, M, k_n, k_d, k0, D0, D1, D, EDGE, UNIT)
    s = product(q0, q1, k0, k1, tl.zeros((q0.shape[0], BN), tl.float32), D1 > 0, EXACT) * scale2
    if BITS > 0:
        high, low = bias_tile(Bias, keys, M, t_r, t_n, ROWS, BITS)
        s = dot(member, tl.trans(low), dot(member, tl.trans(high), s, EXACT), EXACT)
    if EDGE:
        s = tl.where((keys < M)[None, :], s, float("-inf"))
    if REGION:
        own = bits_of(KeyBits, keys, M, kb_n, True)
        s = tl.where((bits[:, None] & own[None, :]) != 0, s, float("-inf"))
    above = tl.maximum(top, tl.max(s, 1))
    base = above
    if EMPTY:  # no key allowed so far: -inf - -inf would be nan
        base = tl.where(above == float("-inf"), 0.0, above)
    p = tl.exp2(s - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    v0 = load(V, keys, M, v_n, v_d, 0, D0, D, EDGE, UNIT)
    acc0 = dot(p.to(v0.dtype), v0, acc0 * fade[:, None], EXACT)
    if D1 > 0:
        v1 = load(V, keys, M, v_n, v_d, D0, D1, D, EDGE, UNIT)
        acc1 = dot(p.to(v1.dtype), v1, acc1 * fade[:, None], EXACT)
    if RP > 0:
        g = load(Side, keys, M, g_n, g_r, 0, RP, R, EDGE, 1)
        acc2 = dot(p.to(g.dtype), g, acc2 * fade[:, None], EXACT)
    return acc0, acc1, acc2, above, total


@triton.jit
def forward(
    Q, K, V, Out, Lse, Side, SideOut, QueryBits, KeyBits, Bias, Blocks, Counts, Blend,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, g_b, g_h, g_n, g_r,
    qb_b, qb_n, kb_b, kb_n, t_r, t_n, heads, group, N, M, width, first, last, scale2,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    REGION: tl.constexpr, LIST: tl.constexpr, BLEND: tl.constexpr, EXACT: tl.constexpr, UNIT: tl.constexpr,
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
    Out += (b * o_b + h * o_h) * UNIT
    rows = tile * BM + tl.arange(0, BM)
    q0 = load(Q, rows, N, q_n, q_d, 0, D0, D, True, UNIT)
    q1 = second(Q, rows, N, q_n, q_d, q0, D0, D1, D, True, UNIT)
    bits = rows
    member = rows
    if RP > 0:
        Side += b * g_b + h * g_h
    if REGION:
        KeyBits += b * kb_b
        bits = bits_of(QueryBits + b * qb_b, rows, N, qb_n, True)
    if BITS > 0:
        member = membership(bits, BITS)
    acc0 = tl.zeros((BM, D0), tl.float32)
    acc1 = tl.zeros((BM, D1 if D1 > 0 else 1), tl.float32)
    acc2 = tl.zeros((BM, RP if RP > 0 else 1), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if LIST:
        for i in range(0, tl.load(Counts + tile)):
            at = tl.load(Blocks + tile * width + i)
            start = tl.where(at < 0, M, at * BN)  # padding is a tile behind the last key
            acc0, acc1, acc2, top, total = step(
                acc0, acc1, acc2, top, total, q0, q1, bits, member, start, K, V, Side, KeyBits, Bias,
                k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2,
                D, D0, D1, R, RP, ROWS, BITS, BN, REGION, EXACT, UNIT, True, True)  # fmt: skip
    else:
        whole = M // BN * BN
        for start in range(0, whole, BN):
            acc0, acc1, acc2, top, total = step(
                acc0, acc1, acc2, top, total, q0, q1, bits, member, start, K, V, Side, KeyBits, Bias,
                k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2,
                D, D0, D1, R, RP, ROWS, BITS, BN, REGION, EXACT, UNIT, False, REGION)  # fmt: skip
        if whole < M:
            acc0, acc1, acc2, top, total = step(
                acc0, acc1, acc2, top, total, q0, q1, bits, member, whole, K, V, Side, KeyBits, Bias,
                k_n, k_d, v_n, v_d, g_n, g_r, kb_n, t_r, t_n, M, scale2,
                D, D0, D1, R, RP, ROWS, BITS, BN, REGION, EXACT, UNIT, True, REGION)  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc0 = acc0 / total[:, None]
    acc1 = acc1 / total[:, None]
    if BLEND:
        w = tl.load(Blend + h)
        w = tl.where((rows >= first) & (rows < last), w, 0.0)[:, None]
        v0 = load(V, rows, last, v_n, v_d, 0, D0, D, True, UNIT)
        acc0 = (1.0 - w) * acc0 + w * v0.to(tl.float32)
        if D1 > 0:
            v1 = load(V, rows, last, v_n, v_d, D0, D1, D, True, UNIT)
            acc1 = (1.0 - w) * acc1 + w * v1.to(tl.float32)
    store(Out, rows, N, o_n, 1, acc0, 0, D0, D, UNIT)
    if D1 > 0:
        store(Out, rows, N, o_n, 1, acc1, D0, D1, D, UNIT)
    if RP > 0:
        store(SideOut + bh * N * R, rows, N, R, 1, acc2 / total[:, None], 0, RP, R, 1)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    tl.store(Lse + bh * N + rows, lse, mask=rows < N)
