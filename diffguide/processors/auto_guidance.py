"""Autoguidance. T. Karras et al., NeurIPS 2024, arXiv 2406.02507."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from diffguide.errors import ParamError
from diffguide.params import param
from diffguide.perturbation import Weakened
from diffguide.site import Site

if TYPE_CHECKING:
    from diffguide.weak import WeakPass


@dataclass(frozen=True)
class AutoGuidance(Weakened):
    r"""Away from a weaker version of the same model: an earlier checkpoint, a smaller one, one trained on less.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$, which without classifier-free guidance
    is the paper's $\epsilon_{weak} + w\,(\epsilon_{cond} - \epsilon_{weak})$ with $w = s + 1$. `weak` is a denoiser of
    the same latents, words and kind of prediction, loaded by you, on the device and in the type of the pipeline's.
    """

    scale: float = param(1.0, "guidance strength s: 0 changes nothing, high values saturate", low=0.0, high=20.0)
    weak: nn.Module | None = None

    paper = "arXiv 2406.02507"

    def where(self, sites: list[Site]) -> list[Site]:
        """Nowhere in particular; raises ParamError where there is no weaker model, which no recipe can hold."""
        if not isinstance(self.weak, nn.Module):
            raise ParamError(
                "AutoGuidance.weak is not a denoiser: load a weaker one, such as "
                "type(pipe.unet).from_pretrained(folder_of_an_earlier_checkpoint), and pass it as weak="
            )
        return super().where(sites)

    def weaken(self, weak: "WeakPass") -> Tensor:
        return weak.predict(model=self.weak)
