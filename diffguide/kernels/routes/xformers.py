"""xformers' memory-efficient attention, where it loads: with a bias, and with the normaliser for single columns."""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.kernels import lse as lses
from diffguide.kernels.problem import ROOM, Problem
from diffguide.kernels.route import Route
from diffguide.kernels.routes import lse_columns

STEP = 8  # a bias lies in rows of a multiple of this


def reason(problem: Problem) -> str | None:
    if problem.q.device.type != "cuda":
        return f"xformers has no kernels for {problem.q.device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed: pip install 'diffguide[xformers]'"
    if problem.v is None or problem.q.dtype == torch.float64:
        return "xformers gives no maps alone, and nothing in float64"
    if problem.capture is not None and (problem.differentiated or problem.capture.columns is None):
        return "maps by its normaliser are single columns without a gradient"
    if problem.sparse and problem.mask_bytes() > ROOM:
        return f"its mask would take {problem.mask_bytes() / 2**20:.0f} MiB"
    try:
        importlib.import_module("xformers.ops")
    except Exception as fault:  # a binary for another torch fails in its own way
        return f"xformers does not load: {type(fault).__name__}: {fault}"[:200]
    return None


def declines(problem: Problem) -> str | None:
    return "torch's own attention does the same since torch 2.0"


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    ops: Any = importlib.import_module("xformers.ops")
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v) if x is not None)
    mask = problem.added()
    bias = None if mask is None else aligned(mask, problem)
    if problem.capture is None:
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=problem.factor).transpose(1, 2), None
    out, lse = ops.fmha.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=problem.factor)
    columns, _ = lse_columns.chosen(problem.capture, problem.k.shape[2], problem.q)
    rows = slice(*problem.capture.rows.indices(problem.q.shape[2])[:2])
    lse = lse[..., : problem.q.shape[2]]  # rows may be padded
    given = (lse, mask, problem.factor, columns, rows, problem.capture.mean)
    return out.transpose(1, 2), lse_columns.probabilities(problem.q, problem.k, *given)


def aligned(mask: Tensor, problem: Problem) -> Tensor:
    """An additive bias [B, H, N, M] whose rows begin at multiples of `STEP`."""
    M = problem.k.shape[2]
    bias = lses.additive(mask, problem.q)
    assert bias is not None
    bias = F.pad(bias.expand(*bias.shape[:-1], M), (0, -M % STEP))
    return bias.expand(*problem.shape[:3], -1)[..., :M]


ROUTE = Route("xformers", reason, run, "xformers' memory-efficient attention", declines)
