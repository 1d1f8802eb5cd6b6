"""One instance of every method of the folder, with settings that act in a short run."""

import dataclasses
from typing import Any

import tiny

from diffguide.layout import Layout, Region
from diffguide.method import Method
from diffguide.processors import methods

LAYOUT = Layout(Region("red circle", box=(0.1, 0.1, 0.5, 0.6)), Region("blue square", box=(0.55, 0.4, 0.95, 0.9)))
QUICK: dict[str, dict[str, Any]] = {  # few passes, so that a run takes a blink
    "a-star": {"window": (0.0, 0.5)},
    "attention-refocusing": {"window": (0.0, 0.5)},
    "conform": {"words": ("red circle", "blue square"), "iterations": 2},
    "region-boundary": {"iterations": 2, "window": (0.0, 0.5)},
    "attend-excite": {"words": ("red circle", "square"), "iterations": 2},
    "nag": {"negative": "a green star"},
    "skip-layer": {"window": (0.0, 1.0)},  # as published none of four steps is in it
    "bacon": {"first_iterations": 2, "iterations": 1, "window": (0.0, 0.5)},
    "backward-guidance": {"iterations": 2, "window": (0.0, 0.5)},
    "cfg-zero-star": {"zero": 0.0},  # none of the steps of a model of noise can be left out
}
EVERY = [cls for _, cls in sorted(methods().items())]
STEERING = [cls for cls in EVERY if cls.neutral]  # a method without neutral settings only watches


DATA: dict[str, Any] = {"layout": LAYOUT, "weak": tiny.unet(layers_per_block=2)}  # what is not a knob


def make(cls: type[Method], **settings: Any) -> Method:
    """The method with quick settings, changed by `settings`."""
    fields = {f.name for f in dataclasses.fields(cls)}
    data = {name: value for name, value in DATA.items() if name in fields}
    return cls(**(data | QUICK.get(cls.name(), {}) | settings))
