"""One picture at several values of one parameter of a method."""

from collections.abc import Sequence
from typing import Any

from diffguide import describe
from diffguide.bench.knobs import ends, written
from diffguide.errors import ParamError
from diffguide.params import Param
from diffguide.processors import methods, named
from diffguide.recipe import MethodSpec, Recipe

MOST = 12  # values


def names(chosen: Sequence[str]) -> list[str]:
    """`METHOD.parameter` for those of the chosen methods that can be turned."""
    known = methods()
    return [f"{name}.{knob.name}" for name in chosen if name in known for knob in known[name].params()]


def recipes(recipe: Recipe, target: str, texts: str) -> list[tuple[str, Recipe]]:
    """The recipe at each value, with a title; without values, at both ends of the parameter and its default.

    `texts` are values in their command-line form, by commas; by semicolons where a value has commas itself.

    Raises ParamError for an unknown parameter, a value out of its range, or too many.
    """
    method, _, key = target.partition(".")
    if method not in [spec.name for spec in recipe.methods]:
        raise ParamError("choose a parameter of one of the chosen methods for the grid")
    cls = named(method)
    knob = describe.knob(cls, key)
    values = [knob.parse(method, text.strip()) for text in _parted(texts)] or _usual(knob)
    if len(values) > MOST:
        raise ParamError(f"{len(values)} values for a grid, at most {MOST} fit")
    found = []
    for value in values:
        specs = []
        for spec in recipe.methods:
            params = {**spec.params, key: list(value) if isinstance(value, tuple) else value}
            specs.append(MethodSpec(name=method, params=params) if spec.name == method else spec)
        made = describe.make_all(specs, recipe.layout)  # a value out of range is told before anything is drawn
        kept = [MethodSpec(name=m.name(), params=describe.to_recipe_params(m)) for m in made]
        found.append((f"{key} = {written(value)}", recipe.model_copy(update={"methods": tuple(kept)})))
    return found


def _parted(texts: str) -> list[str]:
    return [text for text in texts.split(";" if ";" in texts else ",") if text.strip()]


def _usual(knob: Param) -> list[Any]:
    found = ends(knob, knob.default)
    if knob.choices:
        return list(knob.choices)
    if found is None:
        raise ParamError(f"{knob.name}: write the values of the grid, by commas")
    low, high = found
    return [low, knob.default, high] if knob.default not in (low, high) else [low, high]
