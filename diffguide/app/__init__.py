"""The editor: a page in the browser to draw a layout, steer, look at maps, compare, and take the recipe home."""

import importlib
from typing import Any

_HOMES = {"build": "page", "serve": "server"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for; gradio and torch take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
