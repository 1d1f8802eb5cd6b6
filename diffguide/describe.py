"""The methods as data: what there is, with every knob; methods from names and values, and back."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from diffguide.errors import LayoutError, ParamError
from diffguide.layout import Layout
from diffguide.method import Method
from diffguide.params import Param
from diffguide.processors import methods, named
from diffguide.recipe import MethodSpec


def table() -> list[dict[str, Any]]:
    """Every method in plain JSON values: name, class, help, paper, mode, neutral, layout and parameters.

    `layout` is "needed", "taken" or None. `neutral` has the parameters that switch it off, with the value at which they
    do: the strength, as a rule.
    A parameter has name, type, default, low, high, choices (each None if there is none), range (the same as a text,
    empty if unbounded) and help.
    """
    return [describe(cls) for _, cls in sorted(methods().items())]


def describe(cls: type[Method]) -> dict[str, Any]:
    """One row of `table`."""
    return {
        "name": cls.name(),
        "class": cls.__name__,
        "help": (cls.__doc__ or "").strip().partition("\n")[0],
        "paper": cls.paper,
        "mode": cls.mode,
        "neutral": dict(cls.neutral),
        "layout": "needed" if needs_layout(cls) else "taken" if wants_layout(cls) else None,
        "params": [
            {
                "name": knob.name,
                "type": _type(knob),
                "default": _plain(knob.default),
                "low": knob.low,
                "high": knob.high,
                "choices": _plain(knob.choices),
                "range": knob.range,
                "help": knob.help,
            }
            for knob in cls.params()
        ],
    }


def make(name: str, params: Mapping[str, Any] | None = None, layout: Layout | None = None) -> Method:
    """A method from its kebab-case name and the values of a recipe.

    Raises ParamError for an unknown method or parameter or a value out of range, and LayoutError if the method needs a
    layout and there is none.
    """
    cls = named(name)
    values = {key: _value(cls, knob(cls, key), value) for key, value in (params or {}).items()}
    if needs_layout(cls):
        if layout is None:
            raise LayoutError(f"{name} needs a layout; pass --layout FILE or --plan, in Python layout=plan(prompt)")
        if not layout.regions:
            raise LayoutError(f"{name} needs a layout with at least one region; this one has none")
    if wants_layout(cls) and layout is not None and layout.regions:
        values["layout"] = layout
    return cls(**values)


def make_all(specs: Iterable[MethodSpec], layout: Layout | None = None) -> list[Method]:
    """The methods of a recipe."""
    return [make(spec.name, spec.params, layout) for spec in specs]


def to_recipe_params(method: Method) -> dict[str, Any]:
    """The parameters that are not at their defaults, in plain JSON values, as a recipe keeps them."""
    values = {knob.name: getattr(method, knob.name) for knob in method.params()}
    return {k.name: _plain(values[k.name]) for k in method.params() if values[k.name] != k.default}


def assignments(texts: Iterable[str], attached: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Values written as `NAME.param=VALUE`, by method and parameter; `attached` names the methods that may be meant."""
    values: dict[str, dict[str, Any]] = {name: {} for name in attached}
    for text in texts:
        target, equals, value = text.partition("=")
        name, dot, key = target.strip().partition(".")
        if not (equals and dot and name and key):
            raise ParamError(f"{text!r} is not of the form NAME.param=VALUE, such as bacon.scale=30")
        cls = named(name)
        if name not in values:
            raise ParamError(f"{text!r} sets a parameter of {name}, which is not attached; add --method {name}")
        values[name][key] = knob(cls, key).parse(name, value.strip())
    return values


def knob(cls: type[Method], name: str) -> Param:
    """The parameter of this name; raises ParamError with the known ones."""
    known = {p.name: p for p in cls.params()}
    if name not in known:
        raise ParamError(f"{cls.name()} has no parameter {name!r:.60} (known: {', '.join(known)})")
    return known[name]


def wants_layout(cls: type[Method]) -> bool:
    """Whether a method acts on a layout where there is one."""
    return "layout" in {f.name for f in dataclasses.fields(cls)} - {p.name for p in cls.params()}


def needs_layout(cls: type[Method]) -> bool:
    """Whether it does nothing without one."""
    return wants_layout(cls) and any(
        f.name == "layout" and f.default is dataclasses.MISSING for f in dataclasses.fields(cls)
    )


def _value(cls: type[Method], knob: Param, value: Any) -> Any:
    """A value of a recipe as the method wants it: lists are tuples; the method itself checks type and range."""
    value = tuple(value) if isinstance(value, list) else value
    pair = isinstance(value, tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if knob.name == "window" and not (pair and len(value) == 2):
        raise ParamError(f"{cls.name()}.window = {value!r:.60} is not a pair of numbers (start, stop), such as 0.0:0.2")
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _type(knob: Param) -> str:
    """A short name of a knob's type, in the words of its command-line form."""
    if knob.choices:
        return "choice"
    if knob.name == "window":
        return "start:stop"
    text = knob.type.__name__ if isinstance(knob.type, type) and not hasattr(knob.type, "__args__") else str(knob.type)
    words = {"int": "integer", "float": "number", "bool": "true/false", "str": "text"}
    for item in words:
        if text == f"tuple[{item}, ...]":
            return f"{words[item]},..."
    return words.get(text, text)
