"""A recipe drawn in a worker thread: previews on the way, an end at the next step, one job at a time on a device."""

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffguide.app.preview import Previews
from diffguide.errors import DiffguideError, ModelError
from diffguide.explain import Plan
from diffguide.pipelines import run as drawing
from diffguide.pipelines.source import load, usable
from diffguide.processors import named
from diffguide.recipe import Recipe

BEAT = 0.4  # seconds between signs of life: how long a cancel may wait for the one who listens
PATIENCE = 5.0  # seconds that one who leaves waits for the worker to end
_locks: dict[str, threading.Lock] = defaultdict(threading.Lock)  # by device


class StoppedError(Exception):
    """The one who listened is gone."""


@dataclass(frozen=True)
class Progress:
    """A sign of life.

    `preview` is a data URL of a small JPEG where there is a new one. `step` counts the steps done, of `steps`;
    `picture` counts from 1, of `pictures`.
    """

    text: str
    step: int = 0
    steps: int = 0
    picture: int = 1
    pictures: int = 1
    seconds: float = 0.0
    preview: str | None = None


@dataclass(frozen=True)
class Drawn:
    """A picture, and for each word its map after each step: float32 [steps, h, w], empty where none was asked for."""

    picture: drawing.Picture
    maps: dict[str, np.ndarray] = field(default_factory=dict)


class Runner:
    """The models that an editor serves: one in memory at a time, one job at a time on its device.

    Args:
        models: names, folders or hub ids; the first is the default.
        device, dtype: see `pipelines.load`.

    Raises:
        ModelError, ParamError: a model is not to be found, or the device or dtype cannot be used.
    """

    def __init__(self, models: Sequence[str], device: str | None = None, dtype: str = "float32") -> None:
        self.models = tuple(dict.fromkeys(models))
        if not self.models:
            raise ModelError("no model to serve; name one by --model")
        self.device, self.dtype = str(usable(device)), dtype
        self.plans: dict[Any, Plan] = {}  # of `explain`, kept by whoever asks
        self._held: tuple[str, Any] | None = None
        self.workers: set[threading.Thread] = set()  # that are drawing, or waiting for the device

    @property
    def lock(self) -> threading.Lock:
        return _locks[self.device]

    @contextmanager
    def free(self) -> Iterator[bool]:
        """Have the device, if it is free this moment."""
        got = self.lock.acquire(blocking=False)
        try:
            yield got
        finally:
            if got:
                self.lock.release()

    def pipe(self, model: str) -> Any:
        """The pipeline; to be called by whoever has the lock. Raises ModelError for a model that is not served."""
        self.check(model)
        if self._held is None or self._held[0] != model:
            self._held = None  # two models may not fit
            self._held = model, load(model, self.dtype, self.device)
        return self._held[1]

    def peek(self, model: str) -> Any:
        """The pipeline, to look at: at once where it is loaded, else when the device is free."""
        self.check(model)
        held = self._held
        if held is not None and held[0] == model:
            return held[1]
        with self.lock:
            return self.pipe(model)

    def check(self, model: str) -> None:
        """A recipe is a stranger's file: it may name a model, not make us load or download one."""
        if model not in self.models:
            raise ModelError(
                f"this editor serves {', '.join(self.models)}, not {model!r:.100}; start it with --model for that one"
            )

    def draw(self, recipe: Recipe, *, maps: bool = True) -> Generator[Progress | Drawn, None, None]:
        """Signs of life, and each picture as it is done.

        Closing the iterator ends the drawing at its next step. With `maps`, the maps of every word are kept.

        Raises:
            DiffguideError: something in the recipe is wrong, or the device is out of memory.
        """
        told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        worker = threading.Thread(target=self._work, args=(recipe, maps, told, stop), daemon=True)
        self.workers.add(worker)
        worker.start()
        last, began = Progress("waiting for the device"), time.monotonic()
        try:
            while True:
                try:
                    message = told.get(timeout=BEAT)
                except queue.Empty:
                    message = last
                if message is None:
                    return
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, Progress):
                    preview = message.preview
                    last = replace(message, seconds=time.monotonic() - began, preview=None)
                    message = replace(last, preview=preview)
                yield message
        finally:
            stop.set()
            worker.join(PATIENCE)

    def _work(self, recipe: Recipe, maps: bool, told: "queue.SimpleQueue[Any]", stop: threading.Event) -> None:
        try:
            while not self.lock.acquire(timeout=BEAT):
                if stop.is_set():
                    return
            try:
                if not stop.is_set():
                    self._draw(recipe, maps, told, stop)
            finally:
                self.lock.release()
            told.put(None)
        except StoppedError:
            pass
        except Exception as error:  # the page shows it
            told.put(_explained(error))
        finally:
            self.workers.discard(threading.current_thread())

    def _draw(self, recipe: Recipe, maps: bool, told: "queue.SimpleQueue[Any]", stop: threading.Event) -> None:
        told.put(Progress(f"loading {recipe.model}" if self._held is None else "starting", pictures=recipe.num_images))
        pipe = self.pipe(recipe.model)
        previews = Previews(pipe)
        watched = _Watched()
        number = 1

        def on_step(step: drawing.Step) -> None:
            if stop.is_set():
                raise StoppedError
            if maps:
                watched.see(step)
            text = f"step {step.number + 1} of {step.steps}"
            if recipe.num_images > 1:
                text = f"picture {number} of {recipe.num_images}, {text}"
            preview = previews.of(step.latents)
            told.put(Progress(text, step.number + 1, step.steps, number, recipe.num_images, 0.0, preview))

        own = any(named(spec.name).mode == "maps" for spec in recipe.methods)  # they say what is to be seen
        for picture in drawing.draw(recipe, pipe, capture_maps=maps and not own, progress=False, on_step=on_step):
            if stop.is_set():
                raise StoppedError
            told.put(Drawn(picture, watched.taken()))
            number += 1


class _Watched:
    """Maps after each step, from the means over all steps so far that a guide keeps."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.steps: dict[str, list[np.ndarray]] = {}

    def see(self, step: drawing.Step) -> None:
        observers = [m for m in step.guide.methods if m.asks("observe")]
        acting = [sum(m.acts_at(i, step.steps) for i in range(step.number + 1)) for m in observers]
        if not observers or not observers[-1].acts_at(step.number, step.steps):
            return
        for word, mean in step.guide.maps.items():
            total = mean[0].astype(np.float64) * acting[-1]
            before = self.sums.get(word, 0.0)
            self.steps.setdefault(word, []).append(np.maximum(total - before, 0).astype(np.float32))
            self.sums[word] = total

    def taken(self) -> dict[str, np.ndarray]:
        """What was seen, forgotten here."""
        found = {word: np.stack(maps) for word, maps in self.steps.items()}
        self.sums, self.steps = {}, {}
        return found


def _explained(error: Exception) -> Exception:
    """An error as the page may show it: ours as they are, lack of memory with its remedy."""
    if not isinstance(error, DiffguideError) and type(error).__name__ == "OutOfMemoryError":
        return ModelError(
            "the device is out of memory; draw a smaller picture, or start the editor with --dtype float16"
        )
    return error
