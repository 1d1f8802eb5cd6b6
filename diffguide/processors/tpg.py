"""Token perturbation guidance. J. Rajabi et al., NeurIPS 2025, arXiv 2506.10036."""

from dataclasses import dataclass
from typing import Any

import torch

from diffguide.blocks import BlockCall
from diffguide.params import param
from diffguide.perturbation import WeakenedLayers


@dataclass(frozen=True)
class TPG(WeakenedLayers):
    r"""Away from a prediction whose image tokens were shuffled: each chosen block meets them in another order.

    $\hat\epsilon = \epsilon + s\,(\epsilon_{cond} - \epsilon_{weak})$. One permutation for all pictures, another for
    every step and block, never undone. Words and positions stay where they are.
    """

    layers: str = param("down", 'where: "down", "mid", "up", "all", "L7" or patterns of module names', kw_only=True)
    seed: int = param(0, "of the permutations: with it they are always the same", low=0, high=1_000_000)

    paper = "arXiv 2506.10036"

    def block(self, call: BlockCall) -> Any:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + call.step * 1_009 + call.number)
        tokens = range(call.hidden.shape[1])[call.image]
        order = torch.arange(call.hidden.shape[1])
        order[call.image] = tokens.start + torch.randperm(len(tokens), generator=generator)
        return call.proceed(call.hidden[:, order.to(call.hidden.device)])
