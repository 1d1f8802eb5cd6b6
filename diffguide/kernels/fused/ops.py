"""The kernels as operators of torch: what autograd, `torch.compile` and `opcheck` see.

An operator looks at its device: on a GPU it launches the kernels, on a CPU too if Triton interprets
(TRITON_INTERPRET=1), and otherwise it is its meaning in plain PyTorch. Shapes are checked where a user calls, not here.
"""

import os
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels.fused import dense


def interpreted() -> bool:
    """Whether Triton, once imported, runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _kernels(x: Tensor) -> bool:
    """Whether kernels, not their meaning in torch, serve `x`: they know no float64."""
    return x.device.type != "cpu" or (interpreted() and x.dtype != torch.float64)


def _like(x: Tensor, heads: int, tokens: int) -> Tensor:
    """An empty [B, heads, tokens, D] whose memory runs as that of `x`: heads inside tokens, or tokens inside heads."""
    if x.stride(1) < x.stride(2):
        return x.new_empty(x.shape[0], tokens, heads, x.shape[3]).transpose(1, 2)
    return x.new_empty(x.shape[0], heads, tokens, x.shape[3])


@torch.library.custom_op("diffguide::column_map", mutates_args=())
def column_map(q: Tensor, k: Tensor, lse: Tensor, scale: float, head_mean: bool) -> Tensor:
    if not _kernels(q):
        return dense.column_map(q, k, lse, scale, head_mean)
    from diffguide.kernels.fused import launch

    out = _column_map(q, k, lse, scale, head_mean)
    launch.column_map(q, k, lse, out, scale, launch.architecture(q.device)).run()
    return out


@column_map.register_fake
def _column_map(q: Tensor, k: Tensor, lse: Tensor, scale: float, head_mean: bool) -> Tensor:
    shape = (q.shape[0], q.shape[2], k.shape[2]) if head_mean else (*q.shape[:3], k.shape[2])
    return q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("diffguide::flash", mutates_args=())
def flash(
    q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None, key_bits: Tensor | None,
    bias: Tensor | None, blocks: Tensor | None, blend: Tensor | None, first: int, last: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (q, k, v, side, query_bits, key_bits, bias, blocks)
    out, lse, side_out = _flash(*given, blend, first, last, scale)
    if _kernels(q):
        from diffguide.kernels.fused import launch

        problem = launch.Problem(*given, scale, launch.architecture(q.device))
        launch.flash(problem, out, lse, side_out, blend, (first, last)).run()
    else:
        for made, x in zip((out, lse, side_out), dense.flash(*given, blend, first, last, scale), strict=True):
            made.copy_(x)
    return out, lse, side_out


@flash.register_fake
def _flash(
    q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None, key_bits: Tensor | None,
    bias: Tensor | None, blocks: Tensor | None, blend: Tensor | None, first: int, last: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    side_out = q.new_empty(*q.shape[:3], 0 if side is None else side.shape[3], dtype=dtype)
    return _like(q, q.shape[1], q.shape[2]), lse, side_out


@torch.library.custom_op("diffguide::flash_backward", mutates_args=())
def flash_backward(
    d_out: Tensor, d_side: Tensor, q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None,
    key_bits: Tensor | None, bias: Tensor | None, blocks: Tensor | None, out: Tensor, lse: Tensor, side_out: Tensor,
    scale: float, queries: bool, keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    given = (q, k, v, side, query_bits, key_bits, bias, blocks)
    made = _flash_backward(d_out, d_side, *given, out, lse, side_out, scale, queries, keys)
    if not _kernels(q):
        exact = dense.flash_backward(d_out, d_side, *given, out, lse, side_out, scale)
        for wanted, x, y in zip((queries, keys, keys), made, exact, strict=True):
            if wanted:
                x.copy_(y)
        return made
    from diffguide.kernels.fused import launch

    problem = launch.Problem(*given, scale, launch.architecture(q.device))
    saved = {"DOut": d_out, "DSide": d_side, "Lse": lse, "Delta": torch.empty_like(lse)}
    saved["Factors"] = _factors(d_out, d_side, v, side)
    launch.delta(problem, out, d_out, side_out, d_side, saved["Delta"]).run()
    if queries:
        launch.queries_backward(problem, saved, made[0]).run()
    if keys:
        launch.keys_backward(problem, saved, made[1], made[2]).run()
    return made


@flash_backward.register_fake
def _flash_backward(
    d_out: Tensor, d_side: Tensor, q: Tensor, k: Tensor, v: Tensor, side: Tensor | None, query_bits: Tensor | None,
    key_bits: Tensor | None, bias: Tensor | None, blocks: Tensor | None, out: Tensor, lse: Tensor, side_out: Tensor,
    scale: float, queries: bool, keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq = _like(q, q.shape[1], q.shape[2]) if queries else q.new_empty(0)
    dk, dv = (_like(x, x.shape[1], x.shape[2]) if keys else x.new_empty(0) for x in (k, v))
    return dq, dk, dv


def _factors(d_out: Tensor, d_side: Tensor, v: Tensor, side: Tensor | None) -> Tensor:
    """Powers of two that keep float16 away from its ends: float32 [4], on the device, so that nothing waits.

    A mean over 4096 pixels and 10 heads sends cotangents of 1e-5 here; times a share of 1e-3 float16 holds nothing of
    them. So d_side is brought to at most 1 (factor 0, undone by factor 1), and 2^14 p (dP - delta) to at most 2^15
    (factor 2): |dP| is at most D max|d_out| max|v| + R max|d_side| max|side|. Factor 3 undoes that at the end, in
    float32.
    """
    if v.dtype == torch.float32:
        up = shrink = torch.ones((), device=v.device)
    else:
        most = _largest(d_out) * _largest(v) * v.shape[3]
        sides = torch.zeros((), device=v.device)
        if side is not None:
            sides = _largest(d_side)
            most = most + sides * _largest(side) * side.shape[3]
        # clamped where a power of two would leave float32
        up, shrink = (torch.exp2(-torch.frexp(x).exponent.clamp(-100, 100).float()) for x in (sides, most))
    return torch.stack((up, 1 / up, shrink, 2.0**-14 / shrink))


def _largest(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, blend, _, _, scale = inputs
    ctx.save_for_backward(*given, *output)
    ctx.scale, ctx.blended = scale, blend is not None


def _backward(ctx: Any, d_out: Tensor, d_lse: Tensor, d_side: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.blended:
        raise RuntimeError(
            "the blend epilogue has no backward pass: diffguide.kernels.fused.flash blends in torch instead"
        )
    queries, keys = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dq, dk, dv = flash_backward(d_out, d_side, *ctx.saved_tensors, ctx.scale, queries, keys)
    return dq if queries else None, dk if keys else None, dv if keys else None, *[None] * 9


flash.register_autograd(_backward, setup_context=_setup)
