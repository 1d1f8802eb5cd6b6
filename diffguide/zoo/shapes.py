"""Which shape a mask is: the template that it overlaps best."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from diffguide.zoo import world
from diffguide.zoo.components import components, erode, filled, grow, neighbours

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

GROWTH = 6  # pixels from a core to the tip of its thing
CELLS = 48  # side of the grid on which masks and templates are compared
GOOD_FIT = 0.8  # overlap with a template below which a component may be two things that touch


@lru_cache
def _solids() -> np.ndarray:
    """The templates, [shapes, CELLS, CELLS]."""
    return np.stack([world.template(shape, CELLS) for shape in world.SHAPES])


@lru_cache
def _hulls() -> np.ndarray:
    """The templates with their holes closed, [shapes, CELLS, CELLS]."""
    return np.stack([filled(solid) for solid in _solids()])


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


def shape_of(mask: np.ndarray, line: float | None) -> tuple[str, float]:
    """The shape of a mask [h, w] and how well it fits, in 0..1; `line` is the width in pixels of a sketch's lines.

    The fit is the IoU with the template, lowered where the proportions are not the shape's: a bar is no square.
    """
    x0, y0, x1, y1 = _extents(mask)
    if line is None:
        fit = _overlaps(mask, _solids())
    else:
        # an outline has little area to overlap, so what it encloses speaks as well
        fit = (_overlaps(mask, _outlines(x1 - x0, y1 - y0, line)) + _overlaps(filled(mask), _hulls())) / 2
    stretch = (x1 - x0) / (y1 - y0) / _proportions()
    fit = fit * np.sqrt(np.minimum(stretch, 1 / stretch))
    best = int(fit.argmax())
    return world.SHAPES[best], float(fit[best])


def parts_of(mask: np.ndarray) -> list[np.ndarray]:
    """The masks [h, w] into which a mask falls where it is narrow; only itself if it does not fall apart."""
    core = mask.astype(np.uint8)
    for depth in range(1, GROWTH):
        core = erode(core)
        ids = components(core)
        areas = np.bincount(ids.ravel())[1:]
        if (areas > 4).sum() > 1:
            ids = np.where(np.isin(ids, np.flatnonzero(areas > 4) + 1), ids, 0)
            ids = grow(ids, lambda _: mask, depth + GROWTH)
            return [ids == label for label in np.unique(ids) if label]
    return [mask]


def box_of(mask: np.ndarray, free: np.ndarray, coverage: np.ndarray, shape: str, fit: float, *, sketch: bool) -> Box:
    """The tight box of a thing in pixels.

    Sharp corners cover no pixel by half, so a thing that fits its template has the template's box at its own centre and
    spread, within two pixels of what the mask says, or a quarter of a thing too small for that. `free` [h, w] tells
    pixels of no thing.
    """
    seen = _extents(mask)
    if fit < GOOD_FIT:
        return seen
    if sketch:
        mask = filled(mask)
    # the soft edge: pixels next to the mask that nobody else has
    soft = mask.copy()
    for here, there in neighbours():
        soft[here] |= mask[there]
    weights = np.where(mask, np.where(mask & ~free, np.maximum(coverage, 0.5), 1), np.where(free & soft, coverage, 0))
    cx, cy, dx, dy = _spread(weights)
    ux, uy, sx, sy = _moments("circle" if sketch and shape == "ring" else shape)
    width, height = dx / sx, dy / sy
    fitted = (cx - ux * width, cy - uy * height, cx + (1 - ux) * width, cy + (1 - uy) * height)
    across, down = (min(2.0, (seen[side + 2] - seen[side]) / 4) for side in (0, 1))
    reaches = (across, down, across, down)
    x0, y0, x1, y1 = (min(max(f, s - r), s + r) for f, s, r in zip(fitted, seen, reaches, strict=True))
    return x0, y0, x1, y1
