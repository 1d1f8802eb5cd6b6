"""What a guided run cost, and how its losses went."""

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


@dataclass
class StepReport:
    """One step with a gradient pass: for each pass, each method's loss of each picture.

    NaN where a picture was done.
    """

    step: int
    losses: list[dict[str, list[float]]] = field(default_factory=list)
    skipped: int = 0
    seconds: float = 0.0


@dataclass
class Report:
    """The last run.

    Attributes:
        words: the phrases that a method without a layout worked on, by its name, for each picture.
        steps: the steps that had a gradient pass.
        forwards: denoiser rows evaluated for each picture (plain guidance: two a step), shortened passes included.
        backwards: backward passes for each picture.
        seconds: from the first denoiser call to the last scheduler step.
        peak_memory: MiB, of the accelerator if the denoiser is on one, else of the process.
    """

    words: dict[str, list[list[str]]] = field(default_factory=dict)
    steps: list[StepReport] = field(default_factory=list)
    forwards: float = 0.0
    backwards: float = 0.0
    seconds: float = 0.0
    peak_memory: float = 0.0
    _began: float = field(default=0.0, repr=False)
    _cuda: bool = field(default=False, repr=False)

    def start(self, model: Any) -> None:
        self._began = time.perf_counter()
        self._cuda = next(model.parameters()).is_cuda
        reset_peak(self._cuda)

    def stop(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        self.peak_memory = peak(self._cuda)

    def __str__(self) -> str:
        lines = [
            f"{self.forwards:.0f} forwards and {self.backwards:.0f} backwards a picture, {self.seconds:.2f} s, "
            f"peak {self.peak_memory:.0f} MiB"
        ]
        for name, pictures in self.words.items():
            told = dict.fromkeys(" | ".join(words) for words in pictures)  # pictures of one prompt have the same
            lines += [f"{name} works on: {words}" for words in told]
        for step in self.steps:
            first, last = step.losses[0], step.losses[-1]
            told = ", ".join(f"{n} {_mean(first[n]):.3f} -> {_mean(last[n]):.3f}" for n in first)
            lines.append(
                f"step {step.step}: {len(step.losses)} passes, {told}" + " (gradient not finite)" * step.skipped
            )
        return "\n".join(lines)


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else float("nan")


def reset_peak(cuda: bool = False) -> None:
    """Forget the highest memory use so far, where the system lets us."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # not allowed in some containers: the peak is then of the whole process
            return


def peak(cuda: bool = False) -> float:
    """The highest memory use since `reset_peak`, in MiB."""
    if cuda:
        return torch.cuda.max_memory_allocated() / MIB
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / MIB if sys.platform == "darwin" else used / 1024
