"""The embedded world: pictures that the project draws itself, so that a prompt has a known truth.

A `Scene` is at most four coloured shapes on a plain background. It can be drawn at any size, described in a small
grammar, and written as JSON. Canvas, palette, shapes and grammar are fixed: scores are compared over time. Lengths are
fractions of the picture's side, y points down.
"""

import json
import math
import random
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 128
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 220),
    "yellow": (235, 210, 50),
    "purple": (140, 60, 190),
    "orange": (240, 140, 40),
    "cyan": (60, 200, 215),
    "pink": (240, 130, 180),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (150, 150, 150), "black": (20, 20, 20), "beige": (222, 205, 170)}
STYLES = ("at night", "in fog", "as a sketch")
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
SMALLEST, LARGEST = 0.10, 0.25  # radius
SMALL, BIG = 0.14, 0.20  # a radius below is "small", above is "big"
CLEARANCE = 1.08  # least centre distance, in sums of radii
OUTLINE = 0.06  # width of a sketched line
RELATION_GAP = 0.25  # least difference of centres along the axis of a relation
NIGHT = 0.35
FOG, FOG_COLOR = 0.55, (200, 200, 200)


def _arc(cx: float, cy: float, radius: float, start: float, stop: float, points: int = 72) -> list[tuple[float, float]]:
    """Points on a circle from angle `start` to `stop` in radians, clockwise on a canvas whose y points down."""
    turns = [start + (stop - start) * i / points for i in range(points + 1)]
    return [(cx + radius * math.cos(a), cy + radius * math.sin(a)) for a in turns]


def _star() -> list[tuple[float, float]]:
    corners = [(1.1 if i % 2 == 0 else 0.45, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
    return [(radius * math.cos(a), radius * math.sin(a)) for radius, a in corners]


def _heart() -> list[tuple[float, float]]:
    """Two lobes of radius 0.52, joined to the point (0, 1) by their outer tangents; 2 wide."""
    lobe, x, y = 0.52, 0.48, -0.36
    # the tangent from (0, 1) touches the right lobe where the radius stands at `touch` from the x axis
    away = math.atan2(1 - y, -x)
    touch = away - math.acos(lobe / math.hypot(x, 1 - y))
    cleft = math.acos(-x / lobe)  # where the lobe meets x = 0, above its centre
    right = _arc(x, y, lobe, -cleft, touch)
    return [*right, (0.0, 1.0), *[(-px, py) for px, py in reversed(right)]]


_BAR = 0.38
# every shape as closed contours inside the unit circle: the outline first, then holes
CONTOURS: dict[str, list[list[tuple[float, float]]]] = {
    "circle": [_arc(0, 0, 1, 0, 2 * math.pi)],
    "square": [[(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]],
    "triangle": [[(0, -1), (1, 0.85), (-1, 0.85)]],
    "star": [_star()],
    "cross": [
        [(-_BAR, -1), (_BAR, -1), (_BAR, -_BAR), (1, -_BAR), (1, _BAR), (_BAR, _BAR)]
        + [(_BAR, 1), (-_BAR, 1), (-_BAR, _BAR), (-1, _BAR), (-1, -_BAR), (-_BAR, -_BAR)]
    ],
    "ring": [_arc(0, 0, 1, 0, 2 * math.pi), _arc(0, 0, 0.55, 0, 2 * math.pi)],
    "heart": [_heart()],
}
SHAPES = tuple(CONTOURS)


def extent(shape: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a shape of radius 1 around the origin."""
    xs, ys = zip(*CONTOURS[shape][0], strict=True)
    return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Thing:
    """One coloured shape: radius `r` around (`cx`, `cy`)."""

    color: str
    shape: str
    cx: float
    cy: float
    r: float

    @property
    def kind(self) -> tuple[str, str]:
        return self.color, self.shape

    @property
    def size(self) -> str | None:
        return "small" if self.r < SMALL else "big" if self.r > BIG else None

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The tight box (x0, y0, x1, y1)."""
        x0, y0, x1, y1 = extent(self.shape)
        return self.cx + self.r * x0, self.cy + self.r * y0, self.cx + self.r * x1, self.cy + self.r * y1

    @classmethod
    def in_box(cls, color: str, shape: str, box: tuple[float, float, float, float]) -> "Thing":
        """The thing whose tight box has this left, top and width."""
        x0, y0, x1, _ = extent(shape)
        r = (box[2] - box[0]) / (x1 - x0)
        return cls(color, shape, box[0] - r * x0, box[1] - r * y0, r)


@dataclass(frozen=True)
class Scene:
    """Up to four things on a background, perhaps in a style."""

    background: str
    things: tuple[Thing, ...]
    style: str | None = None

    def to_dict(self) -> dict[str, Any]:
        objects = [
            {"color": t.color, "shape": t.shape, "size": t.size, "box": [round(v, 4) for v in t.box]}
            for t in self.things
        ]
        return {"background": self.background, "style": self.style, "objects": objects}

    @classmethod
    def from_dict(cls, scene: dict[str, Any]) -> "Scene":
        things = tuple(Thing.in_box(o["color"], o["shape"], tuple(o["box"])) for o in scene["objects"])
        return cls(scene["background"], things, scene.get("style"))

    @property
    def held_out(self) -> bool:
        """Kept from training: one in sixteen of the combinations of two or more kinds, chosen by a checksum."""
        kinds = json.dumps(sorted(t.kind for t in self.things))
        return len(self.things) > 1 and zlib.crc32(kinds.encode()) % 16 == 0


def sample_scene(rng: random.Random, *, count: int | None = None, styled: float = 0.15) -> Scene:
    """Draw a scene from the world's distribution.

    `count` fixes the number of things (1 to 4); `styled` is the probability of a style.
    """
    n = count or rng.choices((1, 2, 3, 4), (0.22, 0.36, 0.27, 0.15))[0]
    repeat = n if n > 1 and rng.random() < 0.25 else 1  # a repeated kind: "three blue stars"
    if repeat > 2 and rng.random() < 0.3:
        repeat = 2
    kinds = [(rng.choice(tuple(COLORS)), rng.choice(SHAPES)) for _ in range(n - repeat + 1)]
    kinds = [kinds[0]] * (repeat - 1) + kinds
    things = _place(kinds, rng)
    style = rng.choice(STYLES) if rng.random() < styled else None
    return Scene(rng.choice(tuple(BACKGROUNDS)), tuple(rng.sample(things, n)), style)


def _place(kinds: list[tuple[str, str]], rng: random.Random) -> list[Thing]:
    """Put things of these kinds where none overlaps another or leaves the canvas."""
    while True:
        things: list[Thing] = []
        for color, shape in kinds:
            for _ in range(40):
                r = rng.uniform(SMALLEST, LARGEST)
                x0, y0, x1, y1 = (r * e for e in extent(shape))
                thing = Thing(color, shape, rng.uniform(0.01 - x0, 0.99 - x1), rng.uniform(0.01 - y0, 0.99 - y1), r)
                if all(apart(thing, other) for other in things):
                    things.append(thing)
                    break
        if len(things) == len(kinds):
            return things


def apart(a: Thing, b: Thing) -> bool:
    """Whether two things keep the world's distance."""
    return math.hypot(a.cx - b.cx, a.cy - b.cy) >= CLEARANCE * (a.r + b.r)


def render(scene: Scene, side: int = SIDE, supersample: int = 4) -> Image.Image:
    """Draw a scene as an RGB picture of `side` x `side` pixels."""
    scale = side * supersample
    ground = BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (scale, scale), ground)
    for thing in scene.things:
        mask = Image.new("L", picture.size)
        _fill(mask, thing, scale, outline=scene.style == "as a sketch")
        picture.paste(COLORS[thing.color], mask=mask)
    picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return apply_style(picture, scene.style)


def _fill(mask: Image.Image, thing: Thing, scale: float, *, outline: bool = False) -> None:
    """Set the thing's pixels of an "L" mask to 255, or, for a sketch, those within a line's width of its edge."""
    contours = [
        [((thing.cx + thing.r * x) * scale, (thing.cy + thing.r * y) * scale) for x, y in contour]
        for contour in CONTOURS[thing.shape]
    ]
    draw = ImageDraw.Draw(mask)
    for contour, ink in zip(contours, (255, 0), strict=False):
        draw.polygon(contour, fill=ink)
    if outline:
        line = stroke(mask.size, contours, round(2 * OUTLINE * scale))
        mask.paste(0, mask=line.point(lambda v: 255 - v))


def stroke(size: tuple[int, int], contours: list[list[tuple[float, float]]], width: int) -> Image.Image:
    """Closed contours as lines `width` pixels wide, 255 in an "L" picture."""
    line = Image.new("L", size)
    pen = ImageDraw.Draw(line)
    for contour in contours:
        pen.line([*contour, contour[0]], fill=255, width=width)
        for x, y in contour:  # round joints: between short segments Pillow's own leave slits
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=255)
    return line


def apply_style(picture: Image.Image, style: str | None) -> Image.Image:
    """Night and fog as changes of every pixel; a sketch is drawn as one, so it changes nothing here."""
    if style == "at night":
        return Image.fromarray((np.asarray(picture, np.float32) * NIGHT).round().astype(np.uint8))
    if style == "in fog":
        return Image.blend(picture, Image.new("RGB", picture.size, FOG_COLOR), FOG)
    return picture


def relation(a: Thing, b: Thing) -> list[str]:
    """The relations that hold of a to b."""
    found = []
    if abs(a.cx - b.cx) >= RELATION_GAP:
        found.append("to the left of" if a.cx < b.cx else "to the right of")
    if abs(a.cy - b.cy) >= RELATION_GAP:
        found.append("above" if a.cy < b.cy else "below")
    return found


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def phrase(color: str, shape: str, number: int = 1, size: str | None = None) -> str:
    """`phrase("red", "circle", 2, "big")` is "two big red circles"."""
    words = [NUMBERS[number], size, color, shape if number == 1 else plural(shape)]
    return " ".join(word for word in words if word)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene in the world's grammar.

    Without `rng` everything is said, in the scene's order. With it the order is drawn, a relation is used at times, and
    the background, the sizes or the style may be left out.
    """
    groups: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things if rng is None else rng.sample(scene.things, len(scene.things)):
        groups.setdefault(thing.kind, []).append(thing)

    def say(things: list[Thing]) -> str:
        sizes = {t.size for t in things}
        told = sizes.pop() if len(sizes) == 1 and (rng is None or rng.random() < 0.5) else None
        return phrase(*things[0].kind, len(things), told)

    phrases = [say(things) for things in groups.values()]
    text = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    if rng is not None and len(scene.things) == len(phrases) == 2:
        relations = relation(*(things[0] for things in groups.values()))
        if relations and rng.random() < 0.4:
            text = f" {rng.choice(relations)} ".join(phrases)
    if rng is None or rng.random() < 0.75:
        text += f" on a {scene.background} background"
    if scene.style and (rng is None or rng.random() < 0.95):
        text += f", {scene.style}"
    return text


def template(shape: str, side: int = 64) -> np.ndarray:
    """The shape's mask scaled to its box, as `side` x `side` booleans, for comparison with a found component."""
    scale = 4 * side
    x0, y0, x1, y1 = extent(shape)
    contours = [[((x - x0) / (x1 - x0) * scale, (y - y0) / (y1 - y0) * scale) for x, y in c] for c in CONTOURS[shape]]
    mask = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(mask)
    for contour, ink in zip(contours, (255, 0), strict=False):
        draw.polygon(contour, fill=ink)
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX)) > 127


def plain(scene: Scene) -> Scene:
    """The same things on the same ground, without a style."""
    return replace(scene, style=None)


VOCABULARY = (
    *("a", "two", "three", "four", "small", "big", *COLORS, *SHAPES, *map(plural, SHAPES)),
    *("on", *BACKGROUNDS, "background", ",", "and", "to", "the", "left", "right", "of", "above", "below"),
    *("at", "night", "in", "fog", "as", "sketch"),
)
