"""What a bench compares: the plain pipeline and methods with their settings."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffguide.describe import needs_layout, wants_layout
from diffguide.errors import ParamError
from diffguide.layout import Layout, Region
from diffguide.method import Method
from diffguide.processors import named

PLAIN = "none"


@dataclass(frozen=True)
class Contender:
    """A method with its settings, still without the layouts; the plain pipeline has none.

    `placed` says whether it is given the layouts of the tasks.
    """

    label: str
    method: type[Method] | None
    settings: dict[str, Any]
    placed: bool = False
    peer: Callable[..., Any] | None = None  # draws in place of the pipeline under a guide, see `drawing.guided`

    def build(self, layouts: Sequence[Layout], **more: Any) -> Method | None:
        """The method for a batch, one layout for each picture; `more` settings come from the task."""
        if self.method is None:
            return None
        wants = {"layout": list(layouts)} if self.placed else {}
        return self.method(**wants, **more, **self.settings)


def contenders(methods: Sequence[str], *, layouts: bool = True) -> list[Contender]:
    """The plain pipeline, then the methods in the given order.

    The tasks' layouts go to every method that takes one; without `layouts`, where they are planned from the prompts,
    only to those that do nothing without one.

    Raises:
        ParamError: a method or setting is unknown or out of range, listed twice, or needs what a layout does not give.
    """
    if isinstance(methods, str):
        raise ParamError(f"methods = {methods!r} is one text; give a list of names")
    found = [Contender(PLAIN, None, {})]
    for text in methods:
        if text != PLAIN:
            found.append(_contender(text, layouts))
    labels = [c.label for c in found]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ParamError(f"{twice[0]} is listed twice")
    for contender in found:
        contender.build([Layout(Region("a thing", box=(0.0, 0.0, 1.0, 1.0)))])
    return found


def _contender(text: str, layouts: bool) -> Contender:
    """`NAME` or `NAME+PARAM=VALUE+...`."""
    name, *pairs = text.split("+")
    method = named(name)
    knobs = {knob.name: knob for knob in method.params()}
    settings = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in knobs:
            raise ParamError(f"{method.__name__} has no parameter {key!r} (known: {', '.join(knobs)})")
        settings[key] = knobs[key].parse(method.__name__, value)
    foreign = [field for field in _needs(method) if field != "layout"]
    if foreign:
        raise ParamError(f"{method.__name__} needs {', '.join(foreign)}, which this bench does not have")
    return Contender(text, method, settings, placed=wants_layout(method) if layouts else needs_layout(method))


def _needs(method: type[Method]) -> list[str]:
    """Fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(method) if f.default is missing and f.default_factory is missing]
