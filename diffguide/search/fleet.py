"""Jobs spread over Ray actors that each hold something costly, such as a pipeline. Actors that die are made again.

Ray is imported when a crew is called together, not before.
"""

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffguide.errors import ParamError, SearchError
from diffguide.params import Param

Work = Callable[[Any, Any], Any]  # what is held, a job -> its result
Begin = Callable[[Any], None]


@dataclass(frozen=True)
class Fleet:
    """Ray actors, and where they are.

    Attributes:
        workers: how many; None for one on each GPU, or a single one where there are none.
        address: of a cluster that runs, as `ray.init` takes it: "auto", "HOST:6379", "ray://HOST:10001"; None begins
            one on this machine, which ends with the crew.
        gpu: whether each actor has a GPU of its own; None where the cluster has any.
        retries: how often a job is given out again when the actor that had it died.
    """

    workers: int | None = None
    address: str | None = None
    gpu: bool | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        if self.workers is not None:
            Param("workers", int, None, "whole and at least 1", 1, None).check("Fleet", self.workers)
        Param("retries", int, 2, "whole and at least 0", 0, None).check("Fleet", self.retries)

    @contextmanager
    def crew(self, make: Callable[[int], Any]) -> Iterator["Crew"]:
        """Actors that each hold `make(how many there are)`, a function that can be pickled.

        Raises:
            SearchError: Ray is not installed, there is no cluster at the address, or this process has one already.
            ParamError: this machine has fewer GPUs than workers that want one.
        """
        ray = _ray()
        begun = not ray.is_initialized()
        if begun:
            self.begin()
        elif self.address is not None:
            raise SearchError(
                f"Ray is at work in this process already, so the address {self.address!r} cannot be taken"
            )
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            gpu = gpus > 0 if self.gpu is None else self.gpu
            workers = self.workers or (gpus if gpu else 1) or 1
            if gpu and workers > gpus and self.address is None:
                raise ParamError(f"workers = {workers}, but there are {gpus} GPUs; ask for fewer, or for the cpu")
            crew = Crew(ray, make, workers, gpu, self.retries)
            try:
                yield crew
            finally:
                crew.dismiss()
        finally:
            if begun:
                ray.shutdown()

    def begin(self) -> None:
        """Connect to the cluster, or begin one; raises SearchError where that cannot be done."""
        ray = _ray()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        # workers do the driver's own work: at Ray's niceness of 15 any other program starves them
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            if self.address is not None:
                ray.init(address=self.address, **quiet)
            else:
                cores = max(self.workers or 1, os.cpu_count() or 1)
                ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = "on this machine" if self.address is None else f"at {self.address!r}"
            raise SearchError(f"no Ray cluster {where}: {_short(error)}") from None


class Crew:
    """Actors at work. What is asked of them goes to whoever is free."""

    def __init__(self, ray: Any, make: Callable[[int], Any], workers: int, gpu: bool, retries: int) -> None:
        self.ray, self.retries = ray, retries
        self._actor = ray.remote(num_cpus=1, num_gpus=int(gpu), max_restarts=0)(_Actor)
        self._make = lambda: make(workers)
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, Any]] = {}  # reference of a result -> actor, job, which is None in the making
        self._stillborn = 0
        for _ in range(workers):
            self._hire()

    def run(self, work: Work, jobs: Iterable[Any], begin: Begin = lambda job: None) -> Iterator[tuple[Any, Any]]:
        """Every job with its result, in the order in which they are done.

        `work` is a function that can be pickled; `begin` is told each job as it is given out. What `work` raises is
        raised here. Raises SearchError, with the job, where one has ended all the actors that it was given to.
        """
        left, deaths = deque(jobs), Counter[str]()
        while left or any(job is not None for _, job in self._busy.values()):
            while left and self._idle:
                actor, job = self._idle.pop(), left.popleft()
                begin(job)
                self._busy[actor.work.remote(work, job)] = actor, job
            (done,), _ = self.ray.wait([*self._busy], num_returns=1)
            actor, job = self._busy.pop(done)
            try:
                result = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:
                if job is None:
                    self._hire()
                else:
                    self._idle.append(actor)
                raise error.cause from None
            except self.ray.exceptions.RayError as error:
                if job is None:
                    self._stillborn += 1
                    self._give_up(self._stillborn, "loading the model", error)
                else:
                    deaths[str(job)] += 1
                    self._give_up(deaths[str(job)], str(job), error)
                    left.appendleft(job)
                self._hire()
                continue
            self._idle.append(actor)
            if job is None:
                self._stillborn = 0
            else:
                yield job, result

    def dismiss(self) -> None:
        """End all actors, whatever they do."""
        for actor in [*self._idle, *(actor for actor, _ in self._busy.values())]:
            self.ray.kill(actor)

    def _hire(self) -> None:
        actor = self._actor.remote(self._make)
        self._busy[actor.ready.remote()] = actor, None

    def _give_up(self, deaths: int, what: str, error: Exception) -> None:
        if deaths > self.retries:
            raise SearchError(f"{what}: the worker died, {deaths} times out of {deaths}; {_short(error)}") from None


class Solo:
    """In this process, one job after the other."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def run(self, work: Work, jobs: Iterable[Any], begin: Begin = lambda job: None) -> Iterator[tuple[Any, Any]]:
        """Every job with its result; `begin` is told each job before it is done."""
        for job in jobs:
            begin(job)
            yield job, work(self.held, job)


class _Actor:
    """What runs in the other process."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def ready(self) -> None:
        self.held = self.make()

    def work(self, work: Work, job: Any) -> Any:
        return work(self.held, job)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise SearchError("Ray is not installed: pip install 'diffguide[ray]'") from None
    return ray


def _short(error: Exception, most: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= most else text[: most - 3] + "..."
