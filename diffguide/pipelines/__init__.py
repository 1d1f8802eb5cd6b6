"""Ready pipelines: load, attach, call; no mathematics."""

import importlib
from typing import Any

_HOMES = {
    "LayoutPipeline": "layout",
    "Picture": "run",
    "Step": "run",
    "WeakGuidance": "modular",
    "draw": "run",
    "load": "source",
}
_MODULES = ("demo", "layout", "modular", "pictures", "run", "source")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
