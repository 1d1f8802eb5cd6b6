"""Adaptive projected guidance. S. Sadat et al., ICLR 2025, arXiv 2410.02416."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.method import Context, Method
from diffguide.params import param


@dataclass(frozen=True)
class APG(Method):
    r"""Classifier-free guidance without what oversaturates: the part of its step along the prediction is held back.

    $\Delta = \epsilon_{cond} - \epsilon_{uncond}$ is carried on with momentum, $m \leftarrow \Delta + \beta m$, made no
    longer than `limit`, and split into the parts along and across $\epsilon_{cond}$:
    $\hat\epsilon = \epsilon_{cond} + (g - 1)(m_\perp + \eta\, m_\parallel)$, $g$ being the pipeline's guidance scale.
    The paper projects predictions of the clean picture, this what the model predicts, as diffusers does.
    """

    eta: float = param(0.0, "share of the part along the prediction that is kept: 1 keeps it whole", low=0.0, high=2.0)
    momentum: float = param(-0.5, "beta: 0 is none, negative pushes away from earlier steps", low=-1.0, high=0.99)
    limit: float = param(15.0, "largest norm of the difference of a picture, 0 for none", low=0.0, high=1e4)

    neutral = {"eta": 1.0, "momentum": 0.0, "limit": 0.0}
    paper = "arXiv 2410.02416"

    @property
    def inert(self) -> bool:
        return all(getattr(self, name) == value for name, value in self.neutral.items())

    def combine(self, pred: dict[str, Tensor], context: Context) -> Tensor:
        cond = pred["cond"]
        m = cond - pred["uncond"]
        if self.momentum:
            m = m + self.momentum * context.memory.get("m", torch.zeros_like(m))
            context.memory["m"] = m
        if self.limit:
            m = m * (self.limit / norm(m).clamp_min(1e-12)).clamp_max(1.0)
        direction = cond / norm(cond).clamp_min(1e-12)
        along = (m * direction).sum(_axes(m), keepdim=True) * direction
        return cond + (context.guidance - 1) * (m - along + self.eta * along)


def norm(x: Tensor) -> Tensor:
    """Length of each picture's prediction, [B, 1, ...]."""
    return x.square().sum(_axes(x), keepdim=True).sqrt()


def _axes(x: Tensor) -> list[int]:
    return list(range(1, x.ndim))
