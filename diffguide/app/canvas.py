"""The canvas: regions drawn by hand, as a layout and back.

Its value is `{"size": [width, height], "items": [...], "base", "overlap"}`. An item is one box or one mask: `id`,
`phrase`, `box` (x0, y0, x1, y1 in 0..1), `color`, `weight`, and where there are any `mask` ("png:" and base64),
`negative`, `occurrence`, `group`. Items of one group, or hand-drawn ones of the same phrase, are the instances of one
region. Their order is that of the layout.
"""

import colorsys
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import gradio as gr
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from diffguide.app.part import Part
from diffguide.errors import DiffguideError, LayoutError
from diffguide.files import explain
from diffguide.layout import BOXES, Layout, Region

COLOURS = ("#e6194b", "#4363d8", "#f58231", "#3cb44b", "#911eb4", "#008b99", "#c71585", "#9a6324")
MASK = 2 * 2**20  # characters of one mask
Fraction = Annotated[float, Field(ge=-0.001, le=1.001)]
Side = Annotated[int, Field(ge=8, le=8192)]


class Item(BaseModel):
    """One box or mask, as the script sends it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,40}$")]
    phrase: Annotated[str, StringConstraints(max_length=300)] = ""
    box: tuple[Fraction, Fraction, Fraction, Fraction]
    color: Annotated[str, StringConstraints(pattern=r"^#[0-9a-fA-F]{6}$")] = COLOURS[0]
    weight: Annotated[float, Field(ge=0, le=10)] = 1.0
    mask: Annotated[str, StringConstraints(max_length=MASK, pattern=r"^png:[A-Za-z0-9+/=]+$")] | None = None
    negative: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    occurrence: Annotated[int, Field(ge=0, le=10_000)] | None = None
    group: Annotated[int, Field(ge=0, le=1000)] | None = None

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box
        return max(0.0, x1 - x0) * max(0.0, y1 - y0)


class Drawing(BaseModel):
    """The whole value."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[Side, Side] = (512, 512)
    items: Annotated[tuple[Item, ...], Field(max_length=BOXES)] = ()
    base: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    overlap: Literal["average", "first", "last"] = "average"


class Canvas(Part):
    """Where regions are drawn. Properties: `size` [width, height], `grids` ([h, w] each), `under` (a picture's URL)."""

    name = "canvas"
    empty = {"size": [512, 512], "items": []}

    def __init__(self, value: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(value, **{"size": [512, 512], "grids": [], "under": "", **options})

    @classmethod
    def check(cls, payload: Any) -> Drawing:
        try:
            return drawing_of(payload)
        except DiffguideError as error:
            raise gr.Error(str(error), print_exception=False) from None


def drawing_of(payload: Any) -> Drawing:
    """A checked value; raises LayoutError naming the field."""
    if isinstance(payload, Drawing):
        return payload
    if not isinstance(payload, dict):
        raise LayoutError(f"expected an object with size and items, got {payload!r:.60}")
    try:
        return Drawing(**{str(k): v for k, v in payload.items()})
    except ValidationError as fault:
        raise LayoutError(explain(fault)) from None


def layout_of(drawing: Drawing) -> Layout | None:
    """The layout that was drawn, None where there is no item.

    Raises:
        LayoutError: an item has no phrase or no area, or there are too many; items are counted from 1, as on the page.
    """
    if not drawing.items:
        return None
    groups: dict[Any, list[Item]] = {}
    for number, item in enumerate(drawing.items, 1):
        if not item.phrase.strip():
            raise LayoutError(f"region {number} has no phrase; write the words of the prompt that belong there")
        if not item.mask and item.area <= 0:
            raise LayoutError(f"region {number}, {item.phrase!r:.60}, has no area; draw it again")
        own = (item.phrase.strip(), item.weight, item.negative, item.occurrence)
        key = (number,) if item.mask else (own, item.group)
        groups.setdefault(key, []).append(item)
    return Layout(*map(_region, groups.values()), base=drawing.base, overlap=drawing.overlap)


def _region(items: list[Item]) -> Region:
    first = items[0]
    boxes = [tuple(min(max(v, 0.0), 1.0) for v in item.box) for item in items]
    place: dict[str, Any] = {"boxes": boxes} if len(items) > 1 else {"box": boxes[0]}
    if first.mask:
        place = {"mask": mask_of(first.mask)}
    return Region(first.phrase, **place, weight=first.weight, negative=first.negative, occurrence=first.occurrence)


def mask_of(text: str) -> Any:
    """The array of a mask's text, read as a layout's file is."""
    return Layout.from_json({"version": 1, "regions": [{"phrase": "mask", "mask": text}]}).regions[0].mask


def value_of(layout: Layout | None, size: Sequence[int]) -> dict[str, Any]:
    """The canvas's value for a layout; each instance of a region is an item, of the region's group."""
    value: dict[str, Any] = {"size": list(size), "items": []}
    if layout is None:
        return value
    if layout.base is not None:
        value["base"] = layout.base
    value["overlap"] = layout.overlap
    for number, region in enumerate(layout.regions):
        told = region.to_dict()
        for part, box in enumerate(region.instances):
            item = {"id": f"r{number}-{part}", "phrase": region.phrase, "box": list(box), "color": colour(number)}
            item |= {k: told[k] for k in ("mask", "negative", "occurrence") if k in told}
            value["items"].append(item | {"weight": region.weight, "group": number})
    return value


def colour(number: int) -> str:
    """The colour of a region; those beyond the list are turned around the circle of hues."""
    if number < len(COLOURS):
        return COLOURS[number]
    return "#" + "".join(f"{round(255 * c):02x}" for c in colorsys.hls_to_rgb(number * 0.381966 % 1, 0.42, 0.75))


def shortened(text: str, most: int = 40) -> str:
    """A phrase in one line of a message."""
    text = re.sub(r"\s+", " ", text).strip()
    return text if len(text) <= most else text[: most - 1] + "…"
