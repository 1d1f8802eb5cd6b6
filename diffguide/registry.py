"""The families that are known, and which of them a denoiser or a pipeline belongs to.

The folder `families` is the list: each of its files defines one subclass of `Family`.
"""

import importlib
import pkgutil
from typing import Any

from torch import nn

from diffguide import versions
from diffguide.errors import FamilyError
from diffguide.family import Family, bare
from diffguide.site import Site, numbered

_registered: list[Family] = []


def register_family(family: type[Family]) -> type[Family]:
    """Make a family of your own known; may be used as a decorator. It is asked before those that come with diffguide.

    Raises:
        FamilyError: it is no complete subclass of `Family`, or names no denoiser.
    """
    missing = sorted(getattr(family, "__abstractmethods__", ()))
    if not (isinstance(family, type) and issubclass(family, Family)) or missing or not family.models:
        wants = f"lacks {', '.join(missing)}" if missing else "must subclass Family and name its `models`"
        raise FamilyError(f"{getattr(family, '__name__', family)!s} {wants}")
    _registered.insert(0, family())
    return family


def refused() -> dict[str, str]:
    """Denoisers that are known not to work, with the reason."""
    return {name: reason for module in _modules() for name, reason in getattr(module, "REFUSED", {}).items()}


def _modules() -> list[Any]:
    package = importlib.import_module("diffguide.families")
    return [importlib.import_module(f"{package.__name__}.{i.name}") for i in pkgutil.iter_modules(package.__path__)]


def families() -> list[Family]:
    """One instance of every registered family and of every one in the folder."""
    found = list(_registered)
    for module in _modules():
        classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Family)]
        found += [c() for c in classes if c.__module__ == module.__name__]
    return found


def of_model(model: nn.Module) -> Family:
    """The family of a denoiser; raises FamilyError naming the known ones."""
    known = families()
    names = {c.__name__ for c in type(bare(model)).__mro__}
    for name in names & refused().keys():
        raise FamilyError(f"{name} cannot be steered: {refused()[name]}")
    for family in known:
        if names & set(family.models):
            return family
    listed = ", ".join(sorted({type(f).__module__.rpartition(".")[2] for f in known}))
    raise FamilyError(
        f"no family describes {type(bare(model)).__name__} (known: {listed}); describe it in a file of yours and call "
        "diffguide.register_family"
    )


def sites_of(family: Family, model: nn.Module) -> list[Site]:
    """The attention modules of a denoiser.

    Raises FamilyError where they are not where this release of diffguide knows them, as after a change in diffusers.
    """
    kind = type(bare(model)).__name__
    try:
        sites = family.sites(model)
    except (AttributeError, KeyError, IndexError) as error:
        raise FamilyError(f"{kind} is built otherwise than expected ({error}); {_versions()}") from error
    lost = [s.name for s in sites if not hasattr(s.module, "processor") or not hasattr(s.module, "set_processor")]
    if lost or not sites:
        what = f"{lost[0]} has no processor that can be exchanged" if lost else "it has no attention modules"
        raise FamilyError(f"{kind} is built otherwise than expected ({what}); {_versions()}")
    return numbered(sites)


def _versions() -> str:
    return versions.strange("diffusers") or (
        f"diffusers {versions.installed('diffusers')} should do: report this, with the pipeline's class and config"
    )


DENOISERS = ("unet", "transformer", "transformer_2")  # some pipelines have one for the first steps, one for the last


def denoisers(pipe: Any) -> list[nn.Module]:
    """The denoisers of a pipeline, as it holds them."""
    found = (getattr(pipe, attribute, None) for attribute in DENOISERS)
    return [model for model in found if isinstance(model, nn.Module)]


def of_pipe(pipe: Any) -> tuple[Family, str]:
    """The family of a pipeline and the attribute that holds its (first) denoiser."""
    for attribute in DENOISERS:
        model = getattr(pipe, attribute, None)
        if isinstance(model, nn.Module):
            return of_model(model), attribute
    if isinstance(pipe, nn.Module):
        raise FamilyError(f"{type(pipe).__name__} is a model; pass the pipeline that it is part of")
    raise FamilyError(
        f"{type(pipe).__name__} has no denoiser (looked for {', '.join(DENOISERS)}); pass a diffusers pipeline"
    )
