"""The state of a search: written after every trial, so that one that is killed goes on where it was.

`search.json` says what is searched, `trials.jsonl` has a line for each trial, `trials.parquet` is the same as a table.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffguide.errors import SearchError
from diffguide.files import write_atomically

Unit = tuple[int, int]  # layer, head
Key = tuple[int, Unit | None, int | None]  # round, layer and head, steps if fewer


@dataclass(frozen=True)
class Trial:
    """A head beside those chosen before its round; in round -1 none at all.

    `steps` is None where the pictures have as many as the search says, fewer where heads are screened.
    """

    round: int
    unit: Unit | None
    beside: tuple[Unit, ...] = ()
    steps: int | None = None

    def __str__(self) -> str:
        if self.unit is None:
            return "plain"
        layer, head = self.unit
        return f"round {self.round + 1}, L{layer}H{head}" + (f", {self.steps} steps" if self.steps else "")

    @property
    def heads(self) -> list[Unit]:
        return [*self.beside, *([self.unit] if self.unit else [])]

    @property
    def key(self) -> Key:
        return self.round, self.unit, self.steps


@dataclass(frozen=True)
class Job:
    """A trial that was done."""

    round: int
    unit: Unit | None
    scores: list[float]
    seconds: float
    steps: int | None = None

    @property
    def key(self) -> Key:
        return self.round, self.unit, self.steps

    @property
    def score(self) -> float:
        """The mean over pictures; not a number if one of them failed."""
        return sum(self.scores) / len(self.scores)


class State:
    """The trials of a search, kept in a folder, or nowhere.

    Raises SearchError where the folder has the state of another search, or cannot be written.
    """

    def __init__(self, folder: Path | None, plan: dict[str, Any]) -> None:
        self.folder, self.jobs = folder, {}
        if folder is None:
            return
        plan = json.loads(json.dumps(plan))
        file = folder / "search.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if file.exists():
                self._check(file, plan)
            else:
                text = json.dumps(plan, indent=2)
                write_atomically(file, lambda out: out.write(text.encode()))
            self.jobs: dict[Key, Job] = {job.key: job for job in read(folder)}
            # written anew: a search that was killed may have left half a line
            lines = "".join(_line(job) for job in self.jobs.values())
            write_atomically(folder / "trials.jsonl", lambda out: out.write(lines.encode()))
        except OSError as error:
            raise SearchError(f"cannot keep a search in {folder}: {error}") from None

    def _check(self, file: Path, plan: dict[str, Any]) -> None:
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise SearchError(f"{file} is damaged; name another folder, or remove it") from None
        other = [name for name in plan if there.get(name) != plan[name]] or [n for n in there if n not in plan]
        if other:
            ways = [f"{name} ({_short(there.get(name))} there, {_short(plan.get(name))} here)" for name in other]
            raise SearchError(
                f"{file.parent} has a search with other {', '.join(ways)}; name another folder, or remove it"
            )

    def find(self, trial: Trial) -> Job | None:
        return self.jobs.get(trial.key)

    def add(self, job: Job) -> None:
        """Keep a trial; it is on the disk when this returns."""
        self.jobs[job.key] = job
        if self.folder is None:
            return
        with (self.folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(job))
            file.flush()
        self.table()

    def table(self) -> None:
        """Write the trials as a table, where pyarrow is installed."""
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            return
        assert self.folder is not None
        jobs = list(self.jobs.values())
        columns = {
            "round": pa.array([j.round for j in jobs], pa.int32()),
            "layer": pa.array([j.unit[0] if j.unit else None for j in jobs], pa.int32()),
            "head": pa.array([j.unit[1] if j.unit else None for j in jobs], pa.int32()),
            "steps": pa.array([j.steps for j in jobs], pa.int32()),
            "score": pa.array([j.score for j in jobs], pa.float64()),
            "scores": pa.array([j.scores for j in jobs], pa.list_(pa.float64())),
            "seconds": pa.array([j.seconds for j in jobs], pa.float64()),
        }
        write_atomically(self.folder / "trials.parquet", lambda out: pq.write_table(pa.table(columns), out))


def _short(value: Any) -> str:
    """A setting in a few words: long lists, of prompts and heads, by how many they are."""
    if isinstance(value, list) and not all(isinstance(x, int) for x in value):
        return f"{len(value)} of them"
    return "none" if value is None else f"{value!r:.40}"


def read(folder: Path) -> list[Job]:
    """The trials kept in a folder, up to the first damaged line."""
    file, jobs = folder / "trials.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            got = json.loads(line)
            scores = [math.nan if s is None else float(s) for s in got["scores"]]
            unit = tuple(got["unit"]) if got["unit"] else None
            jobs.append(Job(got["round"], unit, scores, got["seconds"], got.get("steps")))
        except (ValueError, KeyError, TypeError):
            break
    return jobs


def _line(job: Job) -> str:
    scores = [s if math.isfinite(s) else None for s in job.scores]
    steps = {} if job.steps is None else {"steps": job.steps}
    return json.dumps({"round": job.round, "unit": job.unit, **steps, "scores": scores, "seconds": job.seconds}) + "\n"
