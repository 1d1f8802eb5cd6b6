"""Row sums of the backward pass: delta = Σ out · d_out + Σ side_out · d_side, which the softmax subtracts from dP."""

# pyright: reportArgumentType=false
# a constant of a kernel is a tl.constexpr inside and a plain number at the call

import triton
import triton.language as tl

from diffguide.kernels.fused.tiles import load, second


@triton.jit
def delta(
    Out, DOut, SideOut, DSide, Delta, o_b, o_h, o_n, o_d, do_b, do_h, do_n, do_d,
    so_b, so_h, so_n, so_r, ds_b, ds_h, ds_n, ds_r, heads, N,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """BM rows of one head."""
    down = tl.cdiv(N, BM)
    rows = tl.program_id(0) % down * BM + tl.arange(0, BM)
    bh = (tl.program_id(0) // down).to(tl.int64)
    b = bh // heads
    h = bh % heads
    Out += (b * o_b + h * o_h) * UNIT
    DOut += (b * do_b + h * do_h) * UNIT
    o0 = load(Out, rows, N, o_n, o_d, 0, D0, D, True, UNIT)
    do0 = load(DOut, rows, N, do_n, do_d, 0, D0, D, True, UNIT)
    total = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)
    if D1 > 0:
        o1 = second(Out, rows, N, o_n, o_d, o0, D0, D1, D, True, UNIT)
        do1 = second(DOut, rows, N, do_n, do_d, do0, D0, D1, D, True, UNIT)
        total += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    if RP > 0:
        so = load(SideOut + b * so_b + h * so_h, rows, N, so_n, so_r, 0, RP, R, True, 1)
        ds = load(DSide + b * ds_b + h * ds_h, rows, N, ds_n, ds_r, 0, RP, R, True, 1)
        total += tl.sum(so * ds, 1)
    tl.store(Delta + bh * N + rows, total, mask=rows < N)
