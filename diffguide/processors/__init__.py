"""The methods, one file each, and the wrapper that carries them. The folder is the list."""

import importlib
import pkgutil
from typing import Any

from diffguide.errors import ParamError
from diffguide.method import Method
from diffguide.processors.steered import SteeredProcessor, build

__all__ = ["SteeredProcessor", "build", "methods", "named"]


def methods() -> dict[str, type[Method]]:
    """Every method of this folder by its name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
                found[value.name()] = value
    return found


def named(name: str) -> type[Method]:
    """The method of this name; raises ParamError with the known ones."""
    known = methods()
    if name not in known:
        raise ParamError(f"no method is called {name!r} (known: {', '.join(sorted(known))})")
    return known[name]


def __getattr__(name: str) -> Any:
    for method in methods().values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
