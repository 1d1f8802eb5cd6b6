"""Why a pipeline and methods cannot be honoured together, each reason with its fix."""

from typing import Any

from torch import nn

from diffguide import caches, passes
from diffguide.descent import PLAIN, Thrift
from diffguide.errors import AttachError
from diffguide.family import OF_KIND, Family, bare, is_modular
from diffguide.method import Context, Method
from diffguide.processors.steered import check_processor
from diffguide.registry import denoisers, of_model, sites_of
from diffguide.site import Grid, Site, in_layers

WITHOUT = "leave out checkpointing=True and call disable_gradient_checkpointing() on the denoiser"


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
        acts = method.asks("attend") or method.branch == "weak"
        if (acts and not method.where(sites)) or not _watches(method, sites):
            reasons.append(f"{type(method).__name__} finds no site in this denoiser; {_why(family, method)}")
        reasons += unseen(family, method, sites)
    reasons += unfit(denoisers(pipe), methods, thrift)
    losses = any(m.asks("loss") for m in methods)
    if losses and thrift.checkpointing and not passes.can_checkpoint(model):
        reasons.append(f"{type(model).__name__} has no gradient checkpointing; leave out checkpointing=True")
    reasons += _instead(pipe, family, methods)
    seconds = [type(m).__name__ for m in methods if m.second_prompt is not None]
    if seconds and (reason := family.lacks.get("second prompt")):
        reasons.append(
            f"{seconds[0]} has a second prompt, which {type(family).__name__} has no place for: {reason}; use the "
            "pipeline's own negative_prompt"
        )
    if len(seconds) > 1:
        reasons.append(f"{' and '.join(seconds)} both have a second prompt; attach one of them")
    shifters = [type(m).__name__ for m in methods if m.asks("shift") or m.asks("combine")]
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


def _instead(pipe: Any, family: Family, methods: list[Method]) -> list[str]:
    """Why methods cannot take the place of classifier-free guidance."""
    names = [type(m).__name__ for m in methods if m.asks("combine")]
    reasons = []
    if len(names) > 1:
        reasons.append(f"{' and '.join(names)} both take the place of classifier-free guidance; attach one of them")
    if names and family.at_scheduler(pipe):
        reasons.append(
            f"{names[0]} takes the place of classifier-free guidance, whose length {type(pipe).__name__} normalises; "
            "use a method with a weak pass, such as PAG"
        )
    return reasons


def _watches(method: Method, sites: list[Site]) -> bool:
    """Whether the layers that a method watches are there; kinds of maps that are not there are told elsewhere."""
    layers = getattr(method, "layers", "")
    if not method.asks("loss") or not layers:
        return True
    kinds = {watch.kind for watch in method.watch(before(sites, {}, (), 1)).values()}
    return all(any(s.kind in (kind, "joint") and in_layers(s, layers) for s in sites) for kind in kinds)


def _why(family: Family, method: Method) -> str:
    reason = family.lacks.get("weak pass") if method.branch == "weak" else None
    if reason:
        return f"{reason}; use a method of word maps"
    layers = getattr(method, "layers", None)
    return f"layers = {layers!r} matches none: use down, mid, up, all, L7 or names" if layers else "change its kinds"


def unseen(family: Family, method: Method, sites: list[Site]) -> list[str]:
    """Why maps that a method wants to see cannot be had from this family."""
    wanted = {OF_KIND[watch.kind] for watch in method.watch(before(sites, {}, (), 1)).values()}
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
        blocks = [type(m).__name__ for m in methods if m.asks("block")]
        if blocks and caches.on(model):
            reasons.append(
                f"{', '.join(blocks)} changes whole blocks, which a cache may leave out; call disable_cache() on the "
                "denoiser first"
            )
        if losses and thrift.checkpoints(model):
            reasons += [f"{', '.join(losses)} needs gradients, {why}" for why in _misled(model)]
        if getattr(model, "_parallel_config", None) is not None:
            reasons.append("context parallelism shows each process a part of the tokens; load the denoiser without it")
    return list(dict.fromkeys(reasons))


def _misled(model: nn.Module) -> list[str]:
    """Why a block that is run again for its gradient would be another one."""
    config = getattr(model, "_cache_config", None)
    moving = passes.moving_weights(model)
    changing = moving or (None if config is None else type(config).__name__)
    other = ", or load weights another way, such as enable_model_cpu_offload()" if moving else ""
    found = [f"which {changing} and gradient checkpointing together make wrong; {WITHOUT}{other}"] if changing else []
    if why := of_model(model).checkpoints:
        found.append(f"which gradient checkpointing makes wrong: {why}; {WITHOUT}")
    return found


def before(sites: list[Site], grids: dict[Site, Grid], size: Grid, steps: int) -> Context:
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
