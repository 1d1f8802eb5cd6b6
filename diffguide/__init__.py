"""Steer attention in diffusers pipelines, without training anything."""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# where each public name lives; methods are found in the folder of methods
_HOMES = {
    "Guide": "guide",
    "Family": "family",
    "Layout": "layout",
    "Region": "layout",
    "Recipe": "recipe",
    "plan": "planning",
    "Method": "method",
    "param": "params",
    "register_family": "registry",
    "AttachError": "errors",
    "DiffguideError": "errors",
    "FamilyError": "errors",
    "LayoutError": "errors",
    "ModelError": "errors",
    "OutputError": "errors",
    "ParamError": "errors",
    "PromptError": "errors",
    "RecipeError": "errors",
    "SearchError": "errors",
    "SteeringError": "errors",
}
_MODULES = ("errors", "kernels", "pipelines", "processors", "search", "zoo")


@functools.cache
def _methods() -> dict[str, str]:
    """The module of every method, read off the files: importing them would load torch."""
    found = {}
    for file in sorted((Path(__file__).parent / "processors").glob("*.py")):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"^@dataclass\(frozen=True\)\nclass ([A-Z]\w*)\(", text, re.MULTILINE):
            found[name] = f"processors.{file.stem}"
    return found


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for; torch and diffusers take seconds."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__all__":
        return sorted({*_HOMES, *_MODULES, *_methods()})
    home = _HOMES.get(name) or _methods().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
