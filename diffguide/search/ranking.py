"""Orders of heads by their scores: the best of them, and how far the order of a cheap screen is that of the full pass.

Several screens of growing steps are successive halving: Z. Karnin, T. Koren and O. Somekh, "Almost optimal exploration
in multi-armed bandits", ICML 2013, with denoising steps in the place of samples.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from diffguide.search.state import Unit

SHARES = (0.25, 0.5)  # of the heads that go on, for which it is told what would have been lost


def best(scores: dict[Unit, float], count: int) -> list[Unit]:
    """The heads of the highest scores; of equal ones the first layer, then the first head. What failed comes last."""
    return sorted(scores, key=lambda unit: (-scores[unit] if math.isfinite(scores[unit]) else math.inf, unit))[:count]


def going_on(heads: int, share: float, least: int) -> int:
    """How many of so many heads a screen keeps: the share, rounded up, and no fewer than are to be chosen."""
    return min(heads, max(least, math.ceil(share * heads)))


@dataclass(frozen=True)
class Screen:
    """Heads of a round judged on fewer steps.

    Attributes:
        round: from 0.
        steps: denoising steps of its pictures.
        scores: of every head it was asked about.
        kept: those that went on, the best first.
    """

    round: int
    steps: int
    scores: dict[Unit, float]
    kept: list[Unit]

    def ranks(self, chosen: Collection[Unit]) -> list[int]:
        """The places of some heads in the screen's order, from 1, the best first."""
        order = best(self.scores, len(self.scores))
        return sorted(1 + order.index(unit) for unit in chosen)

    def told(self, full: dict[Unit, float], chosen: Collection[Unit]) -> str:
        """How well it stood for the full pass: what is known of that, in words."""
        heads, ranks = len(self.scores), self.ranks(chosen)
        text = (
            f"Screen of {self.steps} steps, round {self.round + 1}: {len(self.kept)} of {heads} heads went on; "
            f"Kendall's tau with the full pass over {len(full)} of them {tau(self.scores, full):.2f}; "
            f"the chosen ranked {', '.join(map(str, ranks))} in it. "
        )
        if len(full) < heads:
            return text + "Whether those dropped held better ones is not known; --screen-keep 1 measures it."
        kept = [f"{share:.0%} {sum(r <= going_on(heads, share, 1) for r in ranks)}" for share in SHARES]
        return text + (
            f"Of the {len(ranks)} chosen it would have kept with {', with '.join(kept)}; "
            f"all of them with {math.ceil(100 * max(ranks) / heads)}%."
        )


def tau(a: dict[Unit, float], b: dict[Unit, float]) -> float:
    """Kendall's tau-b of the scores of the heads in both, -1 to 1; not a number where one of them is constant.

    M. Kendall, "The treatment of ties in ranking problems", Biometrika 1945. Scores that are no number are left out.
    """
    both = [unit for unit in a if unit in b and math.isfinite(a[unit]) and math.isfinite(b[unit])]
    signs = [np.sign(np.subtract.outer(v, v)) for v in (np.array([s[unit] for unit in both]) for s in (a, b))]
    x, y = signs
    length = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / length if length else math.nan
