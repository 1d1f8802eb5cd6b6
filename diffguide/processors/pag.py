"""Perturbed-attention guidance. D. Ahn et al., ECCV 2024, arXiv 2403.17377."""

from dataclasses import dataclass

from torch import Tensor

from diffguide.perturbation import WeakenedLayers, replaced
from diffguide.site import Call, Proceed


@dataclass(frozen=True)
class PAG(WeakenedLayers):
    r"""Perturbed-attention guidance: away from a prediction whose self-attention sees only itself.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$, the weak pass attending with $A = I$ on image
    tokens. Where attention is joint, an image token still sees the words, and of the image itself alone.
    """

    paper = "arXiv 2403.17377"

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        return replaced(call, proceed(call), "identity", "image_block")
