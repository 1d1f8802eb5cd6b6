"""Methods of tests that look and change nothing, and how far two pictures are from each other."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method
from diffguide.site import Call, Proceed


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Through(Method):
    """Carries out every attention of the model's own pass as the model would."""

    branch = "every"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:
        return proceed(call)


@dataclass(frozen=True)
class Again(Method):
    """A weak pass that perturbs nothing: how far its prediction is from the conditional one, step by step."""

    differences: list[float] = field(default_factory=list, compare=False)

    branch = "weak"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:
        return proceed(call)

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        self.differences.append(float((pred["cond"] - pred["weak"]).abs().max()))
        return torch.zeros_like(pred["cond"])


@dataclass(frozen=True)
class Sight(Method):
    """Keeps the maps of the model's own pass, and those of a gradient pass that moves nothing."""

    own: list[Any] = field(default_factory=list, compare=False)
    of_gradient: list[Any] = field(default_factory=list, compare=False)

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"words": Watch("cross", head_mean=False)}

    def observe(self, maps: Maps, context: Context) -> None:
        self.own.append([seen.values.detach() for seen in maps["words"]])

    def rate(self, context: Context) -> float:
        return 1.0

    def loss(self, maps: Maps, context: Context) -> Tensor:
        self.of_gradient.append([seen.values.detach() for seen in maps["words"]])
        return 0 * sum(seen.values.mean((1, 2, 3)) for seen in maps["words"])  # type: ignore[return-value]
