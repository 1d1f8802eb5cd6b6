"""Our own kernels in Triton: maps, regions and blocks inside one fused attention, with gradients."""

import functools
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels import fused as kernels
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route
from diffguide.kernels.windows import Window

WIDEST = 32  # maps at a time
TILE = 64  # queries and keys of a block


def reason(problem: Problem) -> str | None:
    if why := kernels.reason(problem.q.device, problem.q.dtype, problem.q.shape[-1], problem.differentiated):
        return why
    if problem.mask is not None:
        return "masks are not for it: give regions or blocks"
    if problem.v is None or problem.v.shape[-1] != problem.q.shape[-1]:
        return "it needs values as wide as keys"
    if problem.capture is not None and problem.capture.width > WIDEST:
        return f"it makes at most {WIDEST} maps at a time, not {problem.capture.width}"
    if problem.window is not None and _tiled(problem.window, problem.k.shape[2], torch.device("cpu")) is None:
        whole = f"an order of {TILE} tokens, its sides as stride, an odd multiple of them as size"
        return f"of windows it takes those of whole tiles: {whole}"
    b = problem.blocks
    if b is not None and not (b.keys == b.queries == TILE and b.chosen.shape[:2] == (1, 1)):
        return f"its blocks are {TILE} queries by {TILE} keys, the same in all rows and heads"
    return None


def declines(problem: Problem) -> str | None:
    if problem.q.device.type == "cpu":
        return "on a CPU Triton interprets, for tests alone"
    if problem.capture is not None and not problem.differentiated and not problem.sparse:
        return "without a gradient, columns on top of torch's attention cost less"
    if problem.capture is None and not problem.sparse:
        return "nothing is asked for that torch's attention does not do"
    return None


def run(problem: Problem) -> tuple[Tensor, Tensor | None]:
    capture, regions, blend = problem.capture, problem.regions, problem.blend
    options: dict[str, Any] = {}
    if capture is not None:
        options["side"] = capture.matrix(problem.k.shape[2], problem.k)
    if regions is not None:
        device = problem.q.device
        options |= {"query_bits": regions.query_bits.to(device), "key_bits": regions.key_bits.to(device)}
        options["bias"] = None if regions.bias is None else regions.bias.to(device)
    if problem.blocks is not None or problem.window is not None:
        options["blocks"] = _blocks(problem)
    if blend is not None:
        options |= {"blend": torch.tensor(blend.weights(problem.q.shape[1]), device=problem.q.device)}
        options["blend_rows"] = slice(*blend.rows.indices(problem.q.shape[2])[:2])
    assert problem.v is not None
    out, _, side = kernels.flash(problem.q, problem.k, problem.v, scale=problem.factor, **options)
    if capture is None or side is None:
        return out, None
    maps = side[:, :, capture.rows]
    return out, maps.mean(1) if capture.mean else maps


def _blocks(problem: Problem) -> Tensor:
    """The list of tiles that blocks and window leave."""
    device, M = problem.q.device, problem.k.shape[2]
    if problem.blocks is None:
        assert problem.window is not None
        return _window(problem.window, M, device)
    chosen = problem.blocks.chosen[0, 0].to(device)
    if problem.window is not None:
        tiled = _tiled(problem.window, M, device)
        assert tiled is not None
        chosen = chosen & tiled
    return listed(chosen)


@functools.lru_cache(16)
def _window(window: Window, M: int, device: torch.device) -> Tensor:
    """The list of a window, made once: many layers and steps share it."""
    tiled = _tiled(window, M, device)
    assert tiled is not None
    return listed(tiled)


@functools.lru_cache(16)
def _tiled(window: Window, M: int, device: torch.device) -> Tensor | None:
    found = window.tiled(TILE, M)
    return None if found is None else found.to(device)


def listed(chosen: Tensor) -> Tensor:
    """The numbers of the chosen blocks of each block of queries, int32, filled up with -1."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    longest = max(1, int(chosen.sum(-1).max()))
    there = torch.arange(longest, device=chosen.device) < chosen.sum(-1, keepdim=True)
    return order[:, :longest].masked_fill(~there, -1).int()


ROUTE = Route(
    "fused", reason, run, "one kernel for attention and all that is asked of it", declines, grouped=True, blends=True
)
