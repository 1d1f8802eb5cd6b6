"""Do things stand where the layout says? Held-out scenes drawn by each method and read by the detector."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from diffguide.bench import pictures
from diffguide.bench.contenders import PLAIN
from diffguide.bench.pictures import OPTIONS, PictureBench
from diffguide.bench.scenes import Task, load_tasks
from diffguide.bench.sheet import Row
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import share
from diffguide.zoo.detector import Score, detect, score
from diffguide.zoo.world import render

__all__ = ["BENCH", "OPTIONS", "check", "run"]


class LayoutBench(PictureBench):
    """Boxes of truth scenes."""

    methods = (PLAIN, "attend-excite", "backward-guidance", "bacon")
    rank, gains = "objects_in_box", {"objects_in_box": ("in_box", "wanted")}
    told = (
        "The first {count} scenes of the list with seed 0, not chosen; wanted boxes in magenta; below each picture how "
        "many of the wanted things were found, how many in their box, and what else was there."
    )

    def tasks(self, limit: int | None) -> list[Task]:
        return load_tasks(limit)

    def counts(self, picture: Image.Image, task: Task) -> dict[str, int]:
        return _counts(score(detect(picture), task.scene))

    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        return {
            "objects_present": share(pictures, "present", "wanted"),
            "scenes_complete": share(pictures, "complete"),
            "objects_in_box": share(pictures, "in_box", "wanted"),
            "objects_centred": share(pictures, "centred", "wanted"),
            "extra_objects": share(pictures, "extra"),
        }

    def row(self, task: Task) -> Row:
        return Row(task.caption, [t.box for t in task.scene.things], [render(task.scene)], ["found, in its box:"])

    def note(self, counts: dict[str, int]) -> str:
        extra = f", {counts['extra']} extra" if counts["extra"] else ""
        return f"{counts['present']}/{counts['wanted']}, {counts['in_box']}/{counts['wanted']}{extra}"

    def extras(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """The detector's own figures on the drawn truth: what it misses, no method can have right."""
        truth = [{"scene": t.index, **_counts(score(detect(render(t.scene)), t.scene))} for t in tasks]
        return {"detector": {"n": len(tasks), **self.shares(truth)}}


def _counts(s: Score) -> dict[str, int]:
    counts = {key: int(getattr(s, key)) for key in ("wanted", "present", "centred", "in_box", "extra")}
    return {**counts, "complete": int(s.complete)}


BENCH = LayoutBench()
run = partial(pictures.run, BENCH)


def check(*, methods: Sequence[str] | None = None, against: str | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    pictures.check(BENCH, methods, against)
