"""HeadHunter: the heads whose perturbation serves an objective best, found greedily.

D. Ahn et al., "Where and how to perturb", NeurIPS 2025, arXiv 2506.10978, algorithm 1. In each round every head that
is left is tried beside those chosen so far, on fixed prompts and seeds, and the best few are chosen.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffguide.errors import ParamError
from diffguide.family import of_pipe, sites_of
from diffguide.guide import Guide
from diffguide.method import Param
from diffguide.processors import SoftPAG
from diffguide.search.objectives import Objective, named
from diffguide.search.state import Job, State
from diffguide.site import Site
from diffguide.zoo import no_zeros

Unit = tuple[int, int]  # layer, head
Draw = Callable[[Sequence[Unit]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Hunt:
    """What is searched.

    Attributes:
        prompts: one for each picture that a head is judged by.
        seeds: of the noise, one for each prompt.
        objective: the name of an objective, or what stands for one in the state's file.
        rounds: R, how often the best heads are chosen.
        keep: k, how many at a time.
        scale: w of SoftPAG.
        blend: u; 1 makes each head's effect plain, lower it afterwards.
        target, scope: of SoftPAG.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1 is none, as in the paper's search.
        layers: heads of these layers alone (names as SoftPAG takes them); all by default.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = ()
    objective: str = "sharpness"
    rounds: int = 1
    keep: int = 3
    scale: float = 3.0
    blend: float = 1.0
    target: str = "identity"
    scope: str = "joint"
    steps: int = 20
    guidance_scale: float = 1.0
    layers: str = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "seeds", tuple(self.seeds) or tuple(range(len(self.prompts))))
        if not self.prompts:
            raise ParamError("Hunt.prompts is empty; give one prompt or more")
        if len(self.seeds) != len(self.prompts):
            raise ParamError(f"Hunt.seeds: {len(self.seeds)} of them for {len(self.prompts)} prompts; give one each")
        for name in ("rounds", "keep", "steps"):
            Param(name, int, 1, "whole and at least 1", 1, None).check("Hunt", getattr(self, name))
        Param("guidance_scale", float, 1.0, "of classifier-free guidance", 0, 100).check("Hunt", self.guidance_scale)
        self.method([])  # checks its own

    def method(self, heads: Sequence[Unit]) -> SoftPAG:
        """The perturbation of these heads."""
        return SoftPAG(scale=self.scale, heads=heads, blend=self.blend, target=self.target, scope=self.scope)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        heads: the chosen ones, in the order of their choice.
        plain: the score without perturbation.
        rounds: for each round the score of every head that was tried, beside those chosen before.
        best: the score of the best trial of each round.
    """

    heads: list[Unit]
    plain: float
    rounds: list[dict[Unit, float]]
    best: list[float]

    @property
    def text(self) -> str:
        """The heads as SoftPAG takes them."""
        return ",".join(f"L{layer}H{head}" for layer, head in self.heads)


def hunt(
    pipe: Any,
    plan: Hunt,
    *,
    objective: Objective | None = None,
    folder: Path | None = None,
    tell: Callable[[str, int, int], None] = lambda text, done, of: None,
) -> Result:
    """Search the heads of a pipeline's denoiser.

    Args:
        pipe: a diffusers pipeline of a known family; it is left as it was.
        plan: what is searched.
        objective: scores of pictures, in place of the one that the plan names.
        folder: where the state is kept; a search that was stopped goes on there, whatever stopped it.
        tell: is told what is being tried, how many trials are done, and how many there are.

    Raises:
        ParamError: the objective or a layer is unknown, or there are fewer heads than are to be chosen.
        SearchError: the folder has the state of another search.
    """
    judge = objective or named(plan.objective)
    draw = painter(pipe, plan)
    pool = units(pipe, plan.layers)
    if len(pool) < plan.rounds * plan.keep:
        raise ParamError(f"{len(pool)} heads, but {plan.rounds} rounds are to choose {plan.keep} each; choose fewer")
    state = State(folder, {**asdict(plan), "heads": pool})
    total = 1 + sum(len(pool) - r * plan.keep for r in range(plan.rounds))

    def trial(number: int, heads: Sequence[Unit], unit: Unit | None) -> float:
        if (job := state.find(number, unit)) is None:
            tell("plain" if unit is None else f"round {number + 1}, L{unit[0]}H{unit[1]}", len(state.jobs), total)
            began = time.perf_counter()
            scores = [float(s) for s in judge(draw([*heads, *([unit] if unit else [])]), plan.prompts)]
            if len(scores) != len(plan.prompts):
                raise ParamError(f"the objective gave {len(scores)} scores for {len(plan.prompts)} pictures")
            job = Job(number, unit, scores, time.perf_counter() - began)
            state.add(job)
        return job.score

    plain = trial(-1, [], None)
    chosen: list[Unit] = []
    rounds: list[dict[Unit, float]] = []
    for number in range(plan.rounds):
        rounds.append({unit: trial(number, chosen, unit) for unit in pool if unit not in chosen})
        chosen += best(rounds[-1], plan.keep)
    tell("done", total, total)
    return Result(chosen, plain, rounds, [each[best(each, 1)[0]] for each in rounds])


def best(scores: dict[Unit, float], count: int) -> list[Unit]:
    """The heads of the highest scores; of equal ones the first layer, then the first head. What failed comes last."""
    return sorted(scores, key=lambda unit: (-scores[unit] if math.isfinite(scores[unit]) else math.inf, unit))[:count]


def units(pipe: Any, layers: str = "all") -> list[Unit]:
    """Every head of these layers, in order; raises ParamError where a name matches none."""
    method = SoftPAG(heads=layers)
    return sorted((site.number, head) for site in method.where(_sites(pipe)) for head in method.at(site))


def _sites(pipe: Any) -> list[Site]:
    family, attribute = of_pipe(pipe)
    return sites_of(family, getattr(pipe, attribute))


def painter(pipe: Any, plan: Hunt) -> Draw:
    """Draws the plan's pictures with some heads perturbed, each from its own noise."""

    def draw(heads: Sequence[Unit]) -> Sequence[Image.Image]:
        bars = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(disable=True)
        try:
            with Guide(pipe, plan.method(heads)):
                return pipe(
                    list(plan.prompts),
                    num_inference_steps=plan.steps,
                    guidance_scale=plan.guidance_scale,
                    generator=[torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds],
                    **no_zeros(pipe),
                ).images
        finally:
            pipe.set_progress_bar_config(**bars)

    return draw
