"""What the page asks for, as a recipe, and a recipe as what fills the page again."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffguide import describe, zoo
from diffguide.app import canvas, safety
from diffguide.errors import ParamError
from diffguide.layout import Layout
from diffguide.recipe import MethodSpec, Recipe

STEPS, MOST_STEPS, MOST_PICTURES = 30, 200, 8
MOST_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class Form:
    """The page's fields, in its order. `width`, `height`: pixels, 0 for the model's own."""

    mode: str
    model: str
    prompt: str
    negative: str
    drawing: Any
    methods: Any
    scheduler: str
    steps: float
    guidance: float
    seed: float
    pictures: float
    width: float
    height: float

    def recipe(self, device: str | None, dtype: str) -> Recipe:
        """The recipe, its methods made once to see that they can be.

        Raises:
            DiffguideError: a field is wrong; the message names it.
        """
        layout = canvas.layout_of(canvas.drawing_of(self.drawing))
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompt or "",
            "negative_prompt": self.negative or None,
            "layout": layout,
            "methods": checked(self.methods, layout),
            "scheduler": self.scheduler or None,
            "steps": whole("steps", self.steps, 1, MOST_STEPS),
            "guidance_scale": number("guidance scale", self.guidance),
            "seed": whole("seed", self.seed, 0, 2**53),  # beyond it a browser rounds
            "num_images": whole("pictures", self.pictures, 1, MOST_PICTURES),
            "width": whole("width", self.width or 0, 0, 8192) or None,
            "height": whole("height", self.height or 0, 0, 8192) or None,
            "dtype": dtype,
            "device": device,
        }
        return served(Recipe(**fields), device, dtype)


NAMES = tuple(field.name for field in dataclasses.fields(Form))


def checked(specs: Sequence[MethodSpec], layout: Layout | None) -> list[MethodSpec]:
    """The methods as a recipe keeps them; raises what making them raises."""
    safety.check_texts(specs)
    return [
        MethodSpec(name=spec.name, params=describe.to_recipe_params(describe.make(spec.name, spec.params, layout)))
        for spec in specs
    ]


def served(recipe: Recipe, device: str | None, dtype: str) -> Recipe:
    """A recipe as this editor draws it: on its device, within its limits, and opening no file.

    Raises ParamError for what is beyond them.
    """
    safety.check_texts(recipe.methods)
    if recipe.steps > MOST_STEPS or recipe.num_images > MOST_PICTURES:
        raise ParamError(
            f"steps = {recipe.steps}, pictures = {recipe.num_images}: an editor draws at most {MOST_STEPS} steps and "
            f"{MOST_PICTURES} pictures at once; use diffguide run"
        )
    if (recipe.width or 0) * (recipe.height or 0) > MOST_PIXELS or max(recipe.width or 0, recipe.height or 0) > 4096:
        raise ParamError(
            f"{recipe.width} x {recipe.height} pixels: an editor draws at most 2048 x 2048; use diffguide run"
        )
    return recipe.model_copy(update={"device": device, "dtype": dtype, "versions": {}})


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**63:
        raise ParamError(f"{name}: expected a number, got {value!r:.60}")
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in a range."""
    found = number(name, value)
    if found != int(found) or not low <= found <= high:
        raise ParamError(f"{name} = {found:g} is not a whole number from {low} to {high}")
    return int(found)


def guidance_of(model: str) -> float:
    """The scale of classifier-free guidance at which a model is usually drawn with."""
    return zoo.GUIDANCE_SCALE if model in zoo.MODELS else 7.5


def mode_of(recipe: Recipe) -> str:
    """The mode in which a recipe's methods are to be found: that of the first one, or the first of all."""
    modes = {row["name"]: row["mode"] for row in describe.table()}
    return next((modes[spec.name] for spec in recipe.methods if spec.name in modes), "generate")


def fields_of(recipe: Recipe, size: tuple[int, int]) -> dict[str, Any]:
    """The values of the form's fields; `size` is the canvas's where the recipe leaves it to the model."""
    box = (recipe.width or size[0], recipe.height or size[1])
    return {
        "mode": mode_of(recipe),
        "model": recipe.model,
        "prompt": recipe.prompt,
        "negative": recipe.negative_prompt or "",
        "drawing": canvas.value_of(recipe.layout, box),
        "methods": {"methods": [spec.model_dump() for spec in recipe.methods]},
        "scheduler": recipe.scheduler or "",
        "steps": recipe.steps,
        "guidance": recipe.guidance_scale,
        "seed": recipe.seed + recipe.index,
        "pictures": 1,
        "width": recipe.width or 0,
        "height": recipe.height or 0,
    }
