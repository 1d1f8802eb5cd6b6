"""Do things stand where the layout says? Held-out scenes drawn by each method and read by the detector.

Every method draws the same scenes from the same noise. Each batch is drawn by one method after the other, the plain
pipeline first, so that what the machine does meanwhile falls on all of them alike.
"""

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

from diffguide.bench.contenders import PLAIN, Contender, contenders
from diffguide.bench.drawing import GUIDANCE_SCALE, Drawn, Job, draw, machine
from diffguide.bench.ledger import Ledger, Record
from diffguide.bench.models import load
from diffguide.bench.scenes import Task, load_tasks
from diffguide.bench.sheet import Row, contact_sheet
from diffguide.bench.statistics import Interval, ratio
from diffguide.zoo.detector import Score, detect, score
from diffguide.zoo.world import render

OPTIONS = ("methods", "limit", "seeds", "batch", "steps", "workers")
METHODS = (PLAIN, "attend-excite", "backward-guidance", "bacon")
STEPS = 30
SEEDS = 2
BATCH = 10
ON_SHEET = 12  # scenes: the first of the list, with seed 0
WARMUP_STEPS = 2


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
    workers: int = 1,
    source: tuple[Any, ...] = (),
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and score; `frame` tells what else the figures depend on.

    Batches that were drawn are kept in the file `part`; a run with the same settings goes on after them. With several
    `workers` each is a process of one thread with its own pipeline, loaded from `source`.
    """
    chosen = contenders(methods)
    tasks = load_tasks(limit)
    jobs = [Job(task, seed) for seed in range(seeds) for task in tasks]
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    settings = {
        "scenes": len(tasks),
        "seeds": seeds,
        "steps": steps,
        "scheduler": "DDIM" if hasattr(pipe.scheduler, "alphas_cumprod") else type(pipe.scheduler).__name__,
        "guidance_scale": GUIDANCE_SCALE,
        "batch": batch,
        **machine(pipe),
        **({"workers": workers, "threads": 1} if workers > 1 else {}),
    }
    ledger = Ledger(part, {**frame, "settings": settings, "methods": [c.label for c in chosen]})
    with prepared(pipe):
        records = _draw_all(pipe, batches, chosen, steps, ledger, out, progress, workers, source)
    found: dict[str, Any] = {
        "rows": [summary(c.label, records) for c in chosen],
        "detector": detector_figures(tasks),
        "settings": settings,
        "intervals": "95 % bootstrap, over scenes for what was drawn, over batches for what it cost; n counts pictures",
    }
    if out is not None:
        found["sheet"] = _sheet(out, tasks[:ON_SHEET], chosen, records)
    return found


@contextlib.contextmanager
def prepared(pipe: Any) -> Iterator[Any]:
    """The pipeline with the bench's scheduler and no bars of its own, and as it was in the end."""
    plain, bars = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    if hasattr(plain, "alphas_cumprod"):  # flows keep their own: DDIM cannot draw them
        pipe.scheduler = DDIMScheduler.from_config(plain.config)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield pipe
    finally:
        pipe.scheduler = plain
        pipe.set_progress_bar_config(**bars)


def _draw_all(
    pipe: Any,
    batches: list[list[Job]],
    chosen: list[Contender],
    steps: int,
    ledger: Ledger,
    out: Path | None,
    progress: bool,
    workers: int,
    source: tuple[Any, ...],
) -> list[Record]:
    def is_done(number: int) -> bool:
        wanted = [_picture(out, j.task, c) for j in _shown(batches[number], out) for c in chosen]
        return number in ledger.records and all(path.exists() for path in wanted)

    left = [n for n in range(len(batches)) if not is_done(n)]
    pictures = sum(map(len, batches)) * len(chosen)
    before = pictures - sum(len(batches[n]) for n in left) * len(chosen)
    with tqdm(total=pictures, initial=before, unit="picture", disable=not progress) as bar:
        if workers > 1 and left:
            spawn = multiprocessing.get_context("spawn")
            begin = (source, chosen, batches[left[0]], steps)
            with ProcessPoolExecutor(min(workers, len(left)), spawn, initializer=_open, initargs=begin) as pool:
                for done in as_completed(pool.submit(_draw_one, n, batches[n], chosen, steps, out) for n in left):
                    ledger.add(record := done.result())
                    bar.update(len(batches[record["batch"]]) * len(chosen))
        elif left:
            _warm_up(pipe, chosen, batches[left[0]], steps)
            for n in left:
                ledger.add(_draw(pipe, n, batches[n], chosen, steps, out, bar))
    return [ledger.records[n] for n in range(len(batches))]


def _warm_up(pipe: Any, chosen: list[Contender], jobs: list[Job], steps: int) -> None:
    for contender in chosen:
        draw(pipe, jobs, contender, min(steps, WARMUP_STEPS))


def _draw(
    pipe: Any,
    number: int,
    jobs: list[Job],
    chosen: list[Contender],
    steps: int,
    out: Path | None,
    bar: Any = None,
) -> Record:
    """A batch by every contender, one after the other, and the pictures that the sheet shows."""
    record: Record = {"batch": number, "runs": {}}
    for contender in chosen:
        if bar is not None:
            bar.set_description(contender.label)
        drawn = draw(pipe, jobs, contender, steps)
        record["runs"][contender.label] = _account(jobs, drawn)
        for job in _shown(jobs, out):
            path = _picture(out, job.task, contender)
            path.parent.mkdir(exist_ok=True)
            drawn.pictures[jobs.index(job)].save(path)
        if bar is not None:
            bar.update(len(jobs))
    return record


def _shown(jobs: list[Job], out: Path | None) -> list[Job]:
    return [j for j in jobs if out is not None and j.seed == 0 and j.task.index < ON_SHEET]


_mine: list[Any] = []  # a worker's own pipeline
_worker = contextlib.ExitStack()  # what lasts as long as the worker


def _open(source: tuple[Any, ...], chosen: list[Contender], jobs: list[Job], steps: int) -> None:
    """Begin a worker."""
    torch.set_num_threads(1)
    pipe, _ = load(*source)
    _mine.append(_worker.enter_context(prepared(pipe)))
    _warm_up(pipe, chosen, jobs, steps)


def _draw_one(number: int, jobs: list[Job], chosen: list[Contender], steps: int, out: Path | None) -> Record:
    return _draw(_mine[0], number, jobs, chosen, steps, out)


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
