"""Fused attention in Triton: flash attention with side values, region bits and block lists, and columns of a map.

Importing this needs neither Triton nor a GPU; `reason` says whether a call could use them. Their numbers are checked in
Triton's interpreter, their code by the compiler's report (`python -m diffguide.kernels.report`); what a GPU has said of
them is told in docs/kernels-compiled.md.
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels.fused import ops
from diffguide.kernels.fused.settings import LISTED, unfit

__all__ = ["WIDEST", "column_map", "flash", "reason"]

WIDEST = 160  # head width: beyond it no setting is free of spills
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def reason(device: torch.device | str, dtype: torch.dtype, head_width: int, grad: bool) -> str | None:
    """Why the fused kernels cannot serve such tensors, or None if they can.

    Args:
        device: where q, k and v are.
        dtype: theirs.
        head_width: D.
        grad: whether a gradient will be asked for.
    """
    device = torch.device(device)
    if find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} is not float16, bfloat16 or float32"
    if head_width > WIDEST:
        return f"heads are {head_width} wide, and the kernels go to {WIDEST}"
    if device.type == "cpu" and ops.interpreted():
        return None
    if device.type != "cuda" or not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    from diffguide.kernels.fused.launch import architecture

    arch = architecture(device)
    return unfit(arch, dtype, head_width, grad) or _assembler(arch)


def _ptxas() -> Any:
    """The assembler that Triton takes, with its `path` and `version`."""
    from triton import knobs

    return knobs.nvidia.ptxas


def newer_assembler() -> Path | None:
    """The ptxas 12.9 that triton 3.6 has beside the one it takes on sm_90, if it is there."""
    newer = Path(_ptxas().path).with_name("ptxas-blackwell")
    return newer if newer.is_file() else None


@functools.cache
def _assembler(arch: str) -> str | None:
    """Why what turns the kernels into machine code is not to be trusted, or None."""
    if arch != "sm_90":  # others have no ptxas, or make sound code with it
        return None
    tool = _ptxas()
    if tuple(map(int, tool.version.split("."))) >= (12, 9):
        return None
    advice = f"set TRITON_PTXAS_PATH={newer_assembler() or 'one of CUDA 12.9 or later'}"
    return f"ptxas {tool.version} makes code for {arch} that reads registers nothing wrote; {advice}, or update torch"


def column_map(q: Tensor, k: Tensor, lse: Tensor, *, scale: float, head_mean: bool = True) -> Tensor:
    """The share of attention that each query gave the selected keys, from the row sums of any attention.

    exp(q kᵀ · scale - lse), in float32 whatever the dtype of q and k.

    Args:
        q: queries [B, H, N, D].
        k: the selected keys [B, H, R, D], with as many heads as q or a divisor of that.
        lse: log of the sum of the exponentials of a row over all keys, natural, float32 [B, H, N]; -inf for a row that
            may attend to nothing, whose shares are then 0.
        scale: factor of the logits, the one that made `lse`.
        head_mean: average over heads, in the kernel.

    Returns:
        float32 [B, N, R], or [B, H, N, R] without `head_mean`, in 0..1. No gradient: `flash` with side values has one.

    Raises:
        ValueError: a shape does not fit.
    """
    _fit_keys(q, k, k)
    _fit("lse", lse, [(n,) for n in q.shape[:3]])
    return ops.column_map(q.detach(), k.detach(), lse.detach(), float(scale), head_mean)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    side: Tensor | None = None,
    query_bits: Tensor | None = None,
    key_bits: Tensor | None = None,
    bias: Tensor | None = None,
    blocks: Tensor | None = None,
    blend: Tensor | None = None,
    blend_rows: slice | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[out | side_out] = P [v | side] with P = softmax(q kᵀ · scale + bias) over the keys that are allowed.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D], with as many heads as q or a divisor of that (then shared by neighbouring query heads).
        v: values, as k.
        scale: factor of the logits, D ** -0.5 if not given.
        side: further value columns [B or 1, 1 or H, M, R], R at most 32: one-hot columns or weights of regions, which
            makes `side_out` a reduced map. Taken as float16 beside both half types, so within ±65504. No gradient.
        query_bits: regions of each query as bits, int32 [B or 1, N]; together with `key_bits`.
        key_bits: int32 [B or 1, M]. A query attends to a key if they share a bit.
        bias: for each region bit a term of the logits of all keys, [bits, M], natural log units, finite and within
            ±30000: a query has the sum over its bits. Needs the bits. No gradient.
        blocks: the key tiles that each query tile attends to, int32 [N tiles, L] with tiles of 64 tokens, each at most
            once, padded with -1.
        blend: w [H] in 0..1: out becomes (1 - w) out + w v, row by row.
        blend_rows: the rows that are blended, all if not given.

    Returns:
        out [B, H, N, D] in the dtype of q and laid out in memory as q; the natural log of the row sums, float32
        [B, H, N]; side_out, float32 [B, H, N, R], or None without `side`. A row without an allowed key has out 0,
        side_out 0 and -inf.
        out and side_out are differentiable in q, k and v, the log is not. The same inputs give the same bits.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _fit_keys(q, k, v)
    (B, H, N, D), M = q.shape, k.shape[2]
    if side is not None:
        _fit("side", side, [(B, 1), (H, 1), (M,), range(1, 33)])
    if (query_bits is None) != (key_bits is None):
        raise ValueError("query_bits and key_bits come together")
    for name, bits, tokens in (("query_bits", query_bits, N), ("key_bits", key_bits, M)):
        if bits is not None:
            _fit(name, bits, [(B, 1), (tokens,)], torch.int32)
    if bias is not None:
        if query_bits is None:
            raise ValueError("bias is per region bit: give query_bits and key_bits with it")
        _fit("bias", bias, [range(1, 33), (M,)])
        bias = bias.detach().float().clamp(-3e4, 3e4)
    if blocks is not None:
        _fit("blocks", blocks, [(-(-N // LISTED),), range(1, 2**31)], torch.int32)
    first, last = 0, 0
    if blend is not None:
        _fit("blend", blend, [(H,)])
        first, last, stride = (blend_rows or slice(None)).indices(N)
        if stride != 1 or last > M:
            raise ValueError(f"blend_rows: {blend_rows}, expected neighbouring rows that v, of {M}, also has")
        blend = blend.detach().float()
    graph = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    fixed = (None if side is None else side.detach(), query_bits, key_bits, bias, blocks)
    # the epilogue hides what the backward pass needs, out before the blend; with a graph torch blends
    epilogue = None if graph else blend
    out, lse, side_out = ops.flash(q, k, v, *fixed, epilogue, first, last, D**-0.5 if scale is None else float(scale))
    if graph and blend is not None:
        out = _blend(out, v, blend, first, last)
    return out, lse.detach(), None if side is None else side_out


def _blend(out: Tensor, v: Tensor, blend: Tensor, first: int, last: int) -> Tensor:
    w = blend.to(out.dtype)[:, None, None]
    values = v[:, :, first:last].repeat_interleave(out.shape[1] // v.shape[1], 1)
    mixed = torch.lerp(out[:, :, first:last], values, w)
    return torch.cat((out[:, :, :first], mixed, out[:, :, last:]), 2)


def _fit_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or min(q.shape) < 1:
        raise ValueError(f"q: {list(q.shape)}, expected [B, H, N, D], none of them 0")
    for name, x in (("k", k), ("v", v)):
        _fit(
            name,
            x,
            [(q.shape[0],), range(1, q.shape[1] + 1), range(1, 2**31) if name == "k" else (k.shape[2],), (q.shape[3],)],
            q.dtype,
        )
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"heads of q, k and v: {q.shape[1]}, {k.shape[1]}, {v.shape[1]}; k and v need the same divisor of q's"
        )


def _fit(name: str, x: Tensor, shape: list, dtype: torch.dtype | None = None) -> None:
    if x.ndim != len(shape) or any(n not in wanted for n, wanted in zip(x.shape, shape, strict=True)):
        wanted = ", ".join(_say(w) for w in shape)
        raise ValueError(f"{name}: {list(x.shape)}, expected [{wanted}]")
    if dtype is not None and x.dtype != dtype:
        raise ValueError(f"{name}: {x.dtype}, expected {dtype}")


def _say(sizes: tuple[int, ...] | range) -> str:
    return f"{sizes[0]} to {sizes[-1]}" if isinstance(sizes, range) else " or ".join(map(str, dict.fromkeys(sizes)))
