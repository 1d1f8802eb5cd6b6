"""Torch's own attention: plain, or with everything that hides keys in one mask, some rows of it at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.kernels import problem as problems
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route


def reason(problem: Problem) -> str | None:
    return "gives no maps" if problem.capture is not None else None


def run(problem: Problem) -> tuple[Tensor | None, None]:
    return output(problem), None


def output(problem: Problem) -> Tensor | None:
    """The output [B, H, N, D] alone, whatever maps are asked for."""
    q, k, v = problem.q, problem.k, problem.v
    if v is None:
        return None
    if not problem.sparse or problem.mask_bytes() <= problems.ROOM:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=problem.added(), scale=problem.scale)
    N = q.shape[2]
    some = max(1, problems.ROOM * N // problem.mask_bytes())
    parts = []
    for start in range(0, N, some):
        rows = slice(start, min(start + some, N))
        mask = problem.added(rows)
        parts.append(F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=mask, scale=problem.scale))
    return torch.cat(parts, 2)


ROUTE = Route("sdpa", reason, run, "torch's attention, on every device")
