"""Normalised attention guidance. D. Chen et al., 2025, arXiv 2505.21179."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffguide.errors import ParamError
from diffguide.method import Method
from diffguide.params import param
from diffguide.second_prompt import ROWS
from diffguide.site import Call, Proceed


@dataclass(frozen=True)
class NAG(Method):
    r"""A negative prompt without classifier-free guidance: what attention gives is moved away from what it would give.

    With $Z^+$ and $Z^-$, what an image token gets from attention that sees the prompt's or the negative words,
    $\tilde Z = \phi Z^+ - (\phi - 1) Z^-$ is made no longer than $\tau\,\|Z^+\|$, and
    $Z = \alpha \hat Z + (1 - \alpha) Z^+$ takes the place of $Z^+$ (equations 7 to 10).
    The paper writes the norm with $p = 1$, its code has 2.

    For few-step and guidance-distilled models, called without classifier-free guidance; with it, it acts in the
    conditional prediction. `embeds` are text states [1, T, C] of negative words that you encoded, in place of
    `negative`.
    """

    negative: str = param("", "what is to be kept out, in words; nothing: changes nothing")
    scale: float = param(5.0, "phi: 1 changes nothing, high values push harder", low=1.0, high=30.0)
    tau: float = param(2.5, "largest length, in lengths of what the prompt alone gives", low=1.0, high=20.0)
    alpha: float = param(0.25, "share of the guided result: 0 changes nothing, 1 takes it whole", low=0.0, high=1.0)
    norm: int = param(2, "p of the norm: 2 as in the published code, 1 as in the paper", low=1, high=2)
    embeds: Tensor | None = None

    branch = "every"
    kinds = ("cross", "joint")
    neutral = {"scale": 1.0, "alpha": 0.0}
    paper = "arXiv 2505.21179"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embeds is not None and (not isinstance(self.embeds, Tensor) or self.embeds.ndim != 3):
            raise ParamError("NAG.embeds is not a tensor of text states [1, T, C]")

    @property
    def inert(self) -> bool:
        return super().inert or (not self.negative.strip() and self.embeds is None)

    @property
    def second_prompt(self) -> Any:
        return self.negative if self.embeds is None else self.embeds

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        z = proceed(call)
        if ROWS not in call.rows:
            return z
        own, other = call.rows["cond"], call.rows[ROWS]
        guided = self.guide(z[own][:, :, call.image].float(), z[other][:, :, call.image].float()).to(z.dtype)
        z = z.clone()
        z[own, :, call.image] = guided
        z[other, :, call.image] = guided  # the picture is one, whoever's words are seen
        return z

    def guide(self, positive: Tensor, negative: Tensor) -> Tensor:
        """What image tokens get, [B, H, N, D], from what they would with either prompt."""
        away = self.scale * positive - (self.scale - 1) * negative
        length, longest = (z.norm(p=self.norm, dim=(1, 3), keepdim=True) for z in (away, positive))
        away = away * (self.tau * longest / length.clamp_min(1e-12)).clamp_max(1.0)
        return self.alpha * away + (1 - self.alpha) * positive
