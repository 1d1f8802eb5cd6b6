"""What a guided run would do, told before it: sites, passes, memory, and what is refused."""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffguide import caches, passes
from diffguide.descent import Thrift
from diffguide.errors import AttachError
from diffguide.family import OF_KIND, Family, bare, denoisers, is_modular, of_model, sites_of
from diffguide.maps import Watch
from diffguide.method import Context, Method
from diffguide.processors.steered import check_processor
from diffguide.report import MIB
from diffguide.site import Grid, Site, in_layers

PLAIN = Thrift()
WITHOUT = "leave out checkpointing=True and call disable_gradient_checkpointing() on the denoiser"


@dataclass
class Plan:
    """The answer of `Guide.explain`.

    Attributes:
        lines: one fact each.
        sites: names of the attention modules that each method touches.
        memory: MiB that one gradient pass keeps for its backward, for one picture; None if no pass is needed, or if
            the denoiser is offloaded.
        refusals: why the guide would not attach, each with the fix; empty if it would.
        notes: what will work, but not as one may expect.
    """

    lines: list[str] = field(default_factory=list)
    sites: dict[str, list[str]] = field(default_factory=dict)
    memory: float | None = None
    refusals: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = [*self.lines, *(f"note: {n}" for n in self.notes), *(f"refused: {r}" for r in self.refusals)]
        return "\n".join(told)


def refusals(pipe: Any, family: Family, model: nn.Module, methods: list[Method], thrift: Thrift = PLAIN) -> list[str]:
    """Why these methods cannot be attached, each with the fix."""
    reasons = family.refusals(pipe)
    sites = sites_of(family, model)
    for site in sites:
        try:
            check_processor(site)
        except AttachError as error:
            reasons.append(str(error))
            break
    for method in methods:
        if (method.asks("attend") and not method.where(sites)) or not _watches(method, sites):
            reasons.append(f"{type(method).__name__} finds no site in this denoiser; {_why(family, method)}")
        reasons += unseen(family, method, sites)
    reasons += unfit(denoisers(pipe), methods, thrift)
    losses = any(m.asks("loss") for m in methods)
    if losses and thrift.checkpointing and not passes.can_checkpoint(model):
        reasons.append(f"{type(model).__name__} has no gradient checkpointing; leave out checkpointing=True")
    shifters = [type(m).__name__ for m in methods if m.asks("shift")]
    if shifters and is_modular(pipe):
        guider = pipe.guider
        if type(guider).__name__ != "ClassifierFreeGuidance" or guider.guidance_rescale:
            reasons.append(
                f"{', '.join(shifters)} adds a term that {type(guider).__name__} would change; give the pipeline "
                "ClassifierFreeGuidance without guidance_rescale, or pipelines.WeakGuidance in place of a guide"
            )
    if not hasattr(pipe.scheduler, "step"):
        reasons.append(f"{type(pipe.scheduler).__name__} has no step function; use a scheduler of diffusers")
    return reasons


def _watches(method: Method, sites: list[Site]) -> bool:
    """Whether the layers that a method watches are there; kinds of maps that are not there are told elsewhere."""
    layers = getattr(method, "layers", "")
    if not method.asks("loss") or not layers:
        return True
    kinds = {watch.kind for watch in method.watch(_before(sites, {}, (), 1)).values()}
    return all(any(s.kind in (kind, "joint") and in_layers(s, layers) for s in sites) for kind in kinds)


def _why(family: Family, method: Method) -> str:
    reason = family.lacks.get("weak pass") if method.branch == "weak" else None
    if reason:
        return f"{reason}; use a method of word maps"
    layers = getattr(method, "layers", None)
    return f"layers = {layers!r} matches none: use down, mid, up, all or module names" if layers else "change its kinds"


def unseen(family: Family, method: Method, sites: list[Site]) -> list[str]:
    """Why maps that a method wants to see cannot be had from this family."""
    wanted = {OF_KIND[watch.kind] for watch in method.watch(_before(sites, {}, (), 1)).values()}
    return [
        f"{type(method).__name__} wants {maps}, which {type(family).__name__} has not: {family.lacks[maps]}; choose "
        "settings without them (Bacon: align=0) or a method of words alone"
        for maps in sorted(wanted & family.lacks.keys())
    ]


def unfit(models: list[nn.Module], methods: list[Method], thrift: Thrift = PLAIN) -> list[str]:
    """Why the state of these denoisers does not go with the methods, each with the fix."""
    reasons = []
    inside = [type(m).__name__ for m in methods if m.inside]
    losses = [type(m).__name__ for m in methods if m.asks("loss")]
    for model in map(bare, models):
        reasons += caches.refusals(model, inside)
        if losses and thrift.checkpoints(model):
            reasons += [f"{', '.join(losses)} needs gradients, {why}; {WITHOUT}" for why in _misled(model)]
        if getattr(model, "_parallel_config", None) is not None:
            reasons.append("context parallelism shows each process a part of the tokens; load the denoiser without it")
    return list(dict.fromkeys(reasons))


def _misled(model: nn.Module) -> list[str]:
    """Why a block that is run again for its gradient would be another one."""
    config = getattr(model, "_cache_config", None)
    changing = passes.moving_weights(model) or (None if config is None else type(config).__name__)
    found = [f"which {changing} and gradient checkpointing together make wrong"] if changing else []
    if why := of_model(model).checkpoints:
        found.append(f"which gradient checkpointing makes wrong: {why}")
    return found


def explain(
    pipe: Any,
    family: Family,
    model: nn.Module,
    methods: tuple[Method, ...],
    steps: int,
    height: int | None,
    width: int | None,
    thrift: Thrift = PLAIN,
) -> Plan:
    """See `Guide.explain`."""
    factor = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)
    *frames, h, w = family.example_size(model)
    size = (*frames, height // factor if height else h, width // factor if width else w)
    plan = Plan()
    sites = sites_of(family, model)
    grids = {site: family.grid(site, size) for site in sites}
    kinds = ", ".join(
        f"{sum(s.kind == k for s in sites)} {k}" for k in ("self", "cross", "joint") if k in {s.kind for s in sites}
    )
    plan.lines.append(
        f"{type(pipe).__name__} with {type(model).__name__}: {len(sites)} attention modules ({kinds}), "
        f"latents {'x'.join(map(str, size))}, {type(pipe.scheduler).__name__}"
    )
    active = [m for m in methods if not m.inert]
    watched: dict[str, tuple[Watch, list[Site]]] = {}
    for method in methods:
        name = type(method).__name__
        if method.inert:
            plan.lines.append(f"{name}: neutral settings, does nothing")
            continue
        touched = _touched(method, sites, grids, size, steps, watched)
        plan.sites[method.name()] = [s.name for s in touched]
        acting = sum(method.acts_at(i, steps) for i in range(steps))
        verbs = {
            "loss": "a gradient pass, repeated as the loss asks",
            "shift": "a weak pass" if method.branch == "weak" else "a term",
            "attend": "attention changed in the model's own pass" if method.branch != "weak" else "",
            "observe": "maps read from the model's own pass",
            "edit": "latents edited after the step",
        }
        does = [text for verb, text in verbs.items() if text and method.asks(verb)]
        plan.lines.append(f"{name}: {acting} of {steps} steps, {' and '.join(does)}; sites {_short(touched)}")
    if watched and (moved := _moved(bare(model))):
        plan.lines.append(f"gradient pass: its memory is not estimated under {moved}")
    elif watched:
        plan.memory = gradient_memory(family, model, size, watched, grids, thrift)
        plan.lines.append(f"gradient pass: about {plan.memory:.0f} MiB a picture on top of the weights")
    plan.refusals = refusals(pipe, family, model, active, thrift)
    plan.notes = notes(pipe, model, active)
    return plan


def notes(pipe: Any, model: nn.Module, methods: list[Method]) -> list[str]:
    """What works, but not as one may expect."""
    found = []
    inside = [m for m in methods if m.inside]
    if inside and passes.is_compiled(model):
        names = ", ".join(type(m).__name__ for m in inside)
        found.append(f"{names} acts inside the model's own pass, which then runs without torch.compile")
    if any(m.asks("loss") for m in methods):
        if "Inpaint" in type(pipe).__name__ and model.config.in_channels == model.config.out_channels:  # type: ignore[union-attr]
            found.append(
                "this inpainting pipeline restores everything outside the mask after each step; moves last inside it"
            )
        if passes.is_compiled(model):
            found.append("gradient passes run without torch.compile")
        if any(hasattr(m, "_hf_hook") and getattr(m._hf_hook, "offload", False) for m in model.modules()):
            found.append(
                "under sequential offload a gradient pass keeps the streamed weights: the memory saving is lost"
            )
    return found


def _moved(model: nn.Module) -> str | None:
    """What moves weights when they are needed, and would move them among tensors without memory, too."""
    return passes.moving_weights(model) or ("offload" if any(hasattr(m, "_hf_hook") for m in model.modules()) else None)


def _touched(
    method: Method,
    sites: list[Site],
    grids: dict[Site, Grid],
    size: Grid,
    steps: int,
    watched: dict[str, tuple[Watch, list[Site]]],
) -> list[Site]:
    touched = list(method.where(sites)) if method.asks("attend") else []
    for name, watch in method.watch(_before(sites, grids, size, steps)).items():
        chosen = method.watched(watch, sites, grids)
        touched += [s for s in chosen if s not in touched]
        if method.asks("loss"):
            watched[f"{method.name()} {name}"] = (watch, chosen)
    return touched


def _before(sites: list[Site], grids: dict[Site, Grid], size: Grid, steps: int) -> Context:
    """What is known before a run."""
    return Context(
        prompts=[None],
        find=lambda b, phrase, occurrence=None: [1],
        content=lambda b: [1],
        step=0,
        steps=steps,
        sigma=1.0,
        sites=sites,
        grids=grids,
        size=size,
        pictures=[],
    )


def _short(sites: list[Site], most: int = 4) -> str:
    names = [s.name for s in sites]
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )


def gradient_memory(
    family: Family,
    model: nn.Module,
    size: Grid,
    watched: dict[str, tuple[Watch, list[Site]]],
    grids: dict[Site, Grid],
    thrift: Thrift = PLAIN,
) -> float:
    """MiB that a gradient pass saves for its backward, for one picture, counted on tensors without memory.

    With nothing watched, that of a whole forward. Weights may be on any device, the meta device among them.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    saved = _Storages()
    largest = 0  # of the blocks that are run once more

    def counted(block: Callable[..., Any], *inputs: Any) -> Any:
        nonlocal largest
        for t in inputs:
            if isinstance(t, Tensor):
                saved.keep(t)
        inside = _Storages()
        try:
            with torch.autograd.graph.saved_tensors_hooks(inside.keep, lambda t: t):
                return block(*inputs)
        finally:
            largest = max(largest, inside.total(besides=free | saved.held.keys()))

    wishes = {(i, name): wish for i, (name, wish) in enumerate(watched.items())}
    blocks = passes.checkpointed(model, counted) if thrift.checkpoints(model) else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, passes.differentiable(model), blocks:
        weights = [fake.from_tensor(p) for p in model.parameters()]  # views of them are saved, too
        free = {w.untyped_storage()._cdata for w in weights}
        args, kwargs = family.example(model, size)
        z = family.argument(args, kwargs).clone().requires_grad_()
        args, kwargs = family.with_argument(args, kwargs, z)
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda t: t),
            _Fused(),
            passes.looking(model, family, args, kwargs, wishes, grids, words=family.words(args, kwargs)),
        ):
            return (saved.total(besides=free) + largest) / MIB


class _Storages:
    """What is kept for a backward pass, each storage once; held, so that no address comes twice."""

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}

    def keep(self, t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            self.held[storage._cdata] = storage
        return t

    def total(self, besides: Collection[int]) -> int:
        """Bytes, those at other addresses left out."""
        return sum(s.nbytes() for address, s in self.held.items() if address not in besides)


class _Fused(TorchFunctionMode):
    """Attention keeps what a fused kernel keeps, whatever kernel torch would take for tensors without memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        return _Kept.apply(*(given.get(name) for name in names))


class _Kept(torch.autograd.Function):
    """Queries, keys, values, mask, output and a float32 for each row are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, mask, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("counted, never run")
