"""Windows on any device: tiles of queries with the keys around them, as a batch of small dense attentions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.kernels import tiling
from diffguide.kernels.options import Capture
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route
from diffguide.kernels.routes import sdpa, side_values
from diffguide.kernels.tiling import Plan
from diffguide.kernels.windows import Window

ROOM = 2**24  # bytes of gathered keys and values at a time
LEAST = 2048  # tokens of a grid that is worth it
PAYS = 0.6  # of all pairs of queries and keys: as much work as one mask over them


def reason(problem: Problem) -> str | None:
    if problem.window is None:
        return "there is no window"
    others = [name for name in ("mask", "regions", "blocks") if getattr(problem, name) is not None]
    if others:
        return f"tiles do not take {' and '.join(others)} beside the window"
    return None


def declines(problem: Problem) -> str | None:
    window = problem.window
    assert window is not None
    if window.tokens < LEAST:
        return f"a grid of {window.tokens} tokens is too small for tiles to pay"
    share = tiling.cost(window.axes(), tiling.cheapest(window)) / window.tokens**2
    return f"its tiles are {share:.0%} of full attention, which do not pay" if share > PAYS else None


def run(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    window, capture = problem.window, problem.capture
    assert window is not None
    text = [slice(0, window.first), slice(window.place.stop, None)]
    out, maps = _grid(problem, window, capture)
    parts, seen = [], []
    for own, o, A in ((text[0], None, None), (window.place, out, maps), (text[1], None, None)):
        if not range(problem.q.shape[2])[own]:
            continue
        if own != window.place:
            o, A = _text(problem, own)
        parts.append(o)
        seen.append(A)
    out = None if problem.v is None else torch.cat(parts, 2)
    if capture is None:
        return out, None
    maps = torch.cat(seen, 2)[:, :, capture.rows]
    return out, maps.mean(1) if capture.mean else maps


def _text(problem: Problem, rows: slice) -> tuple[Tensor | None, Tensor | None]:
    """Tokens beside the grid see all."""
    part = Problem(problem.q[:, :, rows], problem.k, problem.v, scale=problem.scale, capture=_every(problem))
    return sdpa.run(part) if part.capture is None else side_values.run(part)


def _every(problem: Problem) -> Capture | None:
    """The capture with all rows and heads, as weights."""
    if problem.capture is None:
        return None
    return Capture(weights=problem.capture.matrix(problem.k.shape[2], problem.k)[:, 0], heads="none")


def _grid(problem: Problem, window: Window, capture: Capture | None) -> tuple[Tensor | None, Tensor | None]:
    """What the tokens of the grid get, [B, H, tokens, D], and their maps [B, H, tokens, R]."""
    q, k, v = problem.q, problem.k, problem.v
    B, H, _, D = q.shape
    plan = tiling.plan(window, q.device)
    G = None if capture is None else capture.matrix(k.shape[2], k).expand(B, 1, -1, -1)
    beside = torch.cat([torch.arange(window.first), torch.arange(window.place.stop, k.shape[2])]).to(q.device)
    tiles, tk = plan.keys.shape
    each = B * H * (tk + len(beside)) * 2 * D * q.element_size()
    some = max(1, ROOM // each)
    outs, seen = [], []
    for begin in range(0, tiles, some):
        own = slice(begin, begin + some)
        o, A = _some(q, k, v, G, plan, own, beside, problem.factor)
        outs.append(o)
        seen.append(A)
    maps = None if G is None else torch.cat(seen, 1).reshape(B, H, -1, G.shape[-1])[:, :, plan.back]
    if v is None:
        return None, maps
    return torch.cat(outs, 1).reshape(B, H, -1, v.shape[-1])[:, :, plan.back], maps


def _some(
    q: Tensor, k: Tensor, v: Tensor | None, G: Tensor | None, plan: Plan, own: slice, beside: Tensor, scale: float
) -> tuple[Tensor | None, Tensor | None]:
    """Output and maps of some tiles, [B * H, tiles, tq, D or R]."""
    H, count = q.shape[1], len(plan.queries[own])
    places = plan.keys[own]
    if len(beside):
        places = torch.cat([places, beside.expand(count, -1)], 1)

    def fetch(x: Tensor, at: Tensor) -> Tensor:
        return x[:, :, at.flatten()].reshape(-1, count, at.shape[1], x.shape[-1])

    mask = None
    if plan.masked:
        hidden = F.pad(plan.hidden(own), (0, len(beside)))
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))[None]
    qt, kt = fetch(q, plan.queries[own]), fetch(k, places)
    vt = None if v is None else fetch(v, places)
    if G is None:
        assert vt is not None
        return F.scaled_dot_product_attention(qt, kt, vt, attn_mask=mask, scale=scale), None
    return _captured(qt, kt, vt, fetch(G, places).repeat_interleave(H, 0), mask, scale)


def _captured(
    q: Tensor, k: Tensor, v: Tensor | None, G: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor | None, Tensor]:
    """With maps as further values, in the same way as `side_values`, but with weights for each tile."""
    side = G if v is None else torch.cat([v, G], -1)
    W = max(q.shape[-1], side.shape[-1] + -side.shape[-1] % side_values.STEP)
    side = F.pad(side, (0, W - side.shape[-1]))
    q, k = (F.pad(x, (0, W - x.shape[-1])) for x in (q, k))
    both = F.scaled_dot_product_attention(q, k, side, attn_mask=mask, scale=scale)
    D = 0 if v is None else v.shape[-1]
    maps = both[..., D : D + G.shape[-1]].to(torch.promote_types(q.dtype, torch.float32))
    return None if v is None else both[..., :D], maps


ROUTE = Route("tiles", reason, run, "small dense attentions on tiles of the grid", declines)
