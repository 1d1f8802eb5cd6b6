"""Do things stand where the layout says? Held-out scenes drawn by each method and read by the detector.

Every method draws the same scenes from the same noise. Each batch is drawn by one method after the other, the plain
pipeline first, so that what the machine does meanwhile falls on all of them alike.
"""

import ctypes
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

from diffguide.bench.scenes import Task, load_tasks
from diffguide.bench.sheet import Row, contact_sheet
from diffguide.bench.statistics import Interval, ratio
from diffguide.errors import ParamError
from diffguide.guide import Guide
from diffguide.layout import Layout, Region
from diffguide.method import Method
from diffguide.processors import named
from diffguide.report import peak, reset_peak
from diffguide.zoo.detector import Score, detect, score
from diffguide.zoo.world import render

OPTIONS = ("methods", "limit", "seeds", "batch", "steps")
PLAIN = "none"
METHODS = (PLAIN, "attend-excite", "backward-guidance", "bacon")
STEPS = 30
GUIDANCE_SCALE = 5.0
SEEDS = 2
BATCH = 10
ON_SHEET = 12  # scenes: the first of the list, with seed 0
WARMUP_STEPS = 2

Record = dict[str, Any]  # a batch, as it is kept in the file of a run that is not over


@dataclass(frozen=True)
class Contender:
    """A method with its settings, still without the layouts; the plain pipeline has none."""

    label: str
    method: type[Method] | None
    settings: dict[str, Any]

    def build(self, layouts: Sequence[Layout]) -> Method | None:
        """The method for a batch, one layout for each picture."""
        if self.method is None:
            return None
        wants = {"layout": list(layouts)} if _needs(self.method) else {}
        return self.method(**wants, **self.settings)


@dataclass(frozen=True)
class Job:
    """One picture to be drawn."""

    task: Task
    seed: int

    def noise(self) -> torch.Generator:
        """Depends on scene and seed alone, not on the method, the batch or the device."""
        return torch.Generator("cpu").manual_seed(1000 * self.task.index + self.seed)


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures and its cost: seconds and MiB for the batch, forwards and backwards for each picture."""

    pictures: list[Image.Image]
    seconds: float
    memory: float
    forwards: float
    backwards: float


def contenders(methods: Sequence[str]) -> list[Contender]:
    """The plain pipeline, then the methods in the given order.

    Raises:
        ParamError: a method or setting is unknown or out of range, listed twice, or needs what a layout does not give.
    """
    if isinstance(methods, str):
        raise ParamError(f"methods = {methods!r} is one text; give a list of names")
    found = [Contender(PLAIN, None, {})]
    for text in methods:
        if text != PLAIN:
            found.append(_contender(text))
    labels = [c.label for c in found]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ParamError(f"{twice[0]} is listed twice")
    for contender in found:
        contender.build([Layout(Region("a thing", box=(0.0, 0.0, 1.0, 1.0)))])
    return found


def _contender(text: str) -> Contender:
    """`NAME` or `NAME+PARAM=VALUE+...`."""
    name, *pairs = text.split("+")
    method = named(name)
    knobs = {knob.name: knob for knob in method.params()}
    settings = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in knobs:
            raise ParamError(f"{method.__name__} has no parameter {key!r} (known: {', '.join(knobs)})")
        settings[key] = knobs[key].parse(method.__name__, value)
    foreign = [field for field in _needs(method) if field != "layout"]
    if foreign:
        raise ParamError(f"{method.__name__} needs {', '.join(foreign)}, which this bench does not have")
    return Contender(text, method, settings)


def _needs(method: type[Method]) -> list[str]:
    """Fields without a default."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(method) if f.default is missing and f.default_factory is missing]


def check(*, methods: Sequence[str] = METHODS, **_: int) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    contenders(methods)


def run(
    pipe: Any,
    frame: dict[str, Any],
    *,
    methods: Sequence[str] = METHODS,
    limit: int | None = None,
    seeds: int = SEEDS,
    batch: int = BATCH,
    steps: int = STEPS,
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and score; `frame` tells what else the figures depend on.

    Batches that were drawn are kept in the file `part`; a run with the same settings goes on after them.
    """
    chosen = contenders(methods)
    tasks = load_tasks(limit)
    jobs = [Job(task, seed) for seed in range(seeds) for task in tasks]
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    settings = {
        "scenes": len(tasks),
        "seeds": seeds,
        "steps": steps,
        "scheduler": "DDIM",
        "guidance_scale": GUIDANCE_SCALE,
        "batch": batch,
        **_machine(pipe),
    }
    plain = pipe.scheduler
    bar_config = getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = DDIMScheduler.from_config(plain.config)
    pipe.set_progress_bar_config(disable=True)
    try:
        ledger = _Ledger(part, {**frame, "settings": settings, "methods": [c.label for c in chosen]})
        records = _draw_all(pipe, batches, chosen, steps, ledger, out, progress)
    finally:
        pipe.scheduler = plain
        pipe.set_progress_bar_config(**bar_config)
    found: dict[str, Any] = {
        "rows": [summary(c.label, records) for c in chosen],
        "detector": detector_figures(tasks),
        "settings": settings,
        "intervals": "95 % bootstrap, over scenes for what was drawn, over batches for what it cost; n counts pictures",
    }
    if out is not None:
        found["sheet"] = _sheet(out, tasks[:ON_SHEET], chosen, records)
    return found


def draw(pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int) -> Drawn:
    """One batch by one method."""
    method = contender.build([job.task.layout for job in jobs])
    guide = Guide(pipe, method) if method is not None else None
    cuda = next(pipe.unet.parameters()).is_cuda
    _settle(cuda)
    reset_peak(cuda)
    with guide or nullcontext():
        began = time.perf_counter()
        pictures = pipe(
            [job.task.caption for job in jobs],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=[job.noise() for job in jobs],
        ).images
        if cuda:
            torch.cuda.synchronize()
        seconds, memory = time.perf_counter() - began, peak(cuda)
    if guide is None or method is None or method.inert:
        rows = 2 if GUIDANCE_SCALE > 1 else 1
        return Drawn(pictures, seconds, memory, float(rows * len(pipe.scheduler.timesteps)), 0.0)
    return Drawn(pictures, seconds, memory, guide.report.forwards, guide.report.backwards)


def _settle(cuda: bool) -> None:
    """Give freed memory back, so that one method's peak is not counted for the next."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)


def _draw_all(
    pipe: Any,
    batches: list[list[Job]],
    chosen: list[Contender],
    steps: int,
    ledger: "_Ledger",
    out: Path | None,
    progress: bool,
) -> list[Record]:
    def shown(jobs: list[Job]) -> list[Job]:
        return [j for j in jobs if out is not None and j.seed == 0 and j.task.index < ON_SHEET]

    def is_done(number: int) -> bool:
        wanted = [_picture(out, j.task, c) for j in shown(batches[number]) for c in chosen if out is not None]
        return number in ledger.records and all(path.exists() for path in wanted)

    left = [n for n in range(len(batches)) if not is_done(n)]
    if left:
        for contender in chosen:
            draw(pipe, batches[left[0]], contender, min(steps, WARMUP_STEPS))
    pictures = sum(map(len, batches)) * len(chosen)
    before = pictures - sum(len(batches[n]) for n in left) * len(chosen)
    with tqdm(total=pictures, initial=before, unit="picture", disable=not progress) as bar:
        for number in left:
            jobs = batches[number]
            record: Record = {"batch": number, "runs": {}}
            for contender in chosen:
                bar.set_description(contender.label)
                drawn = draw(pipe, jobs, contender, steps)
                record["runs"][contender.label] = _account(jobs, drawn)
                if out is not None:
                    for job in shown(jobs):
                        path = _picture(out, job.task, contender)
                        path.parent.mkdir(exist_ok=True)
                        drawn.pictures[jobs.index(job)].save(path)
                bar.update(len(jobs))
            ledger.add(record)
    return [ledger.records[n] for n in range(len(batches))]


def _account(jobs: Sequence[Job], drawn: Drawn) -> dict[str, Any]:
    """What is kept of a batch: its cost and the score of each picture."""
    scores = []
    for job, picture in zip(jobs, drawn.pictures, strict=True):
        s = score(detect(picture), job.task.scene)
        scores.append({"scene": job.task.index, "seed": job.seed, **_counts(s)})
    cost = {key: getattr(drawn, key) for key in ("seconds", "memory", "forwards", "backwards")}
    return {**cost, "pictures": scores}


def _counts(s: Score) -> dict[str, int]:
    counts = {key: int(getattr(s, key)) for key in ("wanted", "present", "centred", "in_box", "extra")}
    return {**counts, "complete": int(s.complete)}


def summary(label: str, records: Sequence[Record]) -> dict[str, Any]:
    """A row of the result.

    Shares and `extra_objects` (for each picture) resample scenes, each with all its pictures; costs resample batches.
    `seconds` is for each picture, `memory` (MiB) is the mean of the batches' peaks.
    """
    runs = [r["runs"][label] for r in records]
    plain = [r["runs"][PLAIN] for r in records]
    sizes = [len(r["pictures"]) for r in runs]
    seconds, memory = [r["seconds"] for r in runs], [r["memory"] for r in runs]
    return {
        "method": label,
        "n": sum(sizes),
        **shares([p for r in runs for p in r["pictures"]]),
        "seconds_ratio": ratio(seconds, [r["seconds"] for r in plain]),
        "memory_ratio": ratio(memory, [r["memory"] for r in plain]),
        "forwards": ratio([r["forwards"] * n for r, n in zip(runs, sizes, strict=True)], sizes),
        "backwards": ratio([r["backwards"] * n for r, n in zip(runs, sizes, strict=True)], sizes),
        "seconds": ratio(seconds, sizes),
        "memory": ratio(memory, [1.0] * len(memory)),
    }


def shares(pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
    """What was drawn, from the counts of each picture."""
    scenes = sorted({p["scene"] for p in pictures})
    of = {s: [p for p in pictures if p["scene"] == s] for s in scenes}

    def total(key: str) -> list[int]:
        return [sum(p[key] for p in of[s]) for s in scenes]

    drawn, wanted = [len(of[s]) for s in scenes], total("wanted")
    return {
        "objects_present": ratio(total("present"), wanted),
        "scenes_complete": ratio(total("complete"), drawn),
        "objects_in_box": ratio(total("in_box"), wanted),
        "objects_centred": ratio(total("centred"), wanted),
        "extra_objects": ratio(total("extra"), drawn),
    }


def detector_figures(tasks: Sequence[Task]) -> dict[str, Any]:
    """The detector's own figures on the drawn truth of these scenes: what it misses, no method can have right."""
    truth = [{"scene": t.index, **_counts(score(detect(render(t.scene)), t.scene))} for t in tasks]
    return {"n": len(tasks), **shares(truth)}


def _machine(pipe: Any) -> dict[str, Any]:
    weight = next(pipe.unet.parameters())
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return {"device": device, "dtype": str(weight.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}


class _Ledger:
    """Records of batches by number, kept in a file of JSON lines, the first of which tells what the run depends on."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.records = path, {}
        head = json.dumps(key, sort_keys=True)
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and lines[0] == head:
            self.records: dict[int, Record] = {r["batch"]: r for r in _whole(lines[1:])}
        # written anew: a killed run may have left half a line
        kept = [head, *(json.dumps(r) for r in self.records.values())]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, record: Record) -> None:
        self.records[record["batch"]] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _whole(lines: list[str]) -> list[Record]:
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _picture(out: Path | None, task: Task, contender: Contender) -> Path:
    assert out is not None
    return out / "pictures" / f"{task.index:03d}-{contender.label}.png"


def _sheet(out: Path, tasks: Sequence[Task], chosen: Sequence[Contender], records: Sequence[Record]) -> dict[str, str]:
    """Write `contact_sheet.png`; gives its name and caption."""
    scores = {
        (label, p["scene"]): p
        for r in records
        for label, run in r["runs"].items()
        for p in run["pictures"]
        if p["seed"] == 0
    }
    rows = []
    for task in tasks:
        pictures, notes = [render(task.scene)], ["found, in its box:"]
        for contender in chosen:
            with Image.open(_picture(out, task, contender)) as picture:
                pictures.append(picture.convert("RGB"))
            s = scores[contender.label, task.index]
            extra = f", {s['extra']} extra" if s["extra"] else ""
            notes.append(f"{s['present']}/{s['wanted']}, {s['in_box']}/{s['wanted']}{extra}")
        rows.append(Row(task.caption, [thing.box for thing in task.scene.things], pictures, notes))
    contact_sheet(["truth", *(c.label for c in chosen)], rows).save(out / "contact_sheet.png")
    caption = (
        f"The first {len(tasks)} scenes of the list with seed 0, not chosen; wanted boxes in magenta; below each "
        "picture how many of the wanted things were found, how many in their box, and what else was there."
    )
    return {"file": "contact_sheet.png", "caption": caption}
