"""The fixed list of scenes that the layout bench draws, and how it was made.

`layout_scenes.json` is the output of `make_list()`; `python -m diffguide.bench.scenes` writes it again. Change neither:
scores are compared over time.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffguide.layout import Layout, Region
from diffguide.zoo.world import Scene, Thing, phrase, plural, sample_scene

FILE = Path(__file__).with_name("layout_scenes.json")
VERSION = 1
SEED = 0
COUNT = 100


@dataclass(frozen=True)
class Task:
    """A scene to be drawn, by its number in the list."""

    index: int
    caption: str
    scene: Scene

    @property
    def layout(self) -> Layout:
        return layout_of(self.scene)


def make_list(seed: int = SEED, count: int = COUNT) -> list[dict[str, Any]]:
    """Draw the list: `{"caption": ..., "scene": ...}` for each scene.

    Each is drawn from the world's own distribution, without a style, until it is one that training never saw and its
    set of kinds is new in the list. Even numbers have two things, odd ones three; a kind is repeated where `repeats`
    says so and nowhere else.
    """
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    known: set[tuple[tuple[str, str], ...]] = set()
    for index in range(count):
        while True:
            scene = sample_scene(rng, count=2 + index % 2, styled=0.0)
            kinds = tuple(sorted(thing.kind for thing in scene.things))
            if scene.held_out and kinds not in known and (len(set(kinds)) < len(kinds)) == repeats(index):
                break
        known.add(kinds)
        found.append({"caption": caption_of(scene), "scene": scene.to_dict()})
    return found


def repeats(index: int) -> bool:
    """Whether the scene of this number repeats a kind: 15 of 100, only two of them with two things.

    Training never saw one in sixteen of the combinations, so there are but a few such scenes of one kind alone.
    """
    return index % 8 == 3 or index % 50 == 6


def load_tasks(limit: int | None = None) -> list[Task]:
    """The first `limit` scenes of the list in the package."""
    entries = json.loads(FILE.read_text(encoding="utf-8"))["scenes"][:limit]
    return [Task(i, entry["caption"], Scene.from_dict(entry["scene"])) for i, entry in enumerate(entries)]


def groups(scene: Scene) -> dict[tuple[str, str], list[Thing]]:
    """The things of a scene by kind, kinds in the order in which they come first."""
    found: dict[tuple[str, str], list[Thing]] = {}
    for thing in scene.things:
        found.setdefault(thing.kind, []).append(thing)
    return found


def caption_of(scene: Scene) -> str:
    """The whole scene in the world's grammar, in its order, but for the sizes: those are the layout's to say."""
    phrases = [phrase(*kind, len(things)) for kind, things in groups(scene).items()]
    told = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    return f"{told} on a {scene.background} background"


def layout_of(scene: Scene) -> Layout:
    """One region for each kind, with the words of the caption and the boxes of all its things."""
    regions = []
    for (color, shape), things in groups(scene).items():
        words = f"{color} {shape if len(things) == 1 else plural(shape)}"
        regions.append(Region(words, boxes=[thing.box for thing in things]))
    return Layout(*regions)


def as_text(entries: list[dict[str, Any]], seed: int = SEED) -> str:
    """The text of the file: one scene a line."""
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    return f'{{"version": {VERSION}, "seed": {seed}, "scenes": [\n{lines}\n]}}\n'


if __name__ == "__main__":
    FILE.write_text(as_text(make_list()), encoding="utf-8")
