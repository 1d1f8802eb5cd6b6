"""Reads coloured shapes off a picture: no network and no knowledge of the prompt.

Every pixel is named after the nearest palette colour. Where a whole neighbourhood bears the same name there is a core;
cores grow back to the edge where a thing covers half a pixel, so that the mixed colours of a soft edge name nothing.
What is connected then is one thing, and its shape is the template that its mask overlaps best.

`python -m diffguide.zoo.detector --scenes 1000` measures this on pictures whose truth is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from diffguide.errors import ParamError
from diffguide.zoo import world
from diffguide.zoo.colors import NAMES, OBJECTS, PALETTE, as_pixels, coverage_of, names_of, smoothed, undo
from diffguide.zoo.components import absorb, components, erode, grow
from diffguide.zoo.shapes import GOOD_FIT, GROWTH, Box, box_of, parts_of, shape_of

Target = tuple[str, str, Box | None]  # colour, shape, wanted box

LIMIT = 0.15  # largest distance to a palette colour, in OKLab, where black and white are 1 apart
SMALLEST_SHARE = 0.003  # least area of a thing, as a share of the canvas
IN_BOX = 0.5  # least IoU of a thing that stands in its box


@dataclass(frozen=True)
class Found:
    """A thing seen in a picture.

    `box` is (x0, y0, x1, y1) in 0..1, tight around the shape. `confidence` in 0..1 is the overlap of its mask with the
    template of its shape, times how well its colour is the palette's.
    """

    color: str
    shape: str
    box: Box
    confidence: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape


@dataclass(frozen=True)
class Reading:
    """What is in a picture; things from the largest to the smallest."""

    background: str
    things: tuple[Found, ...]


@dataclass(frozen=True)
class Score:
    """How a reading compares with what was wanted.

    `present` counts wanted things for which one of the right colour and shape was found, `centred` those of them whose
    centre lies in the wanted box, `in_box` those whose IoU with it is at least 0.5, and `extra` what was found besides.
    `ious` has an entry for every wanted thing, in order: 0 if it is missing, None if no box was wanted.
    """

    wanted: int
    present: int
    centred: int
    in_box: int
    extra: int
    ious: tuple[float | None, ...]

    @property
    def complete(self) -> bool:
        return self.present == self.wanted


def detect(picture: Image.Image | np.ndarray, style: str | None = None) -> Reading:
    """Read the things off a picture.

    `picture` is an image or an array [height, width, 3] of uint8, of any size from 16 pixels up; what is larger than
    the world's canvas is reduced to it first. `style` is one of `world.STYLES` if the picture was drawn in one: night
    and fog are undone, a sketch's things are compared with outlines. Raises `ParamError` for anything else.
    """
    if style is not None and style not in world.STYLES:
        raise ParamError(f"style = {style!r} is unknown; expected None or one of {', '.join(map(repr, world.STYLES))}")
    sketch = style == "as a sketch"
    pixels = undo(as_pixels(picture), style)
    height, width = pixels.shape[:2]
    smooth = smoothed(pixels)
    names, distance = names_of(smooth)

    grounds = np.bincount(names.ravel(), minlength=len(NAMES))[OBJECTS:]
    background = int(grounds.argmax()) + OBJECTS
    ground = np.median(smooth[names == background], axis=0) if grounds.any() else PALETTE[background]

    core = erode(np.where((names < OBJECTS) & (distance < LIMIT), names + 1, 0))
    coverages: dict[int, np.ndarray] = {}
    deep = erode(core)  # where even a blurred line has its full colour
    for label in map(int, np.flatnonzero(np.bincount(core.ravel()))):
        if label:
            inner = deep == label
            ink = pixels[inner if inner.any() else core == label].mean(0)
            coverages[label] = coverage_of(pixels, ground, ink)
    grown = grow(core, lambda label: coverages[label] >= 0.5, GROWTH)
    ids = absorb(components(grown))

    least = SMALLEST_SHARE * height * width
    line = world.OUTLINE * (height + width) / 2 if sketch else None
    things: list[tuple[float, Found]] = []
    for number in np.unique(ids):
        whole = ids == number
        if number == 0 or whole.sum() < least:
            continue
        label = int(np.bincount(core[whole], minlength=1 + OBJECTS)[1:].argmax()) + 1
        color = NAMES[label - 1]
        closeness = 1 - float(np.median(distance[whole & (core == label)])) / (2 * LIMIT)
        pieces = [whole]
        if shape_of(whole, line)[1] < GOOD_FIT:
            parts = [part for part in parts_of(whole) if part.sum() >= least]
            if len(parts) > 1 and min(shape_of(part, line)[1] for part in parts) >= GOOD_FIT:
                pieces = parts
        for piece in pieces:
            shape, fit = shape_of(piece, line)
            x0, y0, x1, y1 = box_of(piece, ids == 0, coverages[label], shape, fit, sketch=sketch)
            corners = (x0 / width, y0 / height, x1 / width, y1 / height)
            left, top, right, bottom = (min(max(float(v), 0.0), 1.0) for v in corners)
            found = Found(color, shape, (left, top, right, bottom), min(max(fit * closeness, 0.0), 1.0))
            things.append((float(piece.sum()), found))
    things.sort(key=lambda pair: -pair[0])
    return Reading(NAMES[background], tuple(found for _, found in things))


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1); 0 if either is empty."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    both = across * down
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _targets(wanted: world.Scene | Sequence[Target]) -> list[Target]:
    if isinstance(wanted, world.Scene):
        return [(t.color, t.shape, t.box) for t in wanted.things]
    return list(wanted)


def match(reading: Reading, wanted: world.Scene | Sequence[Target]) -> list[Found | None]:
    """For every wanted thing the found one that stands for it, or None.

    As many as possible are matched, each found thing to one wanted thing of its colour and shape, and among the ways to
    do so the one with the largest sum of IoU is taken; without a box the most confident.
    """
    targets = _targets(wanted)
    matched: list[Found | None] = [None] * len(targets)
    for kind in dict.fromkeys((color, shape) for color, shape, _ in targets):
        slots = [i for i, (color, shape, _) in enumerate(targets) if (color, shape) == kind]
        found = [thing for thing in reading.things if thing.kind == kind]
        # best way to fill the slots so far, for every set of things used: a dozen sets at most in a usual picture
        ways: dict[frozenset[int], tuple[float, dict[int, int]]] = {frozenset(): (0.0, {})}
        for slot in slots:
            box = targets[slot][2]
            longer = dict(ways)
            for used, (gain, pairs) in ways.items():
                for j, thing in enumerate(found):
                    if j in used:
                        continue
                    # 2 for the match itself, which no IoU outweighs
                    total = gain + 2 + (iou(thing.box, box) if box else 0.0) + 1e-3 * thing.confidence
                    if total > longer.get(used | {j}, (-1.0, {}))[0]:
                        longer[used | {j}] = total, {**pairs, slot: j}
            ways = longer
        _, best = max(ways.values(), key=lambda way: way[0])
        for slot, j in best.items():
            matched[slot] = found[j]
    return matched


def score(reading: Reading, wanted: world.Scene | Sequence[Target]) -> Score:
    """Compare a reading with a scene, or with a list of (colour, shape, box or None)."""
    targets = _targets(wanted)
    matched = match(reading, targets)
    ious: list[float | None] = []
    centred = 0
    for thing, (_, _, box) in zip(matched, targets, strict=True):
        ious.append(None if box is None else iou(thing.box, box) if thing else 0.0)
        if thing and box:
            x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
            centred += box[0] <= x <= box[2] and box[1] <= y <= box[3]
    present = sum(thing is not None for thing in matched)
    return Score(
        wanted=len(targets),
        present=present,
        centred=centred,
        in_box=sum(value is not None and value >= IN_BOX for value in ious),
        extra=len(reading.things) - present,
        ious=tuple(ious),
    )


def overlay(
    picture: Image.Image | np.ndarray, reading: Reading | None = None, boxes: Sequence[Box] | None = None
) -> Image.Image:
    """The picture at twice its size with the found things framed in black and named, and wanted boxes in magenta."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image = image.convert("RGB").resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)

    def frame(box: Box, ink: str) -> tuple[float, float]:
        x0, x1 = (v * (image.width - 1) for v in box[::2])
        y0, y1 = (v * (image.height - 1) for v in box[1::2])
        draw.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=ink)
        return x0, y0

    for box in boxes or ():
        frame(box, "magenta")
    for thing in reading.things if reading else ():
        x, y = frame(thing.box, "black")
        text = f"{thing.color} {thing.shape} {thing.confidence:.2f}"
        place = draw.textbbox((x + 1, y + 1), text)
        # a name that would leave the picture moves back in
        x, y = x + 1 - max(0.0, place[2] - image.width), y + 1 - max(0.0, place[3] - image.height)
        draw.rectangle(draw.textbbox((x, y), text), fill="white")
        draw.text((x, y), text, fill="black")
    return image


def __getattr__(name: str) -> Any:
    if name not in ("DAMAGES", "Figures", "main", "measure"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffguide.zoo import measure  # which imports this file

    return getattr(measure, name)


if __name__ == "__main__":
    from diffguide.zoo.measure import main

    main()
