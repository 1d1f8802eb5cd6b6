"""Reads coloured shapes off a picture: no network and no knowledge of the prompt.

Every pixel is named after the nearest palette colour. Where a whole neighbourhood bears the same name there is a core;
cores grow back to the edge where a thing covers half a pixel, so that the mixed colours of a soft edge name nothing.
What is connected then is one thing, and its shape is the template that its mask overlaps best.

`python -m diffguide.zoo.detector --scenes 1000` measures this on pictures whose truth is known.
"""

import argparse
import io
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from diffguide.errors import ParamError
from diffguide.zoo import world

Box = tuple[float, float, float, float]
Target = tuple[str, str, Box | None]  # colour, shape, wanted box

LIMIT = 0.15  # largest distance to a palette colour, in OKLab, where black and white are 1 apart
SMALLEST_SHARE = 0.003  # least area of a thing, as a share of the canvas
GROWTH = 6  # pixels from a core to the tip of its thing
CELLS = 48  # side of the grid on which masks and templates are compared
GOOD_FIT = 0.8  # overlap with a template below which a component may be two things that touch
ABSORBED = 0.35  # a patch with this share of its border on a larger one belongs to it
IN_BOX = 0.5  # least IoU of a thing that stands in its box

NAMES = (*world.COLORS, *world.BACKGROUNDS)
PALETTE = np.array([*world.COLORS.values(), *world.BACKGROUNDS.values()], np.float32)
OBJECTS = len(world.COLORS)


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


# --- colours ---------------------------------------------------------------------------------------------------------

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    np.float32,
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    np.float32,
)
_levels = np.arange(256) / 255
_LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4).astype(np.float32)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """OKLab coordinates of sRGB values 0..255, in any shape that ends in 3; distances are perceptual."""
    linear = _LINEAR[np.clip(rgb, 0, 255).astype(np.uint8)]
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


_PALETTE_LAB = oklab(PALETTE)


def _name(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index into NAMES of every pixel's [h, w, 3] nearest colour, and the distance to it in OKLab."""
    lab = oklab(pixels).reshape(-1, 3)
    squared = (lab**2).sum(1, keepdims=True) - 2 * lab @ _PALETTE_LAB.T + (_PALETTE_LAB**2).sum(1)
    nearest = squared.argmin(1)
    distance = np.sqrt(np.maximum(np.take_along_axis(squared, nearest[:, None], 1)[:, 0], 0))
    return nearest.reshape(pixels.shape[:2]), distance.reshape(pixels.shape[:2])


def _undo(pixels: np.ndarray, style: str | None) -> np.ndarray:
    """The pixels [h, w, 3] before night or fog came over them."""
    if style == "at night":
        pixels = pixels / world.NIGHT
    elif style == "in fog":
        pixels = (pixels - world.FOG * np.array(world.FOG_COLOR, np.float32)) / (1 - world.FOG)
    return np.clip(pixels, 0, 255)


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """Weights 1 2 1 along both axes, so that noise names no pixel."""
    for axis in (0, 1):
        padding = [(int(a == axis),) * 2 for a in range(3)]
        wide = np.pad(pixels, padding, mode="edge")
        first, middle, last = (np.take(wide, range(i, i + pixels.shape[axis]), axis) for i in range(3))
        pixels = (first + last) / 4 + middle / 2
    return pixels


def _pixels(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Float pixels [h, w, 3] in 0..255, the longer side at most `world.SIDE`."""
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ParamError(
                f"picture is an array of shape {picture.shape} and type {picture.dtype}; expected [height, width, 3] "
                "of uint8: scale and round it first"
            )
        picture = Image.fromarray(picture)
    picture = picture.convert("RGB")
    longer = max(picture.size)
    if min(picture.size) < 16:
        raise ParamError(f"picture is {picture.width} x {picture.height} pixels; expected at least 16 on each side")
    if longer > world.SIDE:
        width, height = (max(1, round(n * world.SIDE / longer)) for n in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


# --- components ------------------------------------------------------------------------------------------------------


def components(labels: np.ndarray) -> np.ndarray:
    """Number the regions of equal non-zero label in [h, w], joined by edges, from 1; 0 stays 0."""
    height, width = labels.shape
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = starts.cumsum().reshape(height, width) - 1
    parent = list(range(int(runs[-1, -1]) + 1))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    joined = (labels[1:] == labels[:-1]) & (labels[1:] != 0)
    joined[:, 1:] &= ~joined[:, :-1] | starts[1:, 1:] | starts[:-1, 1:]  # one meeting of two runs is enough
    for upper, lower in zip(runs[:-1][joined].tolist(), runs[1:][joined].tolist(), strict=True):
        a, b = root(upper), root(lower)
        parent[max(a, b)] = min(a, b)
    roots = np.array([root(run) for run in range(len(parent))])
    roots[labels[starts] == 0] = -1
    found, numbers = np.unique(roots, return_inverse=True)
    if found[0] != -1:
        numbers = numbers + 1
    return numbers.reshape(-1)[runs]


def _neighbours() -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Pairs of windows of a grid: all pixels with a neighbour left, right, above or below, and those neighbours."""
    every, first, last = slice(None), slice(1, None), slice(None, -1)
    for a, b in ((first, last), (last, first)):
        yield (every, a), (every, b)
        yield (a, every), (b, every)


def _erode(labels: np.ndarray) -> np.ndarray:
    """Keep a label only where all eight neighbours bear it; beyond the canvas all bear it."""
    for axis in (0, 1):
        wide = np.pad(labels, [(int(a == axis),) * 2 for a in range(2)], mode="edge")
        before, after = (np.take(wide, range(i, i + labels.shape[axis]), axis) for i in (0, 2))
        labels = np.where((before == labels) & (after == labels), labels, 0)
    return labels


def _grow(labels: np.ndarray, allowed: Callable[[int], np.ndarray], steps: int) -> np.ndarray:
    """Let labels [h, w] spread over unlabelled pixels, one pixel a step, each where `allowed(label)` [h, w] says."""
    labels = labels.copy()
    present = [int(label) for label in np.unique(labels) if label]
    open_to = np.zeros((max(present, default=0) + 1, *labels.shape), bool)
    for label in present:
        open_to[label] = allowed(label)
    rows, columns = np.nonzero(open_to.any(0) & (labels == 0))
    height, width = labels.shape
    for _ in range(steps):
        if not len(rows):
            break
        taken = np.zeros(len(rows), labels.dtype)
        for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            label = labels[(rows + dy).clip(0, height - 1), (columns + dx).clip(0, width - 1)]
            taken = np.where((taken == 0) & (label != 0) & open_to[label, rows, columns], label, taken)
        labels[rows, columns] = taken
        if not taken.any():
            break
        rows, columns = rows[taken == 0], columns[taken == 0]
    return labels


def _absorb(ids: np.ndarray) -> np.ndarray:
    """Give patches that lie on a larger component to it: rims of a mixed colour, stains inside a thing."""
    count = int(ids.max()) + 1
    border = np.zeros((count, count), int)
    for here, there in _neighbours():
        edge = ids[here] != ids[there]
        np.add.at(border, (ids[here][edge], ids[there][edge]), 1)
    areas = np.bincount(ids.ravel(), minlength=count)
    owner = np.arange(count)
    for patch in np.argsort(areas[1:]) + 1:
        contact = border[patch].copy()
        contact[0] = 0
        host = int(contact.argmax())
        if contact[host] >= ABSORBED * border[patch].sum() > 0 and areas[patch] < ABSORBED * areas[host]:
            owner[patch] = host
    for patch in range(count):
        while owner[patch] != owner[owner[patch]]:
            owner[patch] = owner[owner[patch]]
    return owner[ids]


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask [h, w] with its holes closed."""
    outside = components(np.pad(~mask, 1, constant_values=True).astype(np.uint8))
    return (outside != outside[0, 0])[1:-1, 1:-1]


# --- shapes ----------------------------------------------------------------------------------------------------------


@lru_cache
def _solids() -> np.ndarray:
    """The templates, [shapes, CELLS, CELLS]."""
    return np.stack([world.template(shape, CELLS) for shape in world.SHAPES])


@lru_cache
def _hulls() -> np.ndarray:
    """The templates with their holes closed, [shapes, CELLS, CELLS]."""
    return np.stack([_filled(solid) for solid in _solids()])


@lru_cache
def _proportions() -> np.ndarray:
    """Width over height of every shape, [shapes]."""
    return np.array([(x1 - x0) / (y1 - y0) for x0, y0, x1, y1 in map(world.extent, world.SHAPES)])


@lru_cache(maxsize=4096)
def _outlines(width: int, height: int, line: float) -> np.ndarray:
    """The seven shapes as outlines `line` pixels wide in a box of width x height pixels, [shapes, CELLS, CELLS]."""
    drawn = []
    scale = 4 * CELLS
    for shape in world.SHAPES:
        x0, y0, x1, y1 = world.extent(shape)
        # drawn in true proportions, then stretched to the grid
        unit = scale / max(width, height)
        size = (max(1, round(width * unit)), max(1, round(height * unit)))
        contours = [
            [((x - x0) / (x1 - x0) * size[0], (y - y0) / (y1 - y0) * size[1]) for x, y in contour]
            for contour in world.CONTOURS[shape]
        ]
        mask = Image.new("L", size)
        for contour, ink in zip(contours, (255, 0), strict=False):
            ImageDraw.Draw(mask).polygon(contour, fill=ink)
        pen = world.stroke(size, contours, max(1, round(2 * line * unit)))
        inside = np.minimum(np.asarray(mask), np.asarray(pen))
        drawn.append(np.asarray(Image.fromarray(inside).resize((CELLS, CELLS), Image.Resampling.BOX)) > 127)
    return np.stack(drawn)


@lru_cache
def _moments(shape: str) -> tuple[float, float, float, float]:
    """Centre x, y and deviation x, y of a shape's area, in units of its box."""
    weights = world.template(shape, 256).astype(float)
    return _spread(weights, 1 / 256)


def _spread(weights: np.ndarray, unit: float = 1.0) -> tuple[float, float, float, float]:
    """Centre x, y and deviation x, y of weights [h, w] on pixels of side `unit`."""
    x, y = ((np.arange(n) + 0.5) * unit for n in weights.shape[::-1])
    across, down = weights.sum(0), weights.sum(1)
    total = across.sum()
    cx, cy = across @ x / total, down @ y / total
    return cx, cy, float(np.sqrt(across @ (x - cx) ** 2 / total)), float(np.sqrt(down @ (y - cy) ** 2 / total))


def _extents(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask in pixels, right and bottom exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _overlaps(mask: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """IoU of a mask [h, w], scaled to its box, with each template [shapes, CELLS, CELLS]."""
    x0, y0, x1, y1 = _extents(mask)
    crop = Image.fromarray(mask[y0:y1, x0:x1].astype(np.uint8) * 255)
    grid = np.asarray(crop.resize((CELLS, CELLS), Image.Resampling.BILINEAR)) > 127
    return (grid & templates).sum((1, 2)) / (grid | templates).sum((1, 2))


def _shape(mask: np.ndarray, line: float | None) -> tuple[str, float]:
    """The shape of a mask [h, w] and how well it fits, in 0..1; `line` is the width in pixels of a sketch's lines.

    The fit is the IoU with the template, lowered where the proportions are not the shape's: a bar is no square.
    """
    x0, y0, x1, y1 = _extents(mask)
    if line is None:
        fit = _overlaps(mask, _solids())
    else:
        # an outline has little area to overlap, so what it encloses speaks as well
        fit = (_overlaps(mask, _outlines(x1 - x0, y1 - y0, line)) + _overlaps(_filled(mask), _hulls())) / 2
    stretch = (x1 - x0) / (y1 - y0) / _proportions()
    fit = fit * np.sqrt(np.minimum(stretch, 1 / stretch))
    best = int(fit.argmax())
    return world.SHAPES[best], float(fit[best])


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The masks [h, w] into which a mask falls where it is narrow; only itself if it does not fall apart."""
    core = mask.astype(np.uint8)
    for depth in range(1, GROWTH):
        core = _erode(core)
        ids = components(core)
        areas = np.bincount(ids.ravel())[1:]
        if (areas > 4).sum() > 1:
            ids = np.where(np.isin(ids, np.flatnonzero(areas > 4) + 1), ids, 0)
            ids = _grow(ids, lambda _: mask, depth + GROWTH)
            return [ids == label for label in np.unique(ids) if label]
    return [mask]


# --- reading ---------------------------------------------------------------------------------------------------------


def _coverage(pixels: np.ndarray, ground: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """How much of every pixel [h, w, 3] is ink and how much is ground, in 0..1."""
    way = ink - ground
    return np.clip((pixels - ground) @ way / max(float(way @ way), 1e-6), 0, 1)


def _box(mask: np.ndarray, free: np.ndarray, coverage: np.ndarray, shape: str, fit: float, *, sketch: bool) -> Box:
    """The tight box of a thing in pixels.

    Sharp corners cover no pixel by half, so a thing that fits its template has the template's box at its own centre and
    spread, within two pixels of what the mask says. `free` [h, w] tells pixels of no thing.
    """
    seen = _extents(mask)
    if fit < GOOD_FIT:
        return seen
    if sketch:
        mask = _filled(mask)
    # the soft edge: pixels next to the mask that nobody else has
    soft = mask.copy()
    for here, there in _neighbours():
        soft[here] |= mask[there]
    weights = np.where(mask, np.where(mask & ~free, np.maximum(coverage, 0.5), 1), np.where(free & soft, coverage, 0))
    cx, cy, dx, dy = _spread(weights)
    ux, uy, sx, sy = _moments("circle" if sketch and shape == "ring" else shape)
    width, height = dx / sx, dy / sy
    fitted = (cx - ux * width, cy - uy * height, cx + (1 - ux) * width, cy + (1 - uy) * height)
    x0, y0, x1, y1 = (min(max(f, s - 2), s + 2) for f, s in zip(fitted, seen, strict=True))
    return x0, y0, x1, y1


def detect(picture: Image.Image | np.ndarray, style: str | None = None) -> Reading:
    """Read the things off a picture.

    `picture` is an image or an array [height, width, 3] of uint8, of any size from 16 pixels up; what is larger than
    the world's canvas is reduced to it first. `style` is one of `world.STYLES` if the picture was drawn in one: night
    and fog are undone, a sketch's things are compared with outlines. Raises `ParamError` for anything else.
    """
    if style is not None and style not in world.STYLES:
        raise ParamError(f"style = {style!r} is unknown; expected None or one of {', '.join(map(repr, world.STYLES))}")
    sketch = style == "as a sketch"
    pixels = _undo(_pixels(picture), style)
    height, width = pixels.shape[:2]
    smooth = _smooth(pixels)
    names, distance = _name(smooth)

    grounds = np.bincount(names.ravel(), minlength=len(NAMES))[OBJECTS:]
    background = int(grounds.argmax()) + OBJECTS
    ground = np.median(smooth[names == background], axis=0) if grounds.any() else PALETTE[background]

    core = _erode(np.where((names < OBJECTS) & (distance < LIMIT), names + 1, 0))
    coverages: dict[int, np.ndarray] = {}
    deep = _erode(core)  # where even a blurred line has its full colour
    for label in map(int, np.flatnonzero(np.bincount(core.ravel()))):
        if label:
            inner = deep == label
            ink = pixels[inner if inner.any() else core == label].mean(0)
            coverages[label] = _coverage(pixels, ground, ink)
    grown = _grow(core, lambda label: coverages[label] >= 0.5, GROWTH)
    ids = _absorb(components(grown))

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
        if _shape(whole, line)[1] < GOOD_FIT:
            parts = [part for part in _parts(whole) if part.sum() >= least]
            if len(parts) > 1 and min(_shape(part, line)[1] for part in parts) >= GOOD_FIT:
                pieces = parts
        for piece in pieces:
            shape, fit = _shape(piece, line)
            x0, y0, x1, y1 = _box(piece, ids == 0, coverages[label], shape, fit, sketch=sketch)
            corners = (x0 / width, y0 / height, x1 / width, y1 / height)
            left, top, right, bottom = (min(max(float(v), 0.0), 1.0) for v in corners)
            found = Found(color, shape, (left, top, right, bottom), min(max(fit * closeness, 0.0), 1.0))
            things.append((float(piece.sum()), found))
    things.sort(key=lambda pair: -pair[0])
    return Reading(NAMES[background], tuple(found for _, found in things))


# --- scores ----------------------------------------------------------------------------------------------------------


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


# --- the bar ---------------------------------------------------------------------------------------------------------


def _noise(picture: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 6, (picture.height, picture.width, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).round().astype(np.uint8))


def _jpeg(picture: Image.Image, _: random.Random) -> Image.Image:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=60)
    return Image.open(data)


def _blur(picture: Image.Image, _: random.Random) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(1.2 * picture.width / world.SIDE))


def _resample(picture: Image.Image, _: random.Random) -> Image.Image:
    small = picture.resize((round(picture.width * 0.93), round(picture.height * 0.93)), Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


DAMAGES: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "noise": _noise,  # sigma 6
    "jpeg": _jpeg,  # quality 60
    "blur": _blur,  # 1.2 pixels of the canvas
    "resample": _resample,  # 7 % smaller and back
}


@dataclass(frozen=True)
class Figures:
    """The detector's own figures.

    `found` and `extra` are shares of the objects in the truth; `milliseconds` are of one core, for one picture.
    """

    scenes: int
    found: float
    extra: float
    median_iou: float
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"{self.scenes} scenes: found {self.found:.2%}, not there {self.extra:.2%}, "
            f"median IoU {self.median_iou:.3f}, {self.milliseconds:.1f} ms a picture"
        )


def measure(
    scenes: Sequence[world.Scene],
    side: int = world.SIDE,
    damage: str | None = None,
    *,
    seed: int = 0,
    failed: Callable[[Image.Image, Reading, world.Scene], object] | None = None,
) -> Figures:
    """Draw scenes, damage the pictures in a way of DAMAGES, read them and compare; `failed` is told every mistake."""
    if damage is not None and damage not in DAMAGES:
        raise ParamError(f"damage = {damage!r} is unknown; expected None or one of {', '.join(DAMAGES)}")
    if not scenes:
        raise ParamError("there are no scenes to measure on; give at least one")
    rng = random.Random(seed)
    scores: list[Score] = []
    seconds = 0.0
    for scene in scenes:
        picture = world.render(scene, side)
        if damage is not None:
            picture = DAMAGES[damage](picture, rng)
            picture.load()
        start = time.thread_time()  # of this core, whoever else is busy
        reading = detect(picture, scene.style)
        seconds += time.thread_time() - start
        scores.append(score(reading, scene))
        if failed and (not scores[-1].complete or scores[-1].extra or reading.background != scene.background):
            failed(picture, reading, scene)
    wanted = sum(s.wanted for s in scores)
    return Figures(
        scenes=len(scores),
        found=sum(s.present for s in scores) / wanted,
        extra=sum(s.extra for s in scores) / wanted,
        median_iou=float(np.median([value for s in scores for value in s.ious if value is not None])),
        milliseconds=1000 * seconds / len(scores),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m diffguide.zoo.detector", description=(__doc__ or "").split(".")[0])
    parser.add_argument("--scenes", type=int, default=1000, help="how many scenes to draw and read (default 1000)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the scenes (default 7)")
    parser.add_argument("--side", type=int, default=world.SIDE, help="pixels on a side (default 128)")
    parser.add_argument("--damage", choices=[*DAMAGES], help="spoil the pictures first, as a model might")
    parser.add_argument("--sheet", metavar="PNG", help="save up to 40 pictures that were misread, as one sheet")
    options = parser.parse_args(arguments)
    if options.scenes < 1:
        parser.error(f"--scenes is {options.scenes}; expected at least 1")
    rng = random.Random(options.seed)
    scenes = [world.sample_scene(rng) for _ in range(options.scenes)]
    misread: list[Image.Image] = []

    def keep(picture: Image.Image, reading: Reading, scene: world.Scene) -> None:
        misread.append(overlay(picture, reading, [t.box for t in scene.things]))

    print(measure(scenes, options.side, options.damage, seed=options.seed, failed=keep))
    print(f"{len(misread)} pictures misread")
    if options.sheet and misread:
        side = misread[0].width
        sheet = Image.new("RGB", (side * min(8, len(misread)), side * -(-min(40, len(misread)) // 8)))
        for (row, column), image in zip(itertools.product(range(5), range(8)), misread, strict=False):
            sheet.paste(image, (column * side, row * side))
        sheet.save(options.sheet)


if __name__ == "__main__":
    main()
