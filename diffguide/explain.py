"""What a guided run would do, told before it: sites, passes, memory, and what is refused."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffguide import passes
from diffguide.descent import PLAIN, Thrift
from diffguide.family import Family, bare
from diffguide.footprint import gradient_memory
from diffguide.maps import Watch
from diffguide.method import Method
from diffguide.refusals import before, refusals
from diffguide.registry import sites_of
from diffguide.site import Grid, Site


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
            "combine": "its own combination in place of classifier-free guidance",
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
    touched = list(method.where(sites)) if method.asks("attend") or method.asks("block") else []
    for name, watch in method.watch(before(sites, grids, size, steps)).items():
        chosen = method.watched(watch, sites, grids)
        touched += [s for s in chosen if s not in touched]
        if method.asks("loss"):
            watched[f"{method.name()} {name}"] = (watch, chosen)
    return touched


def _short(sites: list[Site], most: int = 4) -> str:
    names = [s.name for s in sites]
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
    )
