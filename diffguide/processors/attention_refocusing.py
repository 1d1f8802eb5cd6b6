"""Attention refocusing. Q. Phung, S. Ge, J.-B. Huang, CVPR 2024, arXiv 2306.05427."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.concepts import last_column, responses
from diffguide.layout import Layout
from diffguide.maps import Maps, Watch
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.targets import Placed, find_targets

# progress up to which, times the step size, most moves: the schedule of the paper's 50 steps
SCHEDULE = ((0.04, 1.0, 2), (0.10, 1.0, 6), (0.20, 0.75, 3))
# progress of single later steps, times the step size, most moves
LATER = ((0.20, 0.75, 2), (0.30, 0.75, 2), (0.40, 0.25, 2), (0.50, 0.25, 2), (0.60, 0.25, 2), (0.70, 0.25, 2))


@dataclass(frozen=True)
class AttentionRefocusing(Placed):
    r"""Words look into their boxes (CAR), and cells of a box at cells of that box (SAR).

    $L_{CAR} = \mathrm{mean}_i\,(1 - \max X_i M_i) + \mathrm{mean}_i \max X_i (1 - M_i)$ with $X$ as in
    Attend-and-Excite; $L_{SAR} = \mathrm{mean}_i \sum_{p \in M_i} \mathrm{mean}_{q \notin M_i} S_{pq}$ over
    self-attention $S$. The losses of the paper; its code weighs them differently.
    """

    scale: float = param(4.0, "step size in the first tenth: 0 changes nothing", low=0.0, high=1000.0)
    cross: float = param(1.0, "weight of L_CAR", low=0.0, high=10.0)
    selves: float = param(1.0, "weight of L_SAR; 0: self-attention is not watched", low=0.0, high=10.0)
    reached: float = param(0.2, "weakest response inside at which a later step is left out", low=0.0, high=1.0)
    threshold: float = param(0.1, "loss at which a step of the first fifth ends", low=0.0, high=10.0)
    normalize_eot: bool = param(False, "leave the end token out of the softmax over words too (SD2: true)")
    side: int = param(16, "grid of the maps: the nearest the model has, in tokens", low=4, high=64)
    window: Window = param((0.0, 0.75), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    neutral = {"scale": 0.0}
    paper = "arXiv 2306.05427"

    def prepare(self, context: Context) -> None:
        context.memory["targets"] = find_targets(context, self.layout)
        context.memory["stop"] = last_column(context, self.normalize_eot)

    def watch(self, context: Context) -> dict[str, Watch]:
        wishes = {"cross": Watch("cross", (self.side,))}
        return wishes | ({"self": Watch("self", (self.side,))} if self.selves else {})

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, grid = maps.mean("cross")  # [B, N, T]
        S = maps.mean("self")[0] if self.selves else None  # [B, N, N]
        losses = []
        for row, b in enumerate(context.pictures):
            targets = context.memory["targets"][b]
            if not targets:
                losses.append(A[row].sum() * 0)
                continue
            X = responses(A[row], [t.columns for t in targets], context.memory["stop"][b], grid)  # [R, h, w]
            cells = [torch.from_numpy(Layout(t.region).rasterise(*grid)[0]) for t in targets]
            M = torch.stack(cells).ge(0.5).to(X)
            weight = X.new_tensor([t.region.weight for t in targets])
            value = self.cross * (weight * refocus(X, M)).mean()
            if S is not None:
                value = value + self.selves * (weight * stay(S[row], M.flatten(1))).mean()
            met = context.progress >= SCHEDULE[-1][0] and (X * M).amax((1, 2)).min() >= self.reached
            losses.append(value * 0 if met else value)
        return torch.stack(losses)

    def stage(self, context: Context) -> tuple[float, int]:
        """Part of the step size and most moves in this step; (0, 0) where nothing moves."""
        for end, part, most in SCHEDULE:
            if context.step < round(end * context.steps):
                return part, most
        for at, part, most in LATER:
            if context.step == round(at * context.steps):
                return part, most
        return 0.0, 0

    def rate(self, context: Context) -> float:
        return self.scale * self.stage(context)[0]

    def most(self, context: Context) -> int:
        return self.stage(context)[1]

    def again(self, history: Tensor, context: Context) -> Tensor:
        return history[-1] > (self.threshold if context.progress < SCHEDULE[-1][0] else 0)


def refocus(X: Tensor, M: Tensor) -> Tensor:
    """L_CAR [R] of responses and cells [R, h, w]."""
    return 1 - (X * M).amax((1, 2)) + (X * (1 - M)).amax((1, 2))


def stay(S: Tensor, M: Tensor) -> Tensor:
    """L_SAR [R] of a self-attention map [N, N] and cells [R, N]."""
    outside = 1 - M
    leaves = (S @ outside.T).T / outside.sum(1, keepdim=True).clamp_min(1)  # [R, N]
    return (M * leaves).sum(1)
