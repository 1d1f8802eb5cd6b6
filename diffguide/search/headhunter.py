"""HeadHunter: the heads whose perturbation serves an objective best, found greedily.

D. Ahn et al., "Where and how to perturb", NeurIPS 2025, arXiv 2506.10978, algorithm 1. In each round every head that
is left is tried beside those chosen so far, on fixed prompts and seeds, and the best few are chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffguide.errors import ParamError
from diffguide.search.fleet import Crew, Fleet, Solo
from diffguide.search.objectives import Objective, named
from diffguide.search.plan import Hunt
from diffguide.search.ranking import Screen, best, going_on
from diffguide.search.state import Job, State, Trial, Unit
from diffguide.search.studio import Studio, open_studio


@dataclass(frozen=True)
class Result:
    """What was found.

    Attributes:
        heads: the chosen ones, in the order of their choice.
        plain: the score without perturbation.
        rounds: for each round the score of every head that was tried in full, beside those chosen before.
        best: the score of the best trial of each round.
        screens: in the order in which heads passed them.
    """

    heads: list[Unit]
    plain: float
    rounds: list[dict[Unit, float]]
    best: list[float]
    screens: list[Screen] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The heads as SoftPAG takes them."""
        return ",".join(f"L{layer}H{head}" for layer, head in self.heads)

    @property
    def screened(self) -> list[str]:
        """What is known of each screen: how far its order was that of the full pass, and what it cost or saved."""
        share = len(self.heads) // len(self.rounds)
        return [
            each.told(self.rounds[each.round], self.heads[each.round * share : (each.round + 1) * share])
            for each in self.screens
        ]


def hunt(
    pipe: Any,
    plan: Hunt,
    *,
    objective: Objective | None = None,
    folder: Path | None = None,
    tell: Callable[[str, int, int], None] = lambda text, done, of: None,
    ray: Fleet | None = None,
) -> Result:
    """Search the heads of a pipeline's denoiser.

    Args:
        pipe: a diffusers pipeline of a known family; it is left as it was. With `ray` a function that makes one, such
            as `partial(load, "shapes-unet")`, which each worker calls.
        plan: what is searched.
        objective: scores of pictures, in place of the one that the plan names; with `ray` it must be picklable.
        folder: where the state is kept; a search that was stopped goes on there, whatever stopped it.
        tell: is told what is being tried, how many trials are done, and how many there are.
        ray: workers that share the trials; None tries one after the other here. What is found is the same.

    Raises:
        ParamError: the objective or a layer is unknown, or there are fewer heads than are to be chosen.
        SearchError: the folder has the state of another search, Ray is missing, or a trial ends every worker.
    """
    judge = objective or named(plan.objective)
    with _crew(pipe, plan, judge, ray) as crew:
        ((_, pool),) = crew.run(Studio.pool, ["the list of heads"])
        if len(pool) < plan.rounds * plan.keep:
            raise ParamError(
                f"{len(pool)} heads, but {plan.rounds * plan.keep} are to be chosen, {plan.keep} a round; choose fewer"
            )
        state, total = State(folder, {**plan.record(), "heads": pool}), plan.trials(len(pool))

        def scores(number: int, beside: list[Unit], heads: Sequence[Any], steps: int | None = None) -> dict[Any, float]:
            trials = [Trial(number, head, tuple(beside), steps) for head in heads]
            left = [trial for trial in trials if state.find(trial) is None]
            done = crew.run(Studio.attempt, left, lambda trial: tell(str(trial), len(state.jobs), total))
            for trial, (each, seconds) in done:
                state.add(Job(trial.round, trial.unit, each, seconds, steps))
            return {trial.unit: state.jobs[trial.key].score for trial in trials}

        plain = scores(-1, [], [None])[None]
        chosen: list[Unit] = []
        rounds: list[dict[Unit, float]] = []
        screens: list[Screen] = []
        for number in range(plan.rounds):
            left = [unit for unit in pool if unit not in chosen]
            for steps in plan.screen_steps:
                cheap = scores(number, chosen, left, steps)
                kept = best(cheap, going_on(len(left), plan.screen_keep, plan.keep))
                screens.append(Screen(number, steps, cheap, kept))
                left = sorted(kept)
            rounds.append(scores(number, chosen, left))
            chosen += best(rounds[-1], plan.keep)
    tell("done", total, total)
    return Result(chosen, plain, rounds, [each[best(each, 1)[0]] for each in rounds], screens)


@contextmanager
def _crew(pipe: Any, plan: Hunt, judge: Objective, ray: Fleet | None) -> Iterator[Crew | Solo]:
    if ray is None:
        yield Solo(Studio(pipe, plan, judge))
        return
    if not callable(pipe) or hasattr(pipe, "components"):
        raise ParamError(
            f"a {type(pipe).__name__} cannot be sent to workers; give a function that makes the pipeline, such as "
            "partial(diffguide.pipelines.source.load, NAME)"
        )
    with ray.crew(partial(open_studio, pipe, plan, judge, torch.get_num_threads())) as crew:
        yield crew
