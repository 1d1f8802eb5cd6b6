"""Self-attention guidance. S. Hong et al., ICCV 2023, arXiv 2210.00939."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from diffguide.blur import blur
from diffguide.maps import Maps, Watch
from diffguide.method import Context
from diffguide.params import param
from diffguide.perturbation import WeakenedLayers
from diffguide.site import Grid, Site

if TYPE_CHECKING:
    from diffguide.weak import WeakPass

KERNEL = 9  # cells of the latents


@dataclass(frozen=True)
class SAG(WeakenedLayers):
    r"""Away from what the model predicts where the places it looks at most are blurred.

    The clean picture that the model predicts is blurred where the columns of its self-attention, averaged over heads,
    sum to more than `threshold` (equation 14), noised again with the noise that it predicts, and predicted once more:
    $\hat\epsilon = \epsilon + s\,(\epsilon_u - \epsilon_{weak})$ (equation 16), $\epsilon_u$ being the unconditional
    prediction, without classifier-free guidance (or where it comes in a later call) the conditional one.
    """

    scale: float = param(0.75, "guidance strength s: 0 changes nothing, high values saturate", low=0.0, high=20.0)
    threshold: float = param(1.0, "of a column's sum: above it a place is blurred; 1 is the mean", low=0.0, high=10.0)
    sigma: float = param(1.0, "width of the blur, in cells of the latents", low=0.1, high=10.0)

    base = "uncond"
    kinds = ("self",)
    paper = "arXiv 2210.00939"

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"self": Watch("self")}

    def watched(self, watch: Watch, sites: list[Site], grids: dict[Site, Grid]) -> list[Site]:
        chosen = self.where(sites)
        coarsest = max((s.level for s in chosen), default=0)
        return [s for s in chosen if s.level == coarsest]

    def observe(self, maps: Maps, context: Context) -> None:
        values, grid = maps.mean("self")
        context.memory["sums"] = values.sum(1).unflatten(1, grid)  # [B, h, w]

    def weaken(self, weak: "WeakPass") -> Tensor:
        clean, noise = weak.parts()
        looked = (weak.context.memory["sums"] > self.threshold).to(clean)
        where = F.interpolate(looked[:, None], clean.shape[-2:])
        blurred = clean + where * (blur(clean, self.sigma, KERNEL) - clean)
        return weak.predict(latents=weak.whole(blurred, noise))

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return self.scale * (pred[self.base if self.base in pred else "cond"] - pred["weak"])
