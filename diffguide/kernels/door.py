"""The door to attention: which way a call takes, and why not the others."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.errors import KernelError
from diffguide.kernels import reference
from diffguide.kernels.options import Blend, Blocks, Capture, Regions
from diffguide.kernels.problem import Problem
from diffguide.kernels.route import Route
from diffguide.kernels.routes import (
    flex,
    fused,
    lse_columns,
    merged,
    natten,
    recompute,
    sdpa,
    side_values,
    tiles,
    xformers,
)
from diffguide.kernels.windows import Window

REFERENCE = Route("reference", lambda problem: None, reference.attention, "every logit in memory, to compare with")
_EVERY = (fused, natten, flex, tiles, merged, lse_columns, sdpa, side_values, recompute, xformers)
ROUTES = {route.name: route for route in (*(module.ROUTE for module in _EVERY), REFERENCE)}
# in which they are tried; the reference is never taken unless it is named
ORDER = tuple(name for name in ROUTES if name != "reference")

_backend: ContextVar[str] = ContextVar("backend", default="auto")


@dataclass(frozen=True)
class Explanation:
    """Which route a call takes.

    Attributes:
        route: its name.
        why: what it is taken for.
        rejected: why each other route is not taken.
    """

    route: str
    why: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.route}: {self.why}", *(f"not {name}: {why}" for name, why in self.rejected.items())]
        return "\n".join(lines)


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    capture: None = None,
    regions: Regions | None = None,
    window: Window | None = None,
    blocks: Blocks | None = None,
    blend: Blend | None = None,
    backend: str = "auto",
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    capture: Capture,
    regions: Regions | None = None,
    window: Window | None = None,
    blocks: Blocks | None = None,
    blend: Blend | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    capture: Capture | None = None,
    regions: Regions | None = None,
    window: Window | None = None,
    blocks: Blocks | None = None,
    blend: Blend | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale + mask) v, and what else is asked for.

    Without options this is torch's `scaled_dot_product_attention`, bit for bit. A key is seen where mask, regions,
    window and blocks all let it be; a query that sees none gives 0.

    Args:
        q: queries [B, H, N, D].
        k: keys [B, H, M, D]; fewer heads than q's are shared by as many of its heads each.
        v: values [B, H, M, D].
        mask: additive bias, or booleans with True for "may attend", broadcastable to [B, H, N, M].
        scale: factor of the logits, D ** -0.5 if not given.
        capture: the maps to give beside the output.
        regions: who sees whom by bits, with a bias for each region.
        window: the tokens lie on a grid and see what is near.
        blocks: which blocks of keys each query sees.
        blend: the output moved towards each token's own value.
        backend: a route by name, see `explain`; `"auto"` takes the best that can.

    Returns:
        [B, H, N, D] in the dtype of `q`; with `capture` also the maps, [B, n, R] (or [B, H, n, R]) in float32, float64
        of float64. Differentiable in q, k and v.

    Raises:
        KernelError: the options do not fit the tensors or each other, or the named route cannot serve them.
    """
    problem = Problem(q, k, v, mask, scale, capture, regions, window, blocks, blend)
    problem.check()
    if _asked(backend) == "auto" and not set(problem.asked()) - {"mask"} and k.shape[1] == q.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    out, maps = _run(problem, backend)
    assert out is not None
    return out if maps is None else (out, maps)


def observe(
    q: Tensor,
    k: Tensor,
    capture: Capture,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    regions: Regions | None = None,
    window: Window | None = None,
    blocks: Blocks | None = None,
    backend: str = "auto",
) -> Tensor:
    """The maps alone, where the output of attention is not needed; arguments and errors as of `attend`."""
    problem = Problem(q, k, None, mask, scale, capture, regions, window, blocks)
    problem.check()
    _, maps = _run(problem, backend)
    assert maps is not None
    return maps


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    capture: Capture | None = None,
    regions: Regions | None = None,
    window: Window | None = None,
    blocks: Blocks | None = None,
    blend: Blend | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which route `attend` (without v: `observe`) takes for these arguments, and why not the others."""
    problem = Problem(q, k, v, mask, scale, capture, regions, window, blocks, blend)
    problem.check()
    chosen = _choose(problem, backend)
    named = "it was asked for by name; " if _asked(backend) != "auto" else ""
    rejected = {}
    for name, route in ROUTES.items():
        if name != chosen.name:
            given = problem if route.grouped else problem.with_all_heads()
            why = route.reason(given) or (route.declines(given) if name != "reference" else "only by name")
            rejected[name] = why or f"could, {chosen.name} comes first"
    return Explanation(chosen.name, named + chosen.why, rejected)


@contextlib.contextmanager
def prefer(backend: str) -> Iterator[None]:
    """Calls that leave the choice to `"auto"` take this route inside, where it can serve them."""
    if backend != "auto" and backend not in ROUTES:
        raise KernelError(f"no route is called {backend!r} (known: auto, {', '.join(ROUTES)})")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def keeps_output(
    q: Tensor, k: Tensor, v: Tensor, capture: Capture, *, mask: Tensor | None = None, scale: float | None = None
) -> bool:
    """Whether `attend` with this capture gives the output that it gives without, bit for bit."""
    return _choose(Problem(q, k, v, mask, scale, capture), "auto").exact


def _run(problem: Problem, backend: str) -> tuple[Tensor | None, Tensor | None]:
    route = _choose(problem, backend)
    whole = problem if route.grouped else problem.with_all_heads()
    blend = problem.blend
    if blend is None or route.blends:
        return route.run(whole)
    whole = problem.with_all_heads()
    v = whole.v
    assert v is not None
    if (out := _partly(whole, blend, backend)) is not None:
        return out, None
    out, maps = route.run(whole.without("blend"))
    assert out is not None
    return blend.apply(out, v), maps


def _partly(problem: Problem, blend: Blend, backend: str) -> Tensor | None:
    """The blended output where some heads give nothing but their values, which then do not attend; else None."""
    weights = blend.weights(problem.q.shape[1])
    busy = [head for head, w in enumerate(weights) if w < 1]
    if (
        problem.capture is not None
        or len(busy) == len(weights)
        or len(range(problem.q.shape[2])[blend.rows]) < problem.q.shape[2]
    ):
        return None
    v = problem.v
    assert v is not None
    out = v.clone()
    if busy:
        part = problem.of_heads(busy).without("blend")
        own, _ = _choose(part, backend).run(part)
        assert own is not None
        out[:, busy] = Blend([weights[head] for head in busy]).apply(own, v[:, busy])
    return out


def _asked(backend: str) -> str:
    return _backend.get() if backend == "auto" else backend


def _choose(problem: Problem, backend: str) -> Route:
    """The route for a problem; raises KernelError if the named one cannot serve it."""
    if backend != "auto":
        if backend not in ROUTES:
            raise KernelError(f"no route is called {backend!r} (known: auto, {', '.join(ROUTES)})")
        route = ROUTES[backend]
        if why := route.reason(problem if route.grouped else problem.with_all_heads()):
            raise KernelError(f'attention by {backend}: {why}; leave backend="auto", or ask explain() for one that can')
        return route
    whole = problem.with_all_heads()
    if problem.capture is not None and torch.compiler.is_compiling() and not recompute.ROUTE.reason(whole):
        return recompute.ROUTE  # the others ask for devices and libraries, which no compiler traces
    preferred = _backend.get()
    if preferred != "auto" and not ROUTES[preferred].reason(whole):
        return ROUTES[preferred]
    for name in ORDER:
        route = ROUTES[name]
        given = problem if route.grouped else whole
        if not route.reason(given) and not route.declines(given):
            return route
    raise KernelError(f"no route serves {', '.join(problem.asked())} together; ask explain() why")
