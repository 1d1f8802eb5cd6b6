"""A layout from the prompt alone: a light rule in place of a person, or of a language model.

Every thing that the prompt names gets a box, as many boxes as the prompt counts, none touching another, and on the side
that the prompt says. Where in the picture they stand beyond that is drawn by lot.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from diffguide.errors import LayoutError, PromptError
from diffguide.layout import Box, Layout, Region
from diffguide.tokens import NUMBERS, Span, find_groups, number_before, occurrences

MOST = 24  # things
FILLED = 0.36  # of the picture, by all boxes together
LARGEST = 0.5  # side of a box, as a share of the shorter side of the picture
MARGIN, GAP = 0.03, 0.06  # to the border and between boxes, as shares of the shorter side
TRIES, THROWS = 20, 20  # arrangements of a size before boxes shrink; places tried for a box in each
SHRINK, SMALLEST = 0.93, 0.06

# what stands between two phrases, and where the first is from the second: steps right and down
_SIDES = {
    r"(?:to )?(?:the )?left of|(?:on|at) the left(?: side)? of": (-1, 0),
    r"(?:to )?(?:the )?right of|(?:on|at) the right(?: side)? of": (1, 0),
    r"above|over|on|onto|on top of|atop|(?:on|at) the top of": (0, -1),
    r"below|under|underneath|beneath|(?:on|at) the bottom of": (0, 1),
}
_COUNT = re.compile(rf"(?:\s+(?:the|some|{'|'.join(NUMBERS)}|\d+))+$", re.IGNORECASE)

Side = tuple[int, int]


@dataclass(frozen=True)
class Thing:
    """A phrase, how many there are, and where the phrase before it is from here, if the prompt says so."""

    phrase: str
    number: int
    side: Side | None


def plan(prompt: str, *, seed: int = 0, aspect: float = 1.0) -> Layout:
    """Arrange what a prompt names: "a cat to the left of two dogs" is three boxes, the cat's on the left.

    Things, numbers and relations are found as described at `tokens.find_groups`: a rule of thumb, not a parser.
    Relations are read between neighbours in the text: left, right, above, below and their like. The same prompt and
    seed give the same layout.

    Args:
        prompt: English, such as the pipeline is given.
        seed: another arrangement for every number.
        aspect: width of the picture over its height, so that boxes are square in pixels; 1/8 to 8.

    Raises:
        PromptError: the prompt names nothing.
        LayoutError: more than 24 things, or no arrangement was found; draw the layout by hand.
    """
    if not 1 / 8 <= aspect <= 8:
        raise LayoutError(f"aspect = {aspect} is outside [0.125, 8]; it is width over height")
    things = read(prompt)
    count = sum(t.number for t in things)
    if not things:
        raise PromptError(f"no noun phrase found in {prompt!r:.200}; draw a layout by hand")
    if count > MOST:
        raise LayoutError(f"the prompt counts {count} things, at most {MOST} are arranged; draw a layout by hand")
    lot = random.Random(f"{seed} {prompt}")
    width, height = max(1.0, aspect), max(1.0, 1 / aspect)  # in shorter sides
    side = min(LARGEST, (FILLED * width * height / count) ** 0.5)
    while side >= SMALLEST:
        for _ in range(TRIES):
            if boxes := _arrange(things, side, width, height, lot):
                return Layout(*(_region(t, own, width, height) for t, own in zip(things, boxes, strict=True)))
        side *= SHRINK
    raise LayoutError(f"no arrangement found for {prompt!r:.200}; draw a layout by hand")


def read(prompt: str) -> list[Thing]:
    """The things of a prompt, in its order."""
    spans = {phrase: occurrences(prompt, phrase) for phrase in find_groups(prompt)}
    found = [Thing(p, sum(number_before(prompt, s) or 1 for s in at), None) for p, at in spans.items()]
    firsts = [at[0] for at in spans.values()]
    sides = [_side(prompt, a, b) for a, b in pairwise(firsts)]
    return [Thing(t.phrase, max(1, t.number), s) for t, s in zip(found, [None, *sides], strict=False)]


def _side(prompt: str, first: Span, second: Span) -> Side | None:
    """Where the first of two phrases is from the second, if the text between them says so."""
    between = _COUNT.sub("", prompt[first[1] : second[0]].rstrip()).strip().lower()
    return next((side for words, side in _SIDES.items() if re.fullmatch(words, between)), None)


def _arrange(
    things: Sequence[Thing], side: float, width: float, height: float, lot: random.Random
) -> list[list[Box]] | None:
    """Boxes of each thing, in shorter sides of the picture, or None if one found no place."""
    placed: list[list[Box]] = []
    rooms = zip(_rooms(things, 0, width), _rooms(things, 1, height), strict=True)
    for thing, ((x0, x1), (y0, y1)) in zip(things, rooms, strict=True):
        placed.append([])
        for _ in range(thing.number):
            size = side * lot.uniform(0.85, 1.1)
            if x1 - x0 < size or y1 - y0 < size:
                return None
            corners = ((lot.uniform(x0, x1 - size), lot.uniform(y0, y1 - size)) for _ in range(THROWS))
            boxes = ((x, y, x + size, y + size) for x, y in corners)
            free = (b for b in boxes if all(_apart(b, other) >= GAP for others in placed for other in others))
            if (box := next(free, None)) is None:
                return None
            placed[-1].append(box)
    return placed


def _rooms(things: Sequence[Thing], axis: int, length: float) -> list[tuple[float, float]]:
    """From where to where each thing may reach along an axis: a band each for those that stand side by side on it."""
    rows: list[list[int]] = []  # of things told to follow each other, the place of each
    for thing in things:
        if way := thing.side[axis] if thing.side else 0:
            rows[-1].append(rows[-1][-1] - way)
        else:
            rows.append([0])
    rooms = []
    for row in rows:
        band = (length - 2 * MARGIN + GAP) / (max(row) - min(row) + 1)
        starts = [MARGIN + (place - min(row)) * band for place in row]
        rooms += [(start, start + band - GAP) for start in starts]
    return rooms


def _apart(a: Box, b: Box) -> float:
    """Distance of two boxes along the axis on which they are further apart; below 0 they overlap."""
    return max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])


def _region(thing: Thing, boxes: Sequence[Box], width: float, height: float) -> Region:
    own = [tuple(round(v / (width, height)[i % 2], 4) for i, v in enumerate(box)) for box in boxes]
    return Region(thing.phrase, box=own[0]) if len(own) == 1 else Region(thing.phrase, boxes=own)
