"""The caches of diffusers: what they keep of a pipeline's own denoiser calls is not touched by extra ones."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

OURS = "diffguide "  # the names of our contexts begin with it

TRIED = ("FirstBlockCacheConfig", "MagCacheConfig", "TaylorSeerCacheConfig")
COUNTING = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")  # they count calls, whoever makes them


def refusals(model: nn.Module, inside: list[str]) -> list[str]:
    """Why a denoiser's cache does not go with methods, of which `inside` act in the pipeline's own pass."""
    config = getattr(model, "_cache_config", None)
    if config is None:
        return []
    name = type(config).__name__
    fix = "call disable_cache() on the denoiser first"
    if name in COUNTING:
        return [f"{name} counts every call of the denoiser, and an extra pass would shift its schedule; {fix}"]
    if name not in TRIED:
        return [f"{name} has not been tried with diffguide; {fix}, or use one of {', '.join(TRIED)}"]
    if inside:
        return [f"{', '.join(inside)} acts inside the model's own pass, parts of which {name} leaves out; {fix}"]
    return []


def on(model: nn.Module) -> bool:
    """Whether the denoiser has a cache at work."""
    return getattr(model, "_cache_config", None) is not None


@contextlib.contextmanager
def apart(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Calls of the denoiser that its cache keeps apart from the pipeline's.

    What is kept under a `name` is there again for the next calls of that name; without one nothing stays.
    """
    managers = _managers(model)
    before = [manager._context for manager in managers]
    for manager in managers:
        manager.set_context(_named(manager._context, OURS + (name or "once")))
    try:
        yield
    finally:
        for manager, context in zip(managers, before, strict=True):
            manager.set_context(context)
        if name is None:
            forget(model, "once")


def forget(model: nn.Module, name: str = "") -> None:
    """Drop what was kept of our calls whose name begins like this."""
    for manager in _managers(model):
        for key in [k for k in manager._state_cache if k.startswith(OURS + name)]:
            del manager._state_cache[key]


def _named(context: Any, name: str) -> Any:
    """The place in the denoising loop, under another name."""
    from diffusers.hooks.hooks import CacheContext

    return CacheContext(name) if context is None else replace(context, name=name)


def _managers(model: nn.Module) -> list[Any]:
    """Where the hooks of a cache keep their states, each once; hooks of several blocks share one."""
    if not on(model):
        return []
    from diffusers.hooks.hooks import StateManager

    registries = [r for m in model.modules() if (r := getattr(m, "_diffusers_hook", None)) is not None]
    hooks = [hook for registry in registries for hook in registry.hooks.values()]
    found = {id(v): v for hook in hooks for v in vars(hook).values() if isinstance(v, StateManager)}
    return list(found.values())
