"""Perturbed-attention guidance. D. Ahn et al., ECCV 2024, arXiv 2403.17377."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.method import Method, param
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
        o = proceed(call).clone()
        o[:, :, call.image] = alone(call).to(o.dtype)
        return o

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return self.scale * (pred["cond"] - pred["weak"])

    def where(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if s.kind in self.kinds and in_layers(s, self.layers)]


def alone(call: Call) -> Tensor:
    """What image tokens get that see themselves and the words, but not each other, [B, H, N, D]."""
    q, k, v = (x[:, :, call.image] for x in (call.q, call.k, call.v))
    words = range(call.k.shape[2])[call.text]
    if not words:
        return v
    scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
    own = (q.float() * k.float()).sum(-1, keepdim=True) * scale
    others = (q.float() * scale) @ call.k[:, :, call.text].float().mT
    if call.mask is not None:
        mask = call.mask[..., call.text]
        mask = mask[:, :, call.image] if mask.shape[2] > 1 else mask
        others = others.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else others + mask.float()
    A = torch.cat([own, others], -1).softmax(-1)
    return A[..., :1] * v.float() + A[..., 1:] @ call.v[:, :, call.text].float()
