"""One batch drawn by one contender, and what it cost."""

import ctypes
import gc
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from diffguide.bench.contenders import Contender
from diffguide.guide import Guide
from diffguide.layout import Layout
from diffguide.registry import of_pipe
from diffguide.report import peak, reset_peak
from diffguide.zoo import GUIDANCE_SCALE, no_zeros


class Task(Protocol):
    """What is drawn: number in its list, prompt, and layout."""

    @property
    def index(self) -> int: ...
    @property
    def caption(self) -> str: ...
    @property
    def layout(self) -> Layout: ...


@dataclass(frozen=True)
class Job:
    """One picture to be drawn."""

    task: Any  # a Task
    seed: int
    guidance_scale: float = GUIDANCE_SCALE  # 1 and less: no classifier-free guidance

    def noise(self) -> torch.Generator:
        """Depends on scene and seed alone, not on the method, the batch or the device."""
        return torch.Generator("cpu").manual_seed(1000 * self.task.index + self.seed)


@dataclass(frozen=True)
class Drawn:
    """A batch of pictures and its cost: seconds and MiB for the batch, forwards and backwards for each picture.

    `loss` is the last one of the run, the mean over pictures, if it was asked for.
    """

    pictures: list[Image.Image]
    seconds: float
    memory: float
    forwards: float
    backwards: float
    loss: float | None = None


@dataclass(frozen=True)
class Painted:
    """Pictures, and what they took: denoiser rows and backward passes for each; perhaps the last loss."""

    pictures: list[Image.Image]
    forwards: float
    backwards: float
    loss: float | None = None


def draw(pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int) -> Drawn:
    """One batch by one contender."""
    paint = contender.peer or guided
    cuda = denoiser_weight(pipe).is_cuda
    settle(cuda)
    reset_peak(cuda)
    began = time.perf_counter()
    painted = paint(pipe, jobs, contender, steps)
    if cuda:
        torch.cuda.synchronize()
    seconds, memory = time.perf_counter() - began, peak(cuda)
    return Drawn(painted.pictures, seconds, memory, painted.forwards, painted.backwards, painted.loss)


def guided(pipe: Any, jobs: Sequence[Job], contender: Contender, steps: int, **more: Any) -> Painted:
    """A batch by the pipeline under a guide, or by the plain one; `more` settings of the method."""
    method = contender.build([job.task.layout for job in jobs], **more)
    guide = Guide(pipe, method) if method is not None else None
    with guide or nullcontext():
        pictures = pipe(
            [job.task.caption for job in jobs],
            num_inference_steps=steps,
            guidance_scale=jobs[0].guidance_scale,
            generator=[job.noise() for job in jobs],
            **no_zeros(pipe),
        ).images
    if guide is None or method is None or method.inert:
        rows = 2 if jobs[0].guidance_scale > 1 else 1
        return Painted(pictures, float(rows * len(pipe.scheduler.timesteps)), 0.0)
    return Painted(pictures, guide.report.forwards, guide.report.backwards, last_loss(guide))


def last_loss(guide: Guide) -> float | None:
    """The mean over pictures of the sum of the methods' losses in the last gradient pass."""
    if not guide.report.steps:
        return None
    each = list(zip(*guide.report.steps[-1].losses[-1].values(), strict=True))
    return sum(map(sum, each)) / len(each)


def denoiser_weight(pipe: Any) -> torch.Tensor:
    return next(getattr(pipe, of_pipe(pipe)[1]).parameters())


def settle(cuda: bool) -> None:
    """Give freed memory back, so that one method's peak is not counted for the next."""
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have none
        if trim is not None:
            trim(0)


def machine(pipe: Any) -> dict[str, Any]:
    weight = denoiser_weight(pipe)
    device = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
    return {"device": device, "dtype": str(weight.dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
