"""The fixed list of prompts that the semantics bench draws, and how it was made.

`semantics_prompts.json` is the output of `make_list()`; `python -m diffguide.bench.prompts` writes it again. Change
neither: scores are compared over time.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffguide.layout import Layout
from diffguide.planning import plan
from diffguide.zoo.world import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, phrase

FILE = Path(__file__).with_name("semantics_prompts.json")
VERSION = 1
SEED = 0
# how many prompts of each sort, together 240; "one colour" and "one shape" are shared by two things of two or three:
# of two things alone training keeps too few combinations back
SORTS = {"two": 40, "three": 40, "four": 30, "one colour": 30, "one shape": 30, "number": 30, "relation": 40}
RELATIONS = ("to the left of", "to the right of", "above", "below")
NUMBERS = ((2,), (3,), (4,), (2, 1), (3, 1), (2, 2))  # of the things of each kind


@dataclass(frozen=True)
class Prompt:
    """What is to be drawn: kinds (colour, shape, number), in the order of the caption, and perhaps a relation."""

    index: int
    sort: str
    caption: str
    kinds: tuple[tuple[str, str, int], ...]
    relation: str | None = None

    @property
    def layout(self) -> Layout:
        """Planned from the caption, for methods that do nothing without one."""
        return plan(self.caption, seed=self.index)

    @property
    def targets(self) -> list[tuple[str, str, None]]:
        """A target of the detector for each thing."""
        return [(color, shape, None) for color, shape, number in self.kinds for _ in range(number)]


def make_list(seed: int = SEED) -> list[dict[str, Any]]:
    """Draw the list: every set of kinds is one that training never saw, and new in the list."""
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    known = set()
    for sort, count in SORTS.items():
        for _ in range(count):
            while True:
                kinds = _kinds(sort, rng)
                key = tuple(sorted(kinds))
                if len({k[:2] for k in kinds}) == len(kinds) and key not in known and _held_out(kinds):
                    break
            known.add(key)
            relation = rng.choice(RELATIONS) if sort == "relation" else None
            entry = {"sort": sort, "caption": _caption(kinds, relation, rng), "kinds": kinds, "relation": relation}
            found.append(entry)
    return found


def _kinds(sort: str, rng: random.Random) -> tuple[tuple[str, str, int], ...]:
    several = {"three": (1, 1, 1), "four": (1, 1, 1, 1), "number": rng.choice(NUMBERS)}
    numbers = several.get(sort, (1, 1, 1) if sort.startswith("one ") and rng.random() < 0.7 else (1, 1))
    colors = [rng.choice(tuple(COLORS)) for _ in numbers]
    shapes = [rng.choice(SHAPES) for _ in numbers]
    if sort == "one colour":
        colors[1] = colors[0]
    if sort == "one shape":
        shapes[1] = shapes[0]
    return tuple(zip(colors, shapes, numbers, strict=True))


def _held_out(kinds: tuple[tuple[str, str, int], ...]) -> bool:
    things = tuple(Thing(color, shape, 0.5, 0.5, 0.15) for color, shape, number in kinds for _ in range(number))
    return Scene("white", things).held_out


def _caption(kinds: tuple[tuple[str, str, int], ...], relation: str | None, rng: random.Random) -> str:
    phrases = [phrase(*kind) for kind in kinds]
    if relation is not None:
        told = f" {relation} ".join(phrases)
    else:
        told = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return f"{told} on a {rng.choice(tuple(BACKGROUNDS))} background"


def load_prompts(limit: int | None = None) -> list[Prompt]:
    """The list in the package; with a limit, prompts of all sorts in turns."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))["prompts"]
    prompts = [
        Prompt(i, e["sort"], e["caption"], tuple((c, s, n) for c, s, n in e["kinds"]), e["relation"])
        for i, e in enumerate(entries)
    ]
    return prompts if limit is None else in_turns(prompts)[:limit]


def in_turns(prompts: list[Prompt]) -> list[Prompt]:
    """The first of each sort, the second of each, and so on."""
    seen: dict[str, int] = {}
    places = []
    for prompt in prompts:
        seen[prompt.sort] = seen.get(prompt.sort, -1) + 1
        places.append((seen[prompt.sort], prompt.index, prompt))
    return [prompt for _, _, prompt in sorted(places, key=lambda place: place[:2])]


def as_text(entries: list[dict[str, Any]]) -> str:
    """The content of the file: one line for each prompt."""
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    return f'{{"version": {VERSION}, "seed": {SEED}, "prompts": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    FILE.write_text(as_text(make_list()), encoding="utf-8")
