r"""Maps as further columns of the values: $[o | A G] = softmax(q k^T s) [v | G]$, by torch's own attention.

Its fused kernels want values as wide as queries and keys, so that all are padded with zeros to one width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.kernels import problem as problems
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route

STEP = 8  # widths that fused kernels like are multiples of this
FEW = 2**20  # logits, of maps alone with a gradient
WIDEST = 256  # of their heads on accelerators


def reason(problem: Problem) -> str | None:
    if problem.capture is None:
        return "no maps are asked for"
    if problem.q.device.type != "cpu" and width(problem) > WIDEST:
        return f"heads with {width(problem)} values, {problem.capture.width} of them maps, fit no fused kernel"
    if problem.sparse and problem.mask_bytes() > problems.ROOM:
        return f"its mask would take {problem.mask_bytes() / 2**20:.0f} MiB"
    return None


def declines(problem: Problem) -> str | None:
    B, H, N, M = problem.shape
    if problem.v is None and problem.differentiated and B * H * N * M <= FEW:
        return "so few logits are cheaper by themselves"
    R, D = problem.capture.width, problem.q.shape[-1]  # type: ignore[union-attr]
    return f"{R} maps beside heads of {D} cost more than computing them apart" if R > 2 * D else None


def width(problem: Problem) -> int:
    """Of the padded queries, keys and values."""
    assert problem.capture is not None
    D = problem.q.shape[-1]
    values = problem.capture.width + (0 if problem.v is None else problem.v.shape[-1])
    return max(D, values + -values % STEP)


def run(problem: Problem) -> tuple[Tensor | None, Tensor]:
    q, k, v, capture = problem.q, problem.k, problem.v, problem.capture
    assert capture is not None
    W = width(problem)
    G = capture.matrix(k.shape[2], k).expand(*k.shape[:3], -1)
    side = G if v is None else torch.cat([v, G], -1)
    side = F.pad(side, (0, W - side.shape[-1]))
    q, k = (F.pad(x, (0, W - x.shape[-1])) for x in (q, k))
    both = F.scaled_dot_product_attention(q, k, side, attn_mask=problem.added(), scale=problem.factor)
    D = 0 if v is None else v.shape[-1]
    exact = torch.promote_types(q.dtype, torch.float32)
    maps = both[:, :, capture.rows, D : D + capture.width].to(exact)
    return None if v is None else both[..., :D], maps.mean(1) if capture.mean else maps


ROUTE = Route("side-values", reason, run, "maps as further values of torch's attention, with gradients", declines)
