"""Windows by NATTEN's kernels, where it is installed: A. Hassani et al., arXiv 2204.07143, 2504.16922."""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route


def reason(problem: Problem) -> str | None:
    window = problem.window
    if window is None:
        return "there is no window"
    others = [n for n in ("mask", "regions", "blocks", "capture") if getattr(problem, n) is not None]
    if others or problem.v is None:
        return f"NATTEN does not take {' and '.join(others) or 'maps alone'}"
    if window.borders != "inward" or window.order is not None:
        return "NATTEN's windows move inward, over tokens that lie row-major"
    if min(window.sizes) < 2:
        return "NATTEN's windows have at least 2 tokens on each axis"
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed: pip install natten"
    D, dtype = problem.q.shape[-1], problem.q.dtype
    if dtype == torch.float64 or problem.v.shape[-1] != D:
        return "NATTEN takes float32 and less, with values as wide as keys"
    if problem.q.device.type == "cpu" and (problem.differentiated or D & (D - 1) or D < 8):
        return "on a CPU NATTEN has no backward and takes heads of 8, 16, 32, ... alone"
    try:
        importlib.import_module("natten")
    except Exception as fault:  # a binary for another torch fails in its own way
        return f"natten does not load: {type(fault).__name__}: {fault}"[:200]
    return None


def declines(problem: Problem) -> str | None:
    if problem.q.device.type == "cpu":
        return "NATTEN's way on a CPU makes the whole map"
    if not bool(getattr(importlib.import_module("natten"), "HAS_LIBNATTEN", False)):
        return "this NATTEN comes without its compiled library"
    return None


def run(problem: Problem) -> tuple[Tensor, None]:
    window, q, k, v = problem.window, problem.q, problem.k, problem.v
    assert window is not None and v is not None
    natten: Any = importlib.import_module("natten")
    na = (natten.na1d, natten.na2d, natten.na3d)[len(window.shape) - 1]
    place, N = window.place, q.shape[2]
    grid = [x[:, :, place].transpose(1, 2).unflatten(1, window.shape) for x in (q, k, v)]
    text = [i for i in range(N) if not place.start <= i < place.stop]
    more = {}
    if text:
        more = {f"additional_{n}": x[:, :, text].transpose(1, 2) for n, x in (("keys", k), ("values", v))}
    options = {"stride": window.stride, "dilation": window.dilation, "scale": problem.factor}
    seen = na(*grid, window.sizes, **options, **more).flatten(1, len(window.shape)).transpose(1, 2)
    if not text:
        return seen, None
    beside = F.scaled_dot_product_attention(q[:, :, text], k, v, scale=problem.scale)
    out = torch.empty_like(v)
    out[:, :, place], out[:, :, text] = seen, beside
    return out, None


ROUTE = Route("natten", reason, run, "NATTEN's neighborhood attention", declines)
