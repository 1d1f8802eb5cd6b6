"""flex_attention, compiled: blocks of the map that nobody sees are left out, others are masked as they are made.

Never uncompiled outside tests: that materialises the map and ignores the list of blocks. Compiling takes 5 to 35
seconds for each shape.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels.options import Blocks, Regions
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route
from diffguide.kernels.windows import Window

BLOCK = 128
SHAPES = 256  # for which one process may compile; beyond that torch would fall back to the uncompiled one


def reason(problem: Problem) -> str | None:
    if not problem.sparse and problem.capture is None:
        return "nothing is asked for that torch's attention does not do"
    if problem.mask is not None or (problem.regions is not None and problem.regions.bias is not None):
        return "it is given who sees whom, not masks or biases"
    if problem.q.dtype == torch.float64:
        return "flex_attention has no float64 when compiled"
    if problem.q.device.type not in ("cpu", "cuda"):
        return f"flex_attention is not for {problem.q.device.type}"
    if problem.q.device.type == "cpu" and problem.differentiated:
        return "flex_attention has no backward on a CPU"
    if problem.q.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "no C++ compiler is there: install g++"
    if problem.q.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def declines(problem: Problem) -> str | None:
    if problem.q.device.type == "cpu":
        return "compiles for up to half a minute and is slower than tiles and masks on a CPU"
    return None if problem.sparse else "nothing is hidden, so that it has nothing to leave out"


def run(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    q, k, v, capture = problem.q, problem.k, problem.v, problem.capture
    values = [] if v is None else [v]
    if capture is not None:
        values.append(capture.matrix(k.shape[2], k).expand(*k.shape[:3], -1))
    blocks = _blocks(problem.regions, problem.window, problem.blocks, problem.shape, q.device)
    both = attention()(q, k, torch.cat(values, -1), block_mask=blocks, scale=problem.factor)
    if capture is None:
        return both, None
    D = 0 if v is None else v.shape[-1]
    maps = both[:, :, capture.rows, D:].to(torch.promote_types(q.dtype, torch.float32))
    return None if v is None else both[..., :D], maps.mean(1) if capture.mean else maps


@functools.cache
def attention() -> Callable[..., Tensor]:
    """flex_attention, compiled for each shape; an error where torch would silently go on without compiling."""
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def call(*args: Any, **kwargs: Any) -> Any:
        limit = {"recompile_limit": SHAPES, "accumulated_recompile_limit": SHAPES, "fail_on_recompile_limit_hit": True}
        with config.patch(limit):
            return compiled(*args, **kwargs)

    return call


@functools.lru_cache(8)
def _blocks(
    regions: Regions | None,
    window: Window | None,
    blocks: Blocks | None,
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Any:
    """The mask of blocks, made once for options that come again: many layers and steps share them."""
    B, H, N, M = shape
    q, k = (torch.empty(1, device=device).expand(B, H, n, 1) for n in (N, M))
    problem = Problem(q, k, None, regions=regions, window=window, blocks=blocks)
    sees = predicate(problem)
    return None if sees is None else block_mask(problem, sees)


def predicate(problem: Problem) -> Callable[..., Tensor] | None:
    """Whether query i of row b and head h sees key j, of number tensors; None where all see all."""
    parts: list[Callable[..., Tensor]] = []
    device = problem.q.device
    if (regions := problem.regions) is not None:
        qb, kb = regions.query_bits.to(device), regions.key_bits.to(device)
        many = (int(len(qb) > 1), int(len(kb) > 1))
        parts.append(lambda b, h, i, j: (qb[b * many[0], i] & kb[b * many[1], j]) != 0)
    if problem.window is not None:
        parts += _window(problem.window, problem.q.shape[2], device)
    if (blocks := problem.blocks) is not None:
        chosen, Q, K = blocks.chosen.to(device), blocks.queries, blocks.keys
        mB, mH = int(chosen.shape[0] > 1), int(chosen.shape[1] > 1)
        parts.append(lambda b, h, i, j: chosen[b * mB, h * mH, i // Q, j // K])
    if not parts:
        return None
    return lambda b, h, i, j: functools.reduce(lambda x, y: x & y, [part(b, h, i, j) for part in parts])


def _window(window: Window, N: int, device: torch.device) -> list[Callable[..., Tensor]]:
    """One for each axis; the numbers of text tokens make that they see all and are seen by all."""
    raster = window.raster()
    found: list[Callable[..., Tensor]] = []
    for axis, at in zip(window.axes(), torch.unravel_index(raster, window.shape), strict=True):
        text = torch.ones(N, dtype=torch.bool)
        text[window.place] = False
        columns: list[Tensor] = []
        for values in axis:
            column = torch.zeros(N, dtype=torch.int32)
            column[window.place] = torch.tensor(values, dtype=torch.int32)[at]
            columns.append(column.to(device))
        group, rank, start, stop = columns
        found.append(_along(group, rank, start, stop, text.to(device)))
    return found


def _along(group: Tensor, rank: Tensor, start: Tensor, stop: Tensor, text: Tensor) -> Callable[..., Tensor]:
    def sees(b: Any, h: Any, i: Any, j: Any) -> Tensor:
        inside = (group[i] == group[j]) & (start[i] <= rank[j]) & (rank[j] < stop[i])
        return inside | text[i] | text[j]

    return sees


def block_mask(problem: Problem, sees: Callable[..., Tensor]) -> Any:
    """Which blocks are seen wholly and which in part, from some rows at a time: torch's own way needs the whole map."""
    from torch.nn.attention.flex_attention import BlockMask

    B, H, N, M = problem.shape
    device = problem.q.device
    wide = problem.blocks
    rows = B if any(len(o) > 1 for o in _batched(problem)) else 1
    heads = H if wide is not None and wide.chosen.shape[1] > 1 else 1
    b, h = (torch.arange(n, device=device) for n in (rows, heads))
    j = torch.arange(M, device=device)
    partial, full = [], []
    for begin in range(0, N, BLOCK):
        i = torch.arange(begin, min(begin + BLOCK, N), device=device)
        seen = sees(b[:, None, None, None], h[:, None, None], i[:, None], j).expand(rows, heads, len(i), M)
        kinds = [_by_blocks(seen.any(2), False).any(-1), _by_blocks(seen.all(2), True).all(-1)]
        partial.append(kinds[0] & ~kinds[1])
        full.append(kinds[1])
    lists = [_listed(torch.stack(kind, 2)) for kind in (partial, full)]
    return BlockMask.from_kv_blocks(*lists[0], *lists[1], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(N, M))


def _batched(problem: Problem) -> list[Tensor]:
    found = [] if problem.blocks is None else [problem.blocks.chosen]
    return found if problem.regions is None else [*found, problem.regions.query_bits, problem.regions.key_bits]


def _by_blocks(seen: Tensor, filling: bool) -> Tensor:
    """[B, H, M] as [B, H, blocks, BLOCK]."""
    return torch.nn.functional.pad(seen, (0, -seen.shape[-1] % BLOCK), value=filling).unflatten(-1, (-1, BLOCK))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block of queries has, and which, those not chosen behind."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.int()


ROUTE = Route("flex", reason, run, "flex_attention leaves out what is hidden", declines)
