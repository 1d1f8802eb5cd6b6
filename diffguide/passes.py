"""Evaluations of the denoiser beside the pipeline's own: the gradient pass, which ends early, and the weak pass."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffguide import caches
from diffguide.errors import SteeringError
from diffguide.family import Family, bare
from diffguide.maps import Maps, Seen, Watch
from diffguide.method import Method
from diffguide.processors.steered import Handler, SteeredProcessor, chain, torch_attention
from diffguide.site import Branch, Call, Grid, Site

Wishes = dict[tuple[int, str], tuple[Watch, list[Site]]]  # by number of the method and name of the wish


@dataclass
class Sight:
    """What a pass showed: the maps of each method and, if it went on to its end, what the denoiser gave."""

    maps: dict[int, Maps]
    out: Any = None


class _Enough(BaseException):
    """Every map that was asked for has been seen; unwinds the forward pass."""


@contextlib.contextmanager
def steered(handlers: dict[Site, Handler]) -> Iterator[None]:
    """Put steered processors at these sites, and the same objects back at the end."""
    originals: dict[Site, Any] = {}
    try:
        for site, handler in handlers.items():
            originals[site] = original = site.module.processor
            site.module.set_processor(SteeredProcessor(original, handler, site))  # type: ignore[operator]
        yield
    finally:
        for site, original in originals.items():
            site.module.set_processor(original)  # type: ignore[operator]


@contextlib.contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients to the inputs alone: on, whatever mode the caller is in.

    With frozen weights, compiled code left out, and torch's own attention in every module.
    """
    processors = {id(p): p for m in model.modules() if (p := getattr(m, "processor", None)) is not None}
    thawed = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for p in thawed:
        p.requires_grad_(False)
    try:
        attention = torch_attention(*processors.values())
        with eager(model), attention, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for p in thawed:
            p.requires_grad_(True)


def moving_weights(model: nn.Module) -> str | None:
    """What takes weights elsewhere between forward and backward, if anything does: its name."""
    for module in model.modules():
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}):
            if name.startswith("group_offloading"):
                return "group offload"
            if "layerwise_casting" in name:
                return "layerwise casting"
    return None


@contextlib.contextmanager
def pinned(model: nn.Module) -> Iterator[None]:
    """Saved weights as the forward had them: group offload and layerwise casting put others into the same tensor."""
    if moving_weights(model) is None:
        yield
        return
    own = {id(t) for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() if id(t) in own else t, lambda t: t):
        yield


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Leave compiled code out: handlers are new in every step, and compiled, each would be a recompilation."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext()


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has a hand in the model or one of its modules."""
    return bare(model) is not model or any(getattr(m, "_compiled_call_impl", None) for m in model.modules())


def usable(value: Any) -> Any:
    """Copies of tensors made under inference mode, which autograd cannot save."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: usable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(usable(v) for v in value)
    return value


def lent(value: Any) -> Any:
    """Lists and dicts to give away: U-Nets empty the list of a T2I-Adapter's features."""
    if type(value) is dict:
        return {k: lent(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(lent, value))
    return value


def evaluate(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward through what offload and caches have put around it, but not through hooks on the model.

    Ours included.
    """
    return bare(model).forward(*args, **kwargs)


@contextlib.contextmanager
def looking(
    model: nn.Module,
    family: Family,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wishes: Wishes,
    grids: dict[Site, Grid],
    *,
    words: int = 0,
    early: bool | Callable[[dict[int, Maps]], bool] = True,
) -> Iterator[Sight]:
    """Run the denoiser until every wish is seen; gives the maps of each method.

    Differentiate before leaving: checkpointed blocks run once more in the backward pass and must then meet the same
    processors. `early=False` runs the forward to its end, the maps are the same; a function is given the maps at the
    last site, once, and tells whether to end there.

    Raises:
        SteeringError: a site was never reached.
    """
    offloaded = moving_weights(bare(model)) == "group offload"  # it traces the order of whole passes
    seen: dict[tuple[int, str], list[Seen]] = {key: [] for key in wishes}
    pending = {site for _, sites in wishes.values() for site in sites}
    asked = done = False

    def ends_here() -> bool:
        nonlocal asked
        if asked or done or pending:
            return False
        asked = True
        ends = early(by_method(seen)) if callable(early) else early
        return ends and not offloaded

    def watch(site: Site) -> Handler:
        def handle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
            rows = {"cond": slice(None)}
            call = call_at(family, site, grids[site], (q, k, v, mask, scale), words=words, rows=rows, branch="cond")
            pending.discard(site)
            # the output is the model's own, bit for bit: where nothing moves, this pass is the pipeline's prediction
            record(call, wishes, None if done else seen, output=False)
            if ends_here():
                raise _Enough
            return call.proceed()

        return handle

    with steered({site: watch(site) for site in pending}), caches.apart(bare(model)), pinned(bare(model)):
        out = None
        with contextlib.suppress(_Enough):
            out = evaluate(model, args, kwargs)
        if pending:
            names = ", ".join(sorted(s.name for s in pending))
            raise SteeringError(
                f"no attention passed at {names}: the denoiser skipped it (a cache, or skipped layers?)"
            )
        done = True
        yield Sight(by_method(seen), out)


def can_checkpoint(model: nn.Module) -> bool:
    return bool(getattr(bare(model), "_supports_gradient_checkpointing", False))


@contextlib.contextmanager
def checkpointed(model: nn.Module, function: Callable[..., Any] | None = None) -> Iterator[None]:
    """Blocks keep only their inputs and run once more in the backward pass; afterwards all is as it was.

    `function(block, *inputs)` runs a block in place of torch's checkpointing.
    """
    model = bare(model)
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = {m: {n: vars(m)[n] for n in names if n in vars(m)} for m in model.modules()}
    model.enable_gradient_checkpointing(function)  # type: ignore[operator]
    try:
        yield
    finally:
        for module, own in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(own)


@contextlib.contextmanager
def weakened(
    family: Family, method: Method, sites: list[Site], grids: dict[Site, Grid], *, words: int, progress: float
) -> Iterator[None]:
    """The attention of a method's weak branch, in every row, at its sites."""

    def handler(site: Site, *qkv: Any) -> Tensor:
        rows = {"weak": slice(None)}
        call = call_at(family, site, grids[site], qkv, words=words, rows=rows, branch="weak", progress=progress)
        return chain([method], call)

    with steered({site: functools.partial(handler, site) for site in method.where(sites)}):
        yield


def by_method(seen: dict[tuple[int, str], list[Seen]]) -> dict[int, Maps]:
    found: dict[int, dict[str, list[Seen]]] = {}
    for (number, name), maps in seen.items():
        found.setdefault(number, {})[name] = maps
    return {number: Maps(maps) for number, maps in found.items()}


def record(
    call: Call,
    wishes: Wishes,
    seen: dict[tuple[int, str], list[Seen]] | None,
    *,
    output: bool = True,
    of: str | None = None,
) -> Tensor | None:
    """Compute the wished maps of a call; keep them unless `seen` is None (a recomputation must compute the same).

    With `of` the maps are those of a branch. Returns what attention gives, where it came with a map and is of use
    (`output`); None otherwise.
    """
    out = None
    for key, (watch, sites) in wishes.items():
        if call.site not in sites:
            continue
        columns = list(watch.columns) if watch.columns is not None else None
        wish = {"head_mean": watch.head_mean, "kind": watch.kind}
        if output and out is None and (of is None or columns is not None):  # whole maps only of the rows that matter
            out, values = call.look(columns, **wish)
            values = values if of is None else values[call.rows[of]]
        else:
            values = (call if of is None else call.of(of)).probabilities(columns, **wish)
        if seen is not None:
            seen[key].append(Seen(call.site, call.grid[-2:], frames_as_rows(call, values)))
    return out


def frames_as_rows(call: Call, values: Tensor) -> Tensor:
    """Maps [B, (H,) F * N, K] of a video, F rows for each: [B * F, (H,) N, K]."""
    if len(call.grid) < 3 or call.site.apart:
        return values
    return values.unflatten(-2, (call.grid[0], -1)).movedim(-3, 1).flatten(0, 1)


def call_at(
    family: Family,
    site: Site,
    grid: Grid,
    qkv: tuple[Any, ...],
    *,
    words: int,
    rows: dict[str, slice],
    branch: Branch,
    progress: float = 0.0,
) -> Call:
    """The call of a site from what its handler was given, after checking that its image tokens fill the grid."""
    q, k, v, mask, scale = qkv
    image, text = family.spans(site, grid, words, q.shape[2], k.shape[2])
    if len(range(q.shape[2])[image]) != math.prod(grid[-2:] if site.apart else grid):
        expected = "x".join(map(str, grid))
        raise SteeringError(f"{site.name}: {q.shape[2]} tokens do not fill the expected grid of {expected}")
    whole = max((part.stop for part in rows.values() if part.stop), default=0)
    if whole and q.shape[0] != whole:  # frames or places as rows
        times = q.shape[0] // whole
        rows = {name: slice(part.start * times, part.stop * times) for name, part in rows.items()}
    return Call(site, q, k, v, mask, scale, grid, image, text, branch, rows, progress)


def gradient(total: Tensor, z: Tensor) -> Tensor | None:
    """d total / d z in float32, None if it cannot be made finite.

    In float16 the gradient of a mean underflows: the loss is scaled by a power of two, halved as long as it overflows.
    """
    scale = 2.0**12 if z.dtype == torch.float16 else 1.0
    while True:
        last = scale <= 1
        (g,) = torch.autograd.grad(total * scale, z, retain_graph=not last)
        g = g.float() / scale
        if g.isfinite().all():
            return g
        if last:
            return None
        scale /= 2 if scale > 2 else scale
