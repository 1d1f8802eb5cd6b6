"""What weak passes do to pictures: things right, how well shaped and how sharp, at any strength of guidance.

The prompts are those of the semantics bench. `soft-pag+heads=random6` stands for as many heads drawn by lot, five times
over, which is what heads that somebody chose have to beat.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN, Contender, contenders
from diffguide.bench.drawing import Job, Painted, guided
from diffguide.bench.pictures import OPTIONS
from diffguide.bench.prompts import Prompt
from diffguide.bench.semantics import SemanticsBench, read
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import share
from diffguide.errors import ParamError
from diffguide.search.objectives import sharpness
from diffguide.search.studio import units
from diffguide.zoo.detector import detect

__all__ = ["BENCH", "OPTIONS", "check", "run"]

DRAWS = 5
FINE = 1_000_000  # parts, so that shapes and sharpness are counts like the others
DRAWN = re.compile(r"(soft-pag.*\+heads=random\d+):\d+")
RANDOM = re.compile(r"soft-pag(?P<before>(?:\+.*)?)\+heads=random(?P<count>\d+)(?P<after>(?:\+.*)?)")


class PerturbationBench(SemanticsBench):
    """Quality under perturbation guidance."""

    methods = (PLAIN, "pag", "seg", "soft-pag", "soft-pag+heads=random3")
    rank = "objects_right"
    gains = {"objects_right": ("present", "asked"), "shape_score": ("shape", "seen"), "sharpness": ("sharp", "fine")}

    def contenders(self, methods: Sequence[str] | None = None) -> list[Contender]:
        found: list[Contender] = []
        for text in self.methods if methods is None else methods:
            if drawn := RANDOM.fullmatch(text):
                found += by_lot(drawn["before"] + drawn["after"], int(drawn["count"]))
            elif text != PLAIN:
                found += contenders([text], layouts=False)[1:]
        labels = [c.label for c in found]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ParamError(f"{twice[0]} is listed twice")
        return [*contenders([]), *found]

    def counts(self, picture: Image.Image, task: Prompt) -> dict[str, int]:
        reading = detect(picture)
        found = read(reading, task)
        return {
            **found,
            "asked": found["wanted"] + found["extra"],
            "fine": FINE,
            "seen": FINE * len(reading.things),
            "shape": round(FINE * sum(thing.confidence for thing in reading.things)),
            "sharp": round(FINE * sharpness([picture], [task.caption])[0]),
        }

    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        return {**{name: share(pictures, *counts) for name, counts in self.gains.items()}, **super().shares(pictures)}

    def pools(self, chosen: Sequence[Contender]) -> dict[str, list[str]]:
        """The draws of a lot as one row."""
        found: dict[str, list[str]] = {}
        for label in (c.label for c in chosen):
            if drawn := DRAWN.fullmatch(label):
                found.setdefault(drawn[1], []).append(label)
        return found


def by_lot(settings: str, count: int) -> list[Contender]:
    """The same settings with heads drawn by lot, several times."""
    if count < 1:
        raise ParamError("heads=random0 draws no heads; name 1 or more")
    if "+heads=" in settings:
        raise ParamError(f"soft-pag{settings}+heads=random{count} names heads twice")
    (base,) = contenders([f"soft-pag{settings}"], layouts=False)[1:]
    return [
        dataclasses.replace(base, label=f"soft-pag{settings}+heads=random{count}:{n}", peer=partial(_lot, count, n))
        for n in range(DRAWS)
    ]


def _lot(count: int, number: int, pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int) -> Painted:
    every = units(pipe)
    if count > len(every):
        raise ParamError(f"heads=random{count}: the model has {len(every)}")
    heads = sorted(random.Random(f"{number} of {count}").sample(every, count))
    return guided(pipe, jobs, contender, steps, heads=heads)


BENCH = PerturbationBench()
run = partial(pictures.run, BENCH)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
