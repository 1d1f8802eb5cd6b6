"""What a way of doing attention tells about itself."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from diffguide.kernels.problem import Problem


def _never(problem: Problem) -> None:
    """Nothing speaks against it."""


@dataclass(frozen=True)
class Route:
    """One way.

    Attributes:
        name: what `backend=` calls it.
        reason: why it cannot serve a problem (missing libraries and devices among the reasons), None if it can.
        run: output [B, H, N, D] and maps, each None if not asked for. Blends are the door's work unless `blends`.
        why: what it is good for, told when it is taken.
        declines: why it should not be taken unless it is named, None if it should.
        grouped: takes fewer heads of keys than of queries.
        blends: does the blend itself.
        exact: the output is that of torch's own attention, bit for bit, whatever is captured beside it.
    """

    name: str
    reason: Callable[[Problem], str | None]
    run: Callable[[Problem], tuple[Tensor | None, Tensor | None]]
    why: str
    declines: Callable[[Problem], str | None] = _never
    grouped: bool = False
    blends: bool = False
    exact: bool = False
