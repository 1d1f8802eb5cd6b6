"""Skip-layer guidance. Stability AI, Stable Diffusion 3.5, 2024; J. Hyung et al. (STG), CVPR 2025, arXiv 2411.18664."""

from dataclasses import dataclass
from typing import Any

from diffguide.blocks import BlockCall
from diffguide.params import Window, param
from diffguide.perturbation import WeakenedLayers


@dataclass(frozen=True)
class SkipLayer(WeakenedLayers):
    r"""Away from a prediction in which whole blocks are left out: what they are given goes on as it is.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$. Stability AI skips L7, L8 and L9 of SD 3.5
    medium in the first fifth of the run, at `scale` 2.5 and a guidance scale of 4 rather than 5.
    """

    scale: float = param(2.5, "guidance strength s: 0 changes nothing, high values saturate", low=0.0, high=20.0)
    window: Window = param(
        (0.01, 0.2),
        "part of the run in which the method acts: start and stop of progress",
        low=0.0,
        high=1.0,
        kw_only=True,
    )

    paper = "arXiv 2411.18664"

    def block(self, call: BlockCall) -> Any:
        return call.skipped()
