"""What benches of pictures share: tasks drawn by each contender from the same noise, read, shown on a sheet.

Each batch is drawn by one contender after the other, the plain pipeline first, so that what the machine does meanwhile
falls on all of them alike.
"""

import contextlib
import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from PIL import Image
from tqdm import tqdm

from diffguide.bench.contenders import PLAIN, Contender, contenders
from diffguide.bench.drawing import GUIDANCE_SCALE, Drawn, Job, Task, draw, machine
from diffguide.bench.ledger import Ledger, Record
from diffguide.bench.models import load
from diffguide.bench.sheet import Row, contact_sheet
from diffguide.bench.statistics import Interval
from diffguide.bench.summary import pooled, ranked, summary
from diffguide.errors import ParamError

OPTIONS = ("methods", "against", "limit", "seeds", "batch", "steps", "workers", "guidance_scale")
STEPS = 30
SEEDS = 2
BATCH = 10
ON_SHEET = 12  # tasks: the first of the list, with seed 0
WARMUP_STEPS = 2

Gains = dict[str, tuple[str, str | None]]  # of each metric the count above and below, None for pictures


class PictureBench(ABC):
    """What is drawn, and how a picture is read."""

    methods: ClassVar[tuple[str, ...]]  # compared unless others are named
    layouts: ClassVar[bool] = True  # whether they are of the tasks; else planned, for methods that need one
    rank: ClassVar[str]  # the metric, more of it being better, by which methods are ranked
    gains: ClassVar[Gains]  # metrics that are compared scene by scene, with the counts they are shares of
    told: ClassVar[str]  # below the contact sheet
    losses: ClassVar[bool] = False  # whether the last loss is told: of one method, in several ways
    batch: ClassVar[int] = BATCH  # pictures at once
    seeds: ClassVar[int] = SEEDS

    @abstractmethod
    def tasks(self, limit: int | None) -> Sequence[Task]:
        """The first `limit` of the fixed list."""

    @abstractmethod
    def counts(self, picture: Image.Image, task: Any) -> dict[str, int]:
        """What is kept of a picture."""

    @abstractmethod
    def shares(self, pictures: Sequence[dict[str, int]]) -> dict[str, Interval]:
        """What was drawn, from the counts of each picture."""

    @abstractmethod
    def row(self, task: Any) -> Row:
        """The beginning of the task's row on the sheet."""

    @abstractmethod
    def note(self, counts: dict[str, int]) -> str:
        """A word on a picture of the sheet."""

    def contenders(self, methods: Sequence[str] | None = None) -> list[Contender]:
        """Who is compared; raises ParamError if one cannot be."""
        return contenders(self.methods if methods is None else methods, layouts=self.layouts)

    def pools(self, chosen: Sequence[Contender]) -> dict[str, list[str]]:
        """Rows that sum up several contenders: their labels."""
        return {}

    def extras(self, tasks: Sequence[Any]) -> dict[str, Any]:
        """Further parts of the result."""
        return {}

    def show(self, chosen: Sequence[Any]) -> Sequence[Any]:
        """Tasks for the sheet."""
        return chosen[:ON_SHEET]


def check(bench: PictureBench, methods: Sequence[str] | None = None, against: str | None = None) -> None:
    """Raise ParamError where `run` would, before a model is loaded."""
    _rows(bench, bench.contenders(methods), against)


def _rows(
    bench: PictureBench, chosen: Sequence[Contender], against: str | None
) -> tuple[list[str], dict[str, list[str]]]:
    """The labels of the result's rows, and of those among them that sum up others."""
    pools = bench.pools(chosen)
    labels = [*(c.label for c in chosen), *pools]
    if against not in (None, *labels):
        raise ParamError(f"against = {against!r} is not compared here (these are: {', '.join(labels)})")
    return labels, pools


def run(
    bench: PictureBench,
    pipe: Any,
    frame: dict[str, Any],
    *,
    methods: Sequence[str] | None = None,
    against: str | None = None,
    limit: int | None = None,
    seeds: int | None = None,
    batch: int | None = None,
    steps: int = STEPS,
    workers: int = 1,
    guidance_scale: float = GUIDANCE_SCALE,
    source: tuple[Any, ...] = (),
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw and score; `frame` tells what else the figures depend on, `against` what gains are above, else plain.

    Batches that were drawn are kept in the file `part`; a run with the same settings goes on after them. With several
    `workers` each is a process of one thread with its own pipeline, loaded from `source`.
    """
    chosen = bench.contenders(methods)
    labels, pools = _rows(bench, chosen, against)
    seeds, batch = seeds or bench.seeds, batch or bench.batch
    tasks = bench.tasks(limit)
    shown = {task.index for task in bench.show(tasks)} if out is not None else set()
    jobs = [Job(task, seed, guidance_scale) for seed in range(seeds) for task in tasks]
    batches = [jobs[i : i + batch] for i in range(0, len(jobs), batch)]
    settings = {
        "scenes": len(tasks),
        "seeds": seeds,
        "steps": steps,
        "scheduler": "DDIM" if hasattr(pipe.scheduler, "alphas_cumprod") else type(pipe.scheduler).__name__,
        "guidance_scale": float(guidance_scale),
        "batch": batch,
        **machine(pipe),
        **({"workers": workers, "threads": 1} if workers > 1 else {}),
    }
    ledger = Ledger(part, {**frame, "settings": settings, "methods": [c.label for c in chosen]})
    with prepared(pipe):
        artist = Artist(bench, chosen, steps, out, shown)
        records = artist.draw_all(pipe, batches, ledger, progress, workers, source)
    for record in records:
        record["runs"] |= {name: pooled([record["runs"][label] for label in some]) for name, some in pools.items()}
    rows = [summary(bench, label, records, against or PLAIN) for label in labels]
    found: dict[str, Any] = {
        "rows": rows,
        "ranking": {"by": bench.rank, "methods": ranked(rows, bench.rank)},
        **({"against": against} if against else {}),
        **bench.extras(tasks),
        "settings": settings,
        "intervals": "95 % bootstrap, over scenes for what was drawn, over batches for what it cost; n counts pictures",
    }
    if out is not None:
        found["sheet"] = artist.sheet([t for t in tasks if t.index in shown], records)
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


class Artist:
    """Draws batches with every contender. Sent to workers, which load pipelines of their own."""

    def __init__(
        self, bench: PictureBench, chosen: list[Contender], steps: int, out: Path | None, shown: set[int]
    ) -> None:
        self.bench, self.chosen, self.steps, self.out, self.shown = bench, chosen, steps, out, shown

    def draw_all(
        self,
        pipe: Any,
        batches: list[list[Job]],
        ledger: Ledger,
        progress: bool,
        workers: int,
        source: tuple[Any, ...],
    ) -> list[Record]:
        """The records of all batches, those of the ledger not drawn again."""
        left = [n for n, batch in enumerate(batches) if not self.is_done(n, batch, ledger)]
        pictures = sum(map(len, batches)) * len(self.chosen)
        before = pictures - sum(len(batches[n]) for n in left) * len(self.chosen)
        with tqdm(total=pictures, initial=before, unit="picture", disable=not progress) as bar:
            if workers > 1 and left:
                spawn = multiprocessing.get_context("spawn")
                begin = (self, source, batches[left[0]])
                with ProcessPoolExecutor(min(workers, len(left)), spawn, initializer=_open, initargs=begin) as pool:
                    try:
                        for done in as_completed([pool.submit(_draw_one, self, n, batches[n]) for n in left]):
                            ledger.add(record := done.result())
                            bar.update(len(batches[record["batch"]]) * len(self.chosen))
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)  # or it would draw all that is left first
                        raise
            elif left:
                self.warm_up(pipe, batches[left[0]])
                for n in left:
                    ledger.add(self.draw(pipe, n, batches[n], bar))
        return [ledger.records[n] for n in range(len(batches))]

    def is_done(self, number: int, batch: list[Job], ledger: Ledger) -> bool:
        wanted = [self.path(j.task, c) for j in self.on_sheet(batch) for c in self.chosen]
        return number in ledger.records and all(path.exists() for path in wanted)

    def warm_up(self, pipe: Any, jobs: list[Job]) -> None:
        for contender in self.chosen:
            draw(pipe, jobs, contender, min(self.steps, WARMUP_STEPS))

    def draw(self, pipe: Any, number: int, jobs: list[Job], bar: Any = None) -> Record:
        """A batch by every contender, one after the other, and the pictures that the sheet shows."""
        record: Record = {"batch": number, "runs": {}}
        for contender in self.chosen:
            if bar is not None:
                bar.set_description(contender.label)
            drawn = draw(pipe, jobs, contender, self.steps)
            record["runs"][contender.label] = account(self.bench, jobs, drawn)
            for job in self.on_sheet(jobs):
                path = self.path(job.task, contender)
                path.parent.mkdir(exist_ok=True)
                drawn.pictures[jobs.index(job)].save(path)
            if bar is not None:
                bar.update(len(jobs))
        return record

    def on_sheet(self, jobs: list[Job]) -> list[Job]:
        return [j for j in jobs if j.seed == 0 and j.task.index in self.shown]

    def path(self, task: Task, contender: Contender) -> Path:
        assert self.out is not None
        return self.out / "pictures" / f"{task.index:03d}-{contender.label}.png"

    def sheet(self, tasks: Sequence[Task], records: Sequence[Record]) -> dict[str, str]:
        """Write `contact_sheet.png`; gives its name and caption."""
        assert self.out is not None
        scores = {
            (label, p["scene"]): p
            for r in records
            for label, run in r["runs"].items()
            for p in run["pictures"]
            if p["seed"] == 0
        }
        rows = []
        for task in tasks:
            begun = self.bench.row(task)
            pictures, notes = list(begun.pictures), list(begun.notes)
            for contender in self.chosen:
                with Image.open(self.path(task, contender)) as picture:
                    pictures.append(picture.convert("RGB"))
                notes.append(self.bench.note(scores[contender.label, task.index]))
            rows.append(Row(begun.caption, begun.boxes, pictures, notes))
        titles = ["truth"] * (len(rows[0].pictures) - len(self.chosen)) + [c.label for c in self.chosen]
        contact_sheet(titles, rows).save(self.out / "contact_sheet.png")
        return {"file": "contact_sheet.png", "caption": self.bench.told.format(count=len(tasks))}


_mine: list[Any] = []  # a worker's own pipeline
_worker = contextlib.ExitStack()  # what lasts as long as the worker


def end_with_parent() -> None:
    """End this worker when the process that began it is gone: killed, it leaves nobody to send pictures to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _open(artist: Artist, source: tuple[Any, ...], jobs: list[Job]) -> None:
    """Begin a worker."""
    end_with_parent()
    torch.set_num_threads(1)
    pipe, _ = load(*source)
    _mine.append(_worker.enter_context(prepared(pipe)))
    artist.warm_up(pipe, jobs)


def _draw_one(artist: Artist, number: int, jobs: list[Job]) -> Record:
    return artist.draw(_mine[0], number, jobs)


def account(bench: PictureBench, jobs: Sequence[Job], drawn: Drawn) -> dict[str, Any]:
    """What is kept of a batch: its cost and the counts of each picture."""
    scores = [
        {"scene": job.task.index, "seed": job.seed, **bench.counts(picture, job.task)}
        for job, picture in zip(jobs, drawn.pictures, strict=True)
    ]
    cost = {key: getattr(drawn, key) for key in ("seconds", "memory", "forwards", "backwards", "loss")}
    return {**cost, "pictures": scores}
