"""Is what the prompt says there? Held-out prompts without a layout, drawn by each method and read by the detector.

Methods that do nothing without a layout are given one that is planned from the prompt, see `diffguide.planning`.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from PIL import Image

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN
from diffguide.bench.pictures import OPTIONS, Gains, PictureBench
from diffguide.bench.prompts import SORTS, Prompt, in_turns, load_prompts
from diffguide.bench.sheet import Row
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import share
from diffguide.zoo.detector import Found, Reading, detect, match, score
from diffguide.zoo.world import Thing, relation

__all__ = ["BENCH", "OPTIONS", "check", "run"]


class SemanticsBench(PictureBench):
    """Presence, binding, number and relation."""

    # settings that did best in small trials on held-out kinds of things that are not in the list
    methods = (
        PLAIN,
        "attend-excite+layers=down+iterations=5",
        "a-star+factor=10+scale=100+window=0:0.2",
        "conform+softmax=true+layers=down+iterations=5",
        "bacon",
    )
    layouts = False
    rank: ClassVar[str] = "objects_present"
    gains: ClassVar[Gains] = {"objects_present": ("present", "wanted")}
    told = (
        "{count} prompts with seed 0, the first of each sort, then the second, not chosen; below each picture how many "
        "of the wanted things were found, and what else was there."
    )

    def tasks(self, limit: int | None) -> list[Prompt]:
        return load_prompts(limit)

    def show(self, chosen: Sequence[Prompt]) -> Sequence[Prompt]:
        return in_turns(list(chosen))[: pictures.ON_SHEET]

    def counts(self, picture: Image.Image, task: Prompt) -> dict[str, int]:
        return read(detect(picture), task)

    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        """What nothing was drawn of is left out."""
        wanted = {
            "objects_present": ("present", "wanted"),
            "prompts_complete": ("complete", None),
            "attributes_bound": ("bound", "shaped"),
            "numbers_right": ("number_right", "numbered"),
            "relations_right": ("relation_right", "related"),
            "extra_objects": ("extra", None),
        }
        found = {
            name: share(pictures, above, below)
            for name, (above, below) in wanted.items()
            if below is None or any(p[below] for p in pictures)
        }
        for number, sort in enumerate(SORTS):
            of_sort = [p for p in pictures if p["sort"] == number]
            if of_sort:
                found[f"complete_{sort.replace(' ', '_')}"] = share(of_sort, "complete")
        return found

    def row(self, task: Prompt) -> Row:
        return Row(task.caption, [], [], [])

    def note(self, counts: dict[str, int]) -> str:
        extra = f", {counts['extra']} extra" if counts["extra"] else ""
        return f"{counts['present']}/{counts['wanted']}{extra}"


def read(reading: Reading, prompt: Prompt) -> dict[str, int]:
    """What is kept of a picture.

    `bound` of `shaped`: of the wanted things whose shape is there, in whatever colour, those that have their own.
    `number_right`: exactly as many of every kind as asked for. `relation_right`: both things are there, and it holds.
    """
    s = score(reading, prompt.targets)
    shapes = Counter(shape for _, shape, _ in prompt.targets)
    there = Counter(thing.shape for thing in reading.things)
    kinds = Counter(thing.kind for thing in reading.things)
    exact = all(kinds[color, shape] == number for color, shape, number in prompt.kinds)
    holds = False
    if prompt.relation:
        first, second = match(reading, prompt.targets)
        holds = (
            first is not None and second is not None and prompt.relation in relation(as_thing(first), as_thing(second))
        )
    return {
        "sort": list(SORTS).index(prompt.sort),
        "wanted": s.wanted,
        "present": s.present,
        "complete": int(s.complete),
        "extra": s.extra,
        "shaped": sum(min(number, there[shape]) for shape, number in shapes.items()),
        "bound": s.present,
        "numbered": int(prompt.sort == "number"),
        "number_right": int(prompt.sort == "number" and exact),
        "related": int(prompt.relation is not None),
        "relation_right": int(holds),
    }


def as_thing(found: Found) -> Thing:
    return Thing.in_box(found.color, found.shape, found.box)


BENCH = SemanticsBench()
run = partial(pictures.run, BENCH)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
