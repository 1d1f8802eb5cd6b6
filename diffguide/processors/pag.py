"""Perturbed-attention guidance. D. Ahn et al., ECCV 2024, arXiv 2403.17377."""

from dataclasses import dataclass

from torch import Tensor

from diffguide.method import Method, param
from diffguide.perturbation import replaced
from diffguide.site import Call, Proceed, Site, in_layers


@dataclass(frozen=True)
class PAG(Method):
    r"""Perturbed-attention guidance: away from a prediction whose self-attention sees only itself.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$, the weak pass attending with $A = I$ on image
    tokens. Where attention is joint, an image token still sees the words, and of the image itself alone.
    """

    scale: float = param(3.0, "guidance strength s: 0 changes nothing, higher sharpens structure", low=0.0, high=20.0)
    layers: str = param("mid", 'where attention is replaced: "down", "mid", "up", "all" or patterns of module names')

    branch = "weak"
    kinds = ("self", "joint")
    neutral = {"scale": 0.0}
    paper = "arXiv 2403.17377"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        return replaced(call, proceed(call), "identity", "image_block")

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return self.scale * (pred["cond"] - pred["weak"])

    def where(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if s.kind in self.kinds and in_layers(s, self.layers)]
