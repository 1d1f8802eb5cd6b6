"""Where heads are tried: a pipeline, the plan's pictures with some heads perturbed, and what judges them."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from diffguide.errors import ParamError
from diffguide.guide import Guide
from diffguide.processors import SoftPAG
from diffguide.registry import of_pipe, sites_of
from diffguide.search.objectives import Objective
from diffguide.search.plan import Hunt
from diffguide.search.state import Trial, Unit
from diffguide.site import Site
from diffguide.zoo import no_zeros


class Draw(Protocol):
    """Pictures with some heads perturbed, in the plan's steps or in fewer."""

    def __call__(self, heads: Sequence[Unit], steps: int | None = None) -> Sequence[Image.Image]: ...


class Studio:
    """A pipeline on which heads are tried."""

    def __init__(self, pipe: Any, plan: Hunt, judge: Objective) -> None:
        self.pipe, self.plan, self.judge = pipe, plan, judge

    def pool(self, _: Any = None) -> list[Unit]:
        """The heads that are searched."""
        return units(self.pipe, self.plan.layers)

    def attempt(self, trial: Trial) -> tuple[list[float], float]:
        """Scores of the pictures with the trial's heads perturbed, and seconds."""
        began = time.perf_counter()
        pictures = painter(self.pipe, self.plan)(trial.heads, trial.steps)
        scores = [float(s) for s in self.judge(pictures, self.plan.prompts)]
        if len(scores) != len(self.plan.prompts):
            raise ParamError(f"the objective gave {len(scores)} scores for {len(self.plan.prompts)} pictures")
        return scores, time.perf_counter() - began


def open_studio(load: Callable[[], Any], plan: Hunt, judge: Objective, threads: int, workers: int) -> Studio:
    """A worker's own, with its share of the threads."""
    torch.set_num_threads(max(1, threads // workers))
    return Studio(load(), plan, judge)


def units(pipe: Any, layers: str = "all") -> list[Unit]:
    """Every head of these layers, in order; raises ParamError where a name matches none."""
    method = SoftPAG(heads=layers)
    return sorted((site.number, head) for site in method.where(_sites(pipe)) for head in method.at(site))


def _sites(pipe: Any) -> list[Site]:
    family, attribute = of_pipe(pipe)
    return sites_of(family, getattr(pipe, attribute))


def painter(pipe: Any, plan: Hunt) -> Draw:
    """Draws the plan's pictures with some heads perturbed, each from its own noise."""

    def draw(heads: Sequence[Unit], steps: int | None = None) -> Sequence[Image.Image]:
        bars = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        try:
            with Guide(pipe, plan.method(heads)):
                return pipe(
                    list(plan.prompts),
                    num_inference_steps=steps or plan.steps,
                    guidance_scale=plan.guidance_scale,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds],
                    **no_zeros(pipe),
                ).images
        finally:
            pipe.set_progress_bar_config(**bars)

    return draw
