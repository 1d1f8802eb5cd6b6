"""Does a negative prompt keep out what it names, without classifier-free guidance, and leave the rest alone?

Every prompt asks for a red circle and for another thing; the negative prompt is "red circle". The prompts are made
here, in a fixed order: scores are compared over time.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN
from diffguide.bench.pictures import OPTIONS
from diffguide.bench.prompts import Prompt
from diffguide.bench.semantics import SemanticsBench, read
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import share
from diffguide.zoo.detector import detect
from diffguide.zoo.world import BACKGROUNDS, COLORS, SHAPES, phrase

__all__ = ["BENCH", "OPTIONS", "check", "run"]

NEGATIVE = ("red", "circle")
COUNT = 40
STRIDE = 13  # so that a few are of many kinds


class NegativeBench(SemanticsBench):
    """What is named stays away, what is not named stays."""

    methods = (PLAIN, "nag+negative=red circle", "nag+negative=red circle+scale=10+alpha=1")
    rank, gains = "negative_absent", {"negative_absent": ("absent", None)}
    told = (
        "{count} prompts with seed 0, not chosen, each of a red circle and another thing; below each picture whether "
        "the other thing was found, and what else was there."
    )

    def tasks(self, limit: int | None) -> list[Prompt]:
        return prompts()[:limit]

    def show(self, chosen: Sequence[Prompt]) -> Sequence[Prompt]:
        return chosen[: pictures.ON_SHEET]

    def counts(self, picture: Image.Image, task: Prompt) -> dict[str, int]:
        reading = detect(picture)
        named = sum(thing.kind == NEGATIVE for thing in reading.things)
        found = read(reading, task)
        return found | {"absent": int(not named), "extra": found["extra"] - named, "named": named}

    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        return {
            "negative_absent": share(pictures, "absent"),
            "others_present": share(pictures, "present", "wanted"),
            "extra_objects": share(pictures, "extra"),
        }

    def note(self, counts: dict[str, int]) -> str:
        named = f", {counts['named']} red circle{'s' * (counts['named'] > 1)}" if counts["named"] else ""
        return super().note(counts) + named


def prompts() -> list[Prompt]:
    """A red circle and every other thing in turns, neither red nor round, on every ground in turns."""
    others = [(c, s) for c in COLORS for s in SHAPES if c != NEGATIVE[0] and s != NEGATIVE[1]]
    chosen = [others[i * STRIDE % len(others)] for i in range(COUNT)]
    grounds = list(BACKGROUNDS)
    return [
        Prompt(
            i,
            "two",
            f"{phrase(*NEGATIVE)} and {phrase(*kind)} on a {grounds[i % len(grounds)]} background",
            ((*kind, 1),),
        )
        for i, kind in enumerate(chosen)
    ]


BENCH = NegativeBench()
run = partial(pictures.run, BENCH, guidance_scale=1.0)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
