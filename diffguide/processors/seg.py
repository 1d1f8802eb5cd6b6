"""Smoothed energy guidance. S. Hong, NeurIPS 2024, arXiv 2408.00760."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from diffguide.blur import blur
from diffguide.params import param
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
    planes = q.unflatten(2, grid).movedim(-1, 2)  # [B, H, D, (F,) h, w]
    if sigma >= WHOLE:
        planes = planes.float().mean((-2, -1), keepdim=True).expand(planes.shape)
    elif sigma > 0:
        planes = blur(planes.float(), sigma, kernel(sigma))
    return planes.movedim(2, -1).flatten(2, -2).to(q.dtype)


def kernel(sigma: float) -> int:
    """How many weights a blur has: an odd number, about six sigma."""
    size = math.ceil(6 * sigma)
    return size + 1 - size % 2
