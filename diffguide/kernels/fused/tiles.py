"""What the kernels share on a tile: loads at an edge, products over two chunks of the head width, region bits, biases.

A head width that is no power of two is two chunks, 80 = 64 + 16, not 128: padding would cost 1.6 times the work, and
160 padded to 256 fits into no register file. Logits are in powers of two, because `exp2` is the instruction there is.

The interpreter (TRITON_INTERPRET=1) runs the same source on the CPU, but computes on the bit patterns of bfloat16. So
`dot` widens there, and all other arithmetic is in float32 everywhere.
"""

# pyright: reportArgumentType=false
# a constant of a kernel is a tl.constexpr inside and a plain number at the call

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The backward pass holds 2^14 p: in float16 a share of one in 16384 keys is then 1, far from what it cannot hold
# (below 6e-8) and, times a difference of two numbers that are at most 1, below what it can (65504).
LIFT = tl.constexpr(14.0)


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """acc + a b, [I, K] [K, J] on [I, J]. `EXACT`: how to multiply float32, of which a GPU left alone takes 10 bits."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=EXACT)


@triton.jit
def product(a0, a1, b0, b1, acc, TWO: tl.constexpr, EXACT: tl.constexpr):
    """acc + a bᵀ over one chunk or two."""
    acc = dot(a0, tl.trans(b0), acc, EXACT)
    if TWO:
        acc = dot(a1, tl.trans(b1), acc, EXACT)
    return acc


@triton.jit
def load(
    P, rows, height, row_stride, column_stride, FIRST: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    EDGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """P[rows, FIRST:FIRST + CHUNK], zero beyond `WIDTH` columns and, with `EDGE`, beyond `height` rows.

    `UNIT` is what strides between rows count in.
    """
    columns = FIRST + tl.arange(0, CHUNK)
    # in 64 bits: beside 40 heads of 128 in one row of memory, token 419431 lies 2^31 elements away
    at = P + rows.to(tl.int64)[:, None] * row_stride * UNIT + columns[None, :] * column_stride
    if FIRST + CHUNK > WIDTH:
        if EDGE:
            return tl.load(at, mask=(rows < height)[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        if EDGE:
            return tl.load(at, mask=(rows < height)[:, None], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def second(
    P, rows, height, row_stride, column_stride, first, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr,
    EDGE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The second chunk, or `first`, which stands in its place and is never used, where there is only one."""
    if D1 > 0:
        return load(P, rows, height, row_stride, column_stride, D0, D1, D, EDGE, UNIT)
    else:
        return first


@triton.jit
def store(
    P, rows, height, row_stride, column_stride, x, FIRST: tl.constexpr, CHUNK: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """P[rows, FIRST:FIRST + CHUNK] = x within `height` and `WIDTH`."""
    columns = FIRST + tl.arange(0, CHUNK)
    at = P + rows.to(tl.int64)[:, None] * row_stride * UNIT + columns[None, :] * column_stride
    tl.store(at, x.to(P.dtype.element_ty), mask=(rows < height)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def bits_of(QueryBits, rows, height, stride, REGION: tl.constexpr):
    """The region bits of these tokens, no bit at all beyond the last one; without regions, the rows themselves."""
    if REGION:
        return tl.load(QueryBits + rows.to(tl.int64) * stride, mask=rows < height, other=0)
    else:
        return rows


@triton.jit
def membership(bits, BITS: tl.constexpr):
    """[tokens, BITS] float16 of 0 and 1: which bits are set."""
    return ((bits[:, None] >> tl.arange(0, BITS)[None, :]) & 1).to(tl.float16)


@triton.jit
def bias_tile(Bias, keys, M, bit_stride, key_stride, ROWS: tl.constexpr, BITS: tl.constexpr):
    """The bias table [keys, BITS] in powers of two, as the sum of two float16: 22 bits of it are kept."""
    bias = load(Bias, keys, M, key_stride, bit_stride, 0, BITS, ROWS, True, 1) * LOG2E
    high = bias.to(tl.float16)
    return high, (bias - high.to(tl.float32)).to(tl.float16)
