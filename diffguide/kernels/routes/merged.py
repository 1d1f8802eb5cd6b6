"""Blocks that each query chooses: attention inside each block over those who chose it, merged by the normalisers.

As VMoBA does it (arXiv 2506.23858): all pairs of a head and a block are sequences of their own length, one behind the
other.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffguide.kernels import lse as lses
from diffguide.kernels.options import Blocks
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route

LEAST = 2048  # keys: one mask over fewer is cheaper
PAYS = 0.5  # of all blocks


def reason(problem: Problem) -> str | None:
    if problem.blocks is None:
        return "there are no blocks"
    others = [n for n in ("mask", "regions", "window", "capture") if getattr(problem, n) is not None]
    if others:
        return f"merged blocks do not take {' and '.join(others)} as well"
    if problem.differentiated:
        return "no gradient goes through the normalisers that it merges by"
    if problem.v is None:
        return "it gives no maps"
    if problem.q.device.type == "cuda":
        return None if problem.q.dtype in (torch.float16, torch.bfloat16) else "torch's varlen attention is for 16 bits"
    return lses.reason(problem.q, problem.k, problem.v, None, problem.scale)


def declines(problem: Problem) -> str | None:
    blocks = problem.blocks
    assert blocks is not None
    if problem.k.shape[2] < LEAST:
        return f"one mask over {problem.k.shape[2]} keys is cheaper"
    share = float(blocks.chosen.float().mean())
    return f"{share:.0%} of the blocks are chosen, which do not pay" if share > PAYS else None


class Packed(NamedTuple):
    """Queries of all sequences, one behind the other.

    `query` [T] numbers the queries of all rows and heads, `queries` and `keys` [S + 1] are where sequences begin and
    end, the keys being those of all rows and heads.
    """

    query: Tensor
    queries: Tensor
    keys: Tensor


def packed(blocks: Blocks, B: int, H: int, N: int, M: int) -> Packed:
    """Sequences by row, head and block of keys; blocks that nobody chose have no queries."""
    C = blocks.chosen.shape[-1]
    chosen = blocks.chosen.repeat_interleave(blocks.queries, 2)[:, :, :N].expand(B, H, N, C)
    sequence = chosen.movedim(3, 2).reshape(B * H, C, N)
    row, _, query = sequence.nonzero(as_tuple=True)
    counts = sequence.sum(-1).flatten()
    ends = torch.tensor([min(blocks.keys, M - c * blocks.keys) for c in range(C)], device=chosen.device).repeat(B * H)
    return Packed(row * N + query, _edges(counts), _edges(ends))


def run(problem: Problem) -> tuple[Tensor, None]:
    q, k, v, blocks = problem.q, problem.k, problem.v, problem.blocks
    assert blocks is not None and v is not None
    B, H, N, M = problem.shape
    pack = packed(replace(blocks, chosen=blocks.chosen.to(q.device)), B, H, N, M)
    flat = [x.reshape(-1, x.shape[-1]) for x in (q, k, v)]  # rows, heads and tokens
    o, lse = pieces(flat[0][pack.query], flat[1], flat[2], pack, problem.factor)
    highest = lse.new_full((B * H * N,), float("-inf")).scatter_reduce(0, pack.query, lse, "amax")
    share = (lse - highest[pack.query]).exp()
    total = torch.zeros_like(highest).index_add(0, pack.query, share)
    out = lse.new_zeros(B * H * N, v.shape[-1]).index_add(0, pack.query, o.to(lse.dtype) * share[:, None])
    out = out / total.masked_fill(total == 0, 1)[:, None]
    return out.to(q.dtype).reshape(B, H, N, -1), None


def pieces(q: Tensor, k: Tensor, v: Tensor, pack: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Attention inside each sequence: output [T, D] and lse [T]."""
    if q.is_cuda:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        longest = [int(edges.diff().max()) for edges in (pack.queries, pack.keys)]
        edges = (pack.queries.int(), pack.keys.int())
        wanted = AuxRequest(lse=True)
        o, lse = varlen_attn(q[:, None], k[:, None], v[:, None], *edges, *longest, return_aux=wanted, scale=scale)
        return o[:, 0], lse.reshape(-1)
    o, lse = (
        torch.empty_like(q[:, : v.shape[-1]]),
        q.new_empty(len(q), dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    starts, begins = pack.queries.tolist(), pack.keys.tolist()
    for i in range(len(starts) - 1):
        own, seen = slice(starts[i], starts[i + 1]), slice(begins[i], begins[i + 1])
        if starts[i] < starts[i + 1]:
            part, normaliser = lses.attention(q[own][None, None], k[seen][None, None], v[seen][None, None], None, scale)
            o[own], lse[own] = part[0, 0], normaliser[0, 0]
    return o, lse


def _edges(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


ROUTE = Route("merged", reason, run, "attention inside each chosen block, merged by the normalisers", declines)
