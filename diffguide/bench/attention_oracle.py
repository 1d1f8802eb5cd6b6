"""Dense attention in float64 at some rows of a call: what a variant has to agree with before it is timed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels import Capture
from diffguide.kernels.problem import Problem

ROWS = 16  # in each sample
# norms of errors over norms, those of fused kernels at each dtype with room
BARS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def samples(N: int) -> list[slice]:
    """Rows at both ends, in the middle, and at two places of no distinction."""
    starts = sorted({min(max(0, int(N * part)), max(0, N - ROWS)) for part in (0, 0.31, 0.5, 0.77, 1)})
    return [slice(start, min(start + ROWS, N)) for start in starts]


def sampled(found: Sequence[Tensor], rows: Sequence[slice]) -> list[Tensor]:
    """The sampled rows of outputs [B, H, N, D] and maps [B, N, R]."""
    return [torch.cat([x[..., own, :] for own in rows], -2).double() for x in found]


def truth(tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any], rows: Sequence[slice]) -> list[Tensor]:
    """Output and maps at these rows, in float64, differentiable."""
    q, k, v = (x.double() for x in tensors)
    problem = Problem(q, k, v, **options)
    outs, maps = [], []
    for own in rows:
        logits = q[:, :, own] @ k.mT * problem.factor
        mask = problem.added(own)
        logits = logits if mask is None else logits + mask
        A = logits.softmax(-1)
        o = A @ v
        if problem.blend is not None:
            w = torch.tensor(problem.blend.weights(q.shape[1]), device=q.device, dtype=o.dtype)[:, None, None]
            o = (1 - w) * o + w * v[:, :, own]
        outs.append(o)
        if (capture := problem.capture) is not None:
            maps.append(_reduced(A, capture))
    found = [torch.cat(outs, 2)]
    return [*found, torch.cat(maps, 1)] if maps else found


def _reduced(A: Tensor, capture: Capture) -> Tensor:
    return (A @ capture.matrix(A.shape[-1], A)).mean(1)


def distance(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest error of one of them, norm over norm."""
    return max(float((x.double() - r).norm() / r.norm().clamp_min(1e-30)) for x, r in zip(found, right, strict=True))
