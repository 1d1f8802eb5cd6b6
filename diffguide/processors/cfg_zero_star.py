"""CFG-Zero*. W. Fan et al., 2025, arXiv 2503.18886."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.errors import SteeringError
from diffguide.method import Context, Method
from diffguide.params import param


@dataclass(frozen=True)
class CFGZeroStar(Method):
    r"""Classifier-free guidance for flow models: the unconditional part at its best scale, the first steps left out.

    $a = \langle v_{cond}, v_{uncond}\rangle / \|v_{uncond}\|^2$ for each picture, and
    $\hat v = a\,v_{uncond} + g\,(v_{cond} - a\,v_{uncond})$, $g$ being the pipeline's guidance scale. In the first
    steps, a share `zero` of them and at least one, $\hat v = 0$: the latents stay.
    """

    optimised: bool = param(True, "whether the unconditional prediction is scaled by a; else a = 1")
    zero: float = param(0.04, "share of the steps, from the first, that are left out; 0 for none", low=0.0, high=0.5)

    neutral = {"optimised": False, "zero": 0.0}
    paper = "arXiv 2503.18886"

    @property
    def inert(self) -> bool:
        return not self.optimised and not self.zero

    def prepare(self, context: Context) -> None:
        if self.zero and not context.flow:
            raise SteeringError(
                "CFGZeroStar leaves out the first steps of flow models, of which a zero means no move; this scheduler "
                "is told noise, of which it means a clean picture: set zero=0"
            )

    def combine(self, pred: dict[str, Tensor], context: Context) -> Tensor:
        cond, uncond = pred["cond"], pred["uncond"]
        if self.zero and context.step < max(1, math.ceil(self.zero * context.steps - 1e-9)):
            return torch.zeros_like(cond)
        if self.optimised:
            axes = list(range(1, cond.ndim))
            uncond = uncond * (cond * uncond).sum(axes, True) / uncond.square().sum(axes, True).clamp_min(1e-12)
        return uncond + context.guidance * (cond - uncond)
