"""Do heads found for a style bring it into pictures whose prompt asks for it, and are the things still there?

The prompts are those of the semantics bench, each asked for at night, in fog or as a sketch, in turns. The picture is
read by the same classifier that such a search climbs; the prompts are others.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN
from diffguide.bench.perturbation import FINE, PerturbationBench
from diffguide.bench.pictures import OPTIONS
from diffguide.bench.prompts import Prompt, load_prompts
from diffguide.bench.semantics import read
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import share
from diffguide.zoo.detector import detect
from diffguide.zoo.styles import STYLE_NAMES, style_probabilities
from diffguide.zoo.world import STYLES

__all__ = ["BENCH", "OPTIONS", "check", "run"]


@dataclasses.dataclass(frozen=True)
class Styled(Prompt):
    """A prompt that ends in a style, one of `world.STYLES`."""

    style: str = STYLES[0]


class StylesBench(PerturbationBench):
    """What is read of a style that was asked for."""

    methods = (PLAIN, "soft-pag", "soft-pag+heads=random3")
    rank = "style_read"
    gains = {
        "style_read": ("styled", "fine"),
        "objects_right": ("present", "asked"),
        **{f"{name}_read": (f"{name}_styled", f"{name}_fine") for name in STYLE_NAMES[1:]},
        **{f"{name}_right": (f"{name}_present", f"{name}_asked") for name in STYLE_NAMES[1:]},
    }
    told = (
        "{count} prompts with seed 0, not chosen, each asked for in a style; below each picture the style that it was "
        "read as, how many of the wanted things were found, and what else was there."
    )

    def tasks(self, limit: int | None) -> list[Prompt]:
        found: list[Prompt] = []
        for number, prompt in enumerate(load_prompts(limit)):
            style = STYLES[number % len(STYLES)]
            fields: dict[str, Any] = vars(prompt) | {"caption": f"{prompt.caption}, {style}"}
            found.append(Styled(**fields, style=style))
        return found

    def show(self, chosen: Sequence[Prompt]) -> Sequence[Prompt]:
        return chosen[: pictures.ON_SHEET]

    def counts(self, picture: Image.Image, task: Prompt) -> dict[str, int]:
        assert isinstance(task, Styled)
        number = STYLES.index(task.style) + 1
        chances = style_probabilities(picture)
        found = read(detect(picture, task.style), task)
        counted = {
            "styled": round(FINE * float(chances[number])),
            "fine": FINE,
            "present": found["present"],
            "asked": found["wanted"] + found["extra"],
        }
        own = {
            f"{name}_{what}": count * (name == STYLE_NAMES[number])
            for name in STYLE_NAMES[1:]
            for what, count in counted.items()
        }
        return {**found, **counted, **own, "style": number, "likeliest": int(chances.argmax())}

    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        """Of all, then of each style."""
        found = {
            "style_read": share(pictures, "styled", "fine"),
            "objects_right": share(pictures, "present", "asked"),
            "objects_present": share(pictures, "present", "wanted"),
            "extra_objects": share(pictures, "extra"),
        }
        for number, name in enumerate(STYLE_NAMES):
            if of_style := [p for p in pictures if p["style"] == number]:
                found[f"{name}_read"] = share(of_style, "styled", "fine")
                found[f"{name}_right"] = share(of_style, "present", "asked")
        return found

    def note(self, counts: dict[str, int]) -> str:
        return f"{STYLE_NAMES[counts['likeliest']]}, {super().note(counts)}"


BENCH = StylesBench()
run = partial(pictures.run, BENCH, guidance_scale=1.0)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
