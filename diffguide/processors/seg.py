"""Smoothed energy guidance. S. Hong, NeurIPS 2024, arXiv 2408.00760."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.method import param
from diffguide.perturbation import WeakenedLayers
from diffguide.site import Call, Proceed

WHOLE = 9999.0  # from this width on a blur is the mean


@dataclass(frozen=True)
class SEG(WeakenedLayers):
    r"""Away from a prediction whose self-attention is smoothed: its queries are blurred over the picture.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$, the weak pass attending with $G_\sigma * Q$ in
    place of $Q$, $G_\sigma$ a Gaussian over the grid of image tokens (proposition 3.1: as good as blurring the logits).
    Where attention is joint, queries of words stay; in video each frame is blurred by itself (our choices).
    """

    sigma: float = param(
        10_000.0,
        "width of the blur in tokens: 0 changes nothing, 9999 makes all queries their mean",
        low=0.0,
        high=1e6,
    )

    neutral = {"scale": 0.0, "sigma": 0.0}
    paper = "arXiv 2408.00760"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        q = call.q.clone()
        grid = call.grid[-2:] if call.site.apart else call.grid
        q[:, :, call.image] = blurred(call.q[:, :, call.image], grid, self.sigma)
        return proceed(replace(call, q=q))


def blurred(q: Tensor, grid: tuple[int, ...], sigma: float) -> Tensor:
    """Queries [B, H, N, D] blurred over their grid (height and width, or frames, height and width)."""
    *frames, h, w = grid
    planes = q.unflatten(2, (*frames, h, w)).movedim(-1, 2)  # [B, H, D, (F,) h, w]
    flat = planes.reshape(-1, 1, h, w).float()
    if sigma >= WHOLE:
        flat = flat.mean((2, 3), keepdim=True).expand(-1, -1, h, w)
    elif sigma > 0:
        for axis, side in ((2, h), (3, w)):
            kernel = gaussian(sigma, side).to(flat)
            reach = len(kernel) // 2
            pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
            shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
            flat = F.conv2d(F.pad(flat, pad, mode="reflect"), kernel.view(shape))
    return flat.reshape(planes.shape).movedim(2, -1).flatten(2, -2).to(q.dtype)


def gaussian(sigma: float, side: int) -> Tensor:
    """Weights of a blur along a side of so many tokens: an odd number of them, about six sigma, at most the side."""
    size = math.ceil(6 * sigma)
    size = min(size + 1 - size % 2, side - 1 + side % 2)
    x = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return weights / weights.sum()
