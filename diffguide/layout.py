"""What goes where: phrases with boxes or masks, as fractions of the picture, and their JSON.

A box is `(x0, y0, x1, y1)` in 0..1, y pointing down. Everything a stranger may send is checked here, by name.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    ValidationError,
    model_validator,
)

from diffguide import grid
from diffguide.errors import LayoutError
from diffguide.files import TEXT_LIMIT, check_version, explain, is_text, read_text, write_atomically
from diffguide.grid import Array, Box, Overlap, cells, rasterise_box

__all__ = ["Box", "Layout", "Overlap", "Region", "cells", "rasterise_box"]

VERSION = 1
REGIONS, BOXES = 32, 128  # most in one layout
MASK_SIDE = 4096  # pixels
SLACK = 1e-6  # of a side: arithmetic such as x + width may leave 0..1 by this much and is clipped


def _box(value: Any) -> Box:
    """Four numbers in order, or ValueError."""
    try:
        numbers = [float(v) for v in value if not isinstance(v, bool | str)]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != 4 or len(value) != 4:
        raise ValueError(f"expected four numbers (x0, y0, x1, y1), got {value!r:.60}")
    for name, number in zip(("x0", "y0", "x1", "y1"), numbers, strict=True):
        if not -SLACK <= number <= 1 + SLACK:
            raise ValueError(f"{name} = {number} is outside [0, 1]; boxes are fractions of the picture, not pixels")
    x0, y0, x1, y1 = (min(max(number, 0.0), 1.0) for number in numbers)
    if x0 >= x1:
        raise ValueError(f"x0 = {x0} is not below x1 = {x1}")
    if y0 >= y1:
        raise ValueError(f"y0 = {y0} is not below y1 = {y1}")
    return x0, y0, x1, y1


def _small(height: int, width: int) -> None:
    if not (1 <= width <= MASK_SIDE and 1 <= height <= MASK_SIDE):
        raise ValueError(f"{width} x {height} pixels; a side must have 1 to {MASK_SIDE}")


def _grey(picture: Image.Image) -> NDArray[Any]:
    """Brightness, 0 black to 1 white; modes of plain numbers stay as they are."""
    _small(picture.height, picture.width)
    if picture.mode.startswith("I;16"):
        return np.asarray(picture, dtype=np.float64) / 65535
    return np.asarray(picture) if picture.mode in ("F", "I") else np.asarray(picture.convert("L"), np.float64) / 255


def _mask(value: Any) -> Array:
    """A path, a `png:` string, a picture or an array as a read-only array [h, w] in steps of 1/255.

    The steps are those of the PNG that a mask is saved as: a reopened layout draws the very same picture.
    """
    try:
        if isinstance(value, str) and value.startswith("png:"):
            with Image.open(io.BytesIO(base64.b64decode(value[4:], validate=True)), formats=["PNG"]) as picture:
                array = _grey(picture)
        elif isinstance(value, str | Path):
            with Image.open(value) as picture:
                array = _grey(picture)
        else:
            array = _grey(value) if isinstance(value, Image.Image) else np.asarray(value)
    except UnidentifiedImageError:
        raise ValueError("cannot be read as a picture: of no known kind, or damaged") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as fault:
        raise ValueError(f"cannot be read as a picture: {fault}"[:200]) from None
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"expected a 2-D array of numbers or booleans, got shape {array.shape} of {array.dtype}")
    _small(*array.shape)
    if not (array.min() >= 0 and array.max() <= 1):
        raise ValueError(f"values reach from {array.min()} to {array.max()}; expected 0 (outside) to 1 (inside)")
    levels = np.floor(array.astype(np.float64) * 255 + 0.5)
    if not levels.any():
        raise ValueError("empty: no pixel is inside")
    mask = (levels / 255).astype(np.float32)
    mask.setflags(write=False)
    return mask


Checked = Annotated[Box, BeforeValidator(_box)]


class Region(BaseModel):
    """A phrase of the prompt and where it belongs: exactly one of `box`, `boxes` (its instances) and `mask`.

    weight: 0..10, how much this region counts beside the others; 1 is even.
    negative: what to keep out of this region.
    occurrence: which of several places of the phrase in the prompt is meant, from 0; None means all.
    A mask is 1 inside and 0 outside: a picture or its path (brightness), or an array [h, w].
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    phrase: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]
    box: Checked | None = None
    boxes: Annotated[tuple[Checked, ...], Field(min_length=1, max_length=BOXES, strict=False)] | None = None
    mask: Annotated[Any, PlainValidator(_mask)] | None = None
    weight: float = Field(1.0, ge=0, le=10)
    negative: Annotated[str, StringConstraints(max_length=10_000)] | None = None
    occurrence: Annotated[int, Field(ge=0, le=10_000)] | None = None

    def __init__(
        self,
        phrase: str,
        box: Sequence[float] | None = None,
        boxes: Sequence[Sequence[float]] | None = None,
        mask: str | Path | Image.Image | ArrayLike | None = None,
        weight: float = 1.0,
        negative: str | None = None,
        occurrence: int | None = None,
    ):
        place: dict[str, Any] = {"box": box, "boxes": boxes, "mask": mask}
        try:
            super().__init__(phrase=phrase, **place, weight=weight, negative=negative, occurrence=occurrence)
        except ValidationError as fault:
            raise LayoutError(explain(fault)) from None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [name for name in ("box", "boxes", "mask") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of box, boxes and mask, got {' and '.join(given) or 'none'}")
        return self

    @property
    def instances(self) -> tuple[Box, ...]:
        """One box per instance; for a mask its bounding box."""
        if self.mask is None:
            return (self.box,) if self.box else self.boxes or ()
        ys, xs = (np.flatnonzero(self.mask.any(axis)) for axis in (1, 0))
        h, w = self.mask.shape
        return ((float(xs[0]) / w, float(ys[0]) / h, float(xs[-1] + 1) / w, float(ys[-1] + 1) / h),)

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self if value is not None and (name, value) != ("weight", 1.0)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is at its default is left out."""
        fields = self._given()
        if self.box is not None:
            fields["box"] = list(self.box)
        if self.boxes is not None:
            fields["boxes"] = [list(box) for box in self.boxes]
        if self.mask is not None:
            png = io.BytesIO()
            Image.fromarray(np.rint(self.mask * 255).astype(np.uint8)).save(png, format="PNG")
            fields["mask"] = "png:" + base64.b64encode(png.getvalue()).decode()
        return fields

    def _key(self) -> tuple[Any, ...]:
        mask = None if self.mask is None else (self.mask.shape, self.mask.tobytes())
        return self.phrase, self.box, self.boxes, mask, self.weight, self.negative, self.occurrence

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Region) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        shown = self._given() | ({} if self.mask is None else {"mask": self.mask.shape})
        return f"Region({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


@dataclass(frozen=True, init=False)
class Layout:
    """At most 32 regions over a picture whose whole is described by `base`.

    overlap: whose a spot is where regions meet: shared evenly ("average"), or the "first" or "last" region's.
    """

    regions: tuple[Region, ...]
    base: str | None
    overlap: Overlap

    def __init__(self, *regions: Region, base: str | None = None, overlap: Overlap = "average"):
        for i, region in enumerate(regions):
            if not isinstance(region, Region):
                raise LayoutError(f"regions[{i}]: expected a Region, got {type(region).__name__}")
        if len(regions) > REGIONS:
            raise LayoutError(f"regions: {len(regions)} of them, at most {REGIONS} fit")
        if (boxes := sum(len(region.instances) for region in regions)) > BOXES:
            raise LayoutError(f"regions: {boxes} boxes in all, at most {BOXES} fit")
        if not (base is None or is_text(base, 10_000)):
            raise LayoutError(f"base: expected text of at most 10000 characters, got {base!r:.60}")
        if overlap not in get_args(Overlap):
            raise LayoutError(f"overlap: expected one of {', '.join(get_args(Overlap))}, got {overlap!r:.60}")
        for name, value in (("regions", regions), ("base", base), ("overlap", overlap)):
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        regions = "".join(f"{region!r}, " for region in self.regions)
        return f"Layout({regions}base={self.base!r}, overlap={self.overlap!r})"

    def rasterise(self, h: int, w: int) -> Array:
        """The fraction of each grid cell that each region covers: [R, h, w], 0..1."""
        return grid.rasterise(self._places(), h, w)

    def shares(self, h: int, w: int) -> Array:
        """The fraction of each grid cell that belongs to each region under the overlap rule: [R, h, w], 0..1.

        Whatever the rule, the sum over regions is what they cover together. The rule is applied inside a cell, where
        the regions truly overlap; two regions that only meet in a cell each keep their own part of it.
        """
        return grid.shares(self._places(), h, w, self.overlap)

    def _places(self) -> list[grid.Place]:
        return [region.instances if region.mask is None else region.mask for region in self.regions]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        regions = [region.to_dict() for region in self.regions]
        return {"version": VERSION, "base": self.base, "overlap": self.overlap, "regions": regions}

    def to_json(self) -> str:
        """The text `from_json` reads."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, source: str | dict[str, Any]) -> Self:
        """The layout in a JSON text or its dict; LayoutError names the field that is wrong."""
        try:
            data = json.loads(source) if isinstance(source, str) else source
        except (ValueError, RecursionError) as fault:
            raise LayoutError(f"not JSON: {fault}"[:200]) from None
        data = _fields(data, "", ("version", "base", "overlap", "regions"))
        try:
            check_version(data.pop("version", None), VERSION)
        except ValueError as fault:
            raise LayoutError(f"version: {fault}") from None
        regions = data.pop("regions", None)
        if not isinstance(regions, list | tuple):
            raise LayoutError(f"regions: expected a list, got {regions!r:.60}")
        return cls(*(_region(region, f"regions[{i}]") for i, region in enumerate(regions[: REGIONS + 1])), **data)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The layout in a JSON file of at most 16 MiB."""
        try:
            return cls.from_json(read_text(path, LayoutError))
        except LayoutError as fault:
            text = str(fault)
            raise LayoutError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON file that `load` reads, whole or not at all."""
        data = self.to_json().encode()
        if len(data) > TEXT_LIMIT:
            raise LayoutError(f"takes {len(data) / 2**20:.1f} MiB, at most {TEXT_LIMIT >> 20} fit; use smaller masks")
        write_atomically(path, lambda file: file.write(data))


def _fields(data: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise LayoutError(f"{where}{where and ': '}expected an object with {', '.join(known)}, got {data!r:.60}")
    for name in data:
        if name not in known:
            raise LayoutError(f"{where}{where and '.'}{name!s:.60}: unknown field (known: {', '.join(known)})")
    return dict(data)


def _region(data: Any, where: str) -> Region:
    """A region from a file, which may carry a mask but not name one: a stranger's layout opens no files."""
    fields = _fields(data, where, tuple(Region.model_fields))
    mask = fields.get("mask")
    if not (mask is None or (isinstance(mask, str) and mask.startswith("png:"))):
        raise LayoutError(f'{where}.mask: expected "png:" and base64, got {mask!r:.60}; Layout.save writes it so')
    if "phrase" not in fields:
        raise LayoutError(f"{where}.phrase: missing")
    try:
        return Region(**fields)
    except LayoutError as fault:
        text = str(fault)
        named = text.startswith(tuple(Region.model_fields))
        raise LayoutError(f"{where}{'.' if named else ': '}{text}") from None
