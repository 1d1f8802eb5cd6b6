"""What each knob of a method does at both ends: the same scene from the same noise, one knob turned at a time."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from diffguide.bench import layout, semantics
from diffguide.bench.contenders import PLAIN, Contender, contenders
from diffguide.bench.drawing import Job, draw, machine
from diffguide.bench.pictures import STEPS, PictureBench, prepared
from diffguide.bench.sheet import Row, contact_sheet
from diffguide.describe import needs_layout
from diffguide.errors import ParamError
from diffguide.method import Method
from diffguide.params import Param

OPTIONS = ("methods", "limit", "steps")
TIMES = 5  # a number is divided and multiplied by it
COLUMNS = ("low", "default", "high")
TOLD = (
    "Scene {scene} of the list, seed 0, not chosen. Above each row a knob and what it is; below each picture its "
    "value, how many of the wanted things were found{boxes}, and what else was there. All else is at its default{but}."
)


@dataclass(frozen=True)
class Turn:
    """A knob at one of its ends, as `NAME=VALUE`."""

    knob: Param
    column: str
    value: Any

    @property
    def setting(self) -> str:
        return f"{self.knob.name}={written(self.value)}"


def ends(knob: Param, value: Any) -> tuple[Any, Any] | None:
    """Two values on both sides of `value` that show what a knob does, within its range; None for words and lists."""
    if knob.name == "window":
        start, stop = value
        return (start, start + (stop - start) / 3), (0.0, 1.0)
    if knob.name == "layers":
        return "down", "up"
    if knob.choices:
        return knob.choices[0], knob.choices[-1]
    if isinstance(value, bool):
        return False, True
    if not isinstance(value, int | float) or knob.low is None or knob.high is None:
        return None
    ends = value / TIMES, value * TIMES or 1.0
    low, high = max(knob.low, min(ends)), min(knob.high, max(ends))
    return (round(low), round(high)) if isinstance(value, int) else (low, high)


def written(value: Any) -> str:
    """A value in its command-line form."""
    if isinstance(value, tuple):
        return ":".join(f"{v:.3g}" for v in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def turns(method: type[Method], settings: Mapping[str, Any]) -> Iterator[Turn]:
    """Every end that is not what these settings, or the default, have."""
    for knob in method.params():
        begun = settings.get(knob.name, knob.default)
        for column, value in zip(("low", "high"), ends(knob, begun) or (), strict=False):
            if value != begun:
                yield Turn(knob, column, value)


def check(*, methods: Sequence[str] | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    chosen(methods)


def chosen(methods: Sequence[str] | None) -> Contender:
    found = contenders([m for m in methods or () if m != PLAIN])[1:]
    if len(found) != 1:
        raise ParamError(f"methods = {methods!r}: this bench turns the knobs of one method; name it")
    return contenders([found[0].label], layouts=bench_of(found[0].method).layouts)[1]


def bench_of(method: type[Method] | None) -> PictureBench:
    """The bench whose scenes have what the method needs."""
    return layout.BENCH if method is not None and needs_layout(method) else semantics.BENCH


def run(
    pipe: Any,
    frame: dict[str, Any],
    *,
    methods: Sequence[str],
    limit: int = 1,
    steps: int = STEPS,
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw the scene number `limit` of the list with every knob of one method at both ends."""
    base = chosen(methods)
    assert base.method is not None
    bench = bench_of(base.method)
    tasks = bench.tasks(None)
    if limit > len(tasks):
        raise ParamError(f"limit = {limit}: the list has {len(tasks)} scenes")
    task = tasks[limit - 1]
    todo = list(turns(base.method, base.settings))
    pictures: dict[tuple[str, str], tuple[Image.Image, str]] = {}
    rows = []
    with prepared(pipe), tqdm(total=len(todo) + 1, unit="picture", disable=not progress, file=sys.stderr) as bar:

        def drawn(contender: Contender) -> tuple[Image.Image, str]:
            bar.set_description(contender.label)
            (picture,) = draw(pipe, [Job(task, 0)], contender, steps).pictures
            counts = bench.counts(picture, task)
            rows.append({"method": contender.label, "n": 1, **counts})
            bar.update()
            return picture, bench.note(counts)

        default = drawn(base)
        for turn in todo:
            turned = contenders([f"{base.label}+{turn.setting}"], layouts=bench.layouts)[1]
            pictures[turn.knob.name, turn.column] = drawn(turned)
    found: dict[str, Any] = {"rows": rows, "settings": {"scene": task.caption, "steps": steps, **machine(pipe)}}
    if out is not None:
        sheet = list(on_sheet(todo, base.settings, pictures, default, bench.row(task).boxes))
        titles = ["as set" if base.settings and column == "default" else column for column in COLUMNS]
        contact_sheet(titles, sheet).save(out / "contact_sheet.png", optimize=True)
        boxes = ", how many in their box" if bench.layouts else ""
        but = "".join(f", {name} at {written(value)}" for name, value in base.settings.items())
        told = TOLD.format(scene=task.index, boxes=boxes, but=but and f" but{but[1:]}")
        found["sheet"] = {"file": "contact_sheet.png", "caption": told}
    return found


def on_sheet(
    todo: Sequence[Turn],
    settings: Mapping[str, Any],
    pictures: dict[tuple[str, str], tuple[Image.Image, str]],
    default: tuple[Image.Image, str],
    boxes: Sequence[tuple[float, float, float, float]],
) -> Iterator[Row]:
    """A row for each knob; an end that is as it was begun is left blank."""
    for knob in dict.fromkeys(turn.knob for turn in todo):
        values = {turn.column: written(turn.value) for turn in todo if turn.knob == knob}
        values["default"] = written(settings.get(knob.name, knob.default)) or "its own"
        cells = {column: pictures.get((knob.name, column), (None, "")) for column in COLUMNS} | {"default": default}
        notes = [f"{values[column]}: {cells[column][1]}" if column in values else "" for column in COLUMNS]
        yield Row(f"{knob.name}: {knob.help}", boxes, [cells[column][0] for column in COLUMNS], notes)
