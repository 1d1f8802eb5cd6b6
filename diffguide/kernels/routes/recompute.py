"""Torch's own attention, and the map computed beside it from its logits, some heads at a time: any mask, any device."""

import torch
from torch import Tensor

from diffguide.kernels import problem as problems
from diffguide.kernels import reference
from diffguide.kernels.options import Capture
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route
from diffguide.kernels.routes import sdpa


def reason(problem: Problem) -> str | None:
    return "no maps are asked for" if problem.capture is None else None


def run(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    return sdpa.output(problem), maps(problem)


def maps(problem: Problem) -> Tensor:
    """The maps alone."""
    capture = problem.capture
    assert capture is not None
    rows = range(problem.q.shape[2])[capture.rows]
    some = len(rows)
    if problem.sparse and problem.mask_bytes() > problems.ROOM:
        some = max(1, problems.ROOM * problem.q.shape[2] // problem.mask_bytes())
    parts = [_maps(problem, capture, slice(i, min(i + some, rows.stop))) for i in range(rows.start, rows.stop, some)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def _maps(problem: Problem, capture: Capture, rows: slice) -> Tensor:
    M = problem.k.shape[2]
    whole = capture.columns == tuple(range(M))
    return reference.probabilities(
        problem.q[:, :, rows],
        problem.k,
        mask=problem.added(rows),
        scale=problem.scale,
        columns=None if whole or capture.columns is None else list(capture.columns),
        weights=None if capture.weights is None else capture.matrix(M, problem.k),
        head_mean=capture.mean,
    )


ROUTE = Route("recompute", reason, run, "logits once more for the maps: slow, but takes everything")
