"""Backward guidance, also called layout guidance. M. Chen, I. Laina, A. Vedaldi, WACV 2024, arXiv 2304.03373."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide.layout import Layout, Region
from diffguide.maps import Maps, Watch
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.site import Grid
from diffguide.targets import Placed, find_targets, union


@dataclass(frozen=True)
class BackwardGuidance(Placed):
    r"""The attention of a phrase is drawn into its boxes.

    $E = \big(1 - \sum_{i \in M} P_i \big/ \sum_i P_i\big)^2$ for each head, averaged over heads, tokens, objects and
    modules; latents move by $\sigma^2 / (1 + \sigma^2)$ times the gradient of $30\,E$ at the model's scale (the
    published code moves sigma-scaled latents by $\sigma^2$; the conversion is our choice), as long as $E$ is above a
    threshold.
    """

    scale: float = param(30.0, "strength: 0 changes nothing, too high spoils the picture", low=0.0, high=1000.0)
    threshold: float = param(0.2, "E below which a picture is left alone", low=0.0, high=1.0)
    iterations: int = param(5, "most moves in one step", low=1, high=100)
    sides: tuple[int, ...] = param((8, 16), "grids of the maps: the nearest the model has, in tokens", low=4, high=64)
    window: Window = param((0.0, 0.2), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    neutral = {"scale": 0.0}
    paper = "arXiv 2304.03373"

    def prepare(self, context: Context) -> None:
        context.memory["targets"] = targets = find_targets(context, self.layout)
        context.memory["columns"] = union(targets)

    def watch(self, context: Context) -> dict[str, Watch]:
        columns = context.memory.get("columns")
        return {"cross": Watch("cross", self.sides, columns, head_mean=False, blocks=("mid", "up"))}

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        losses = []
        for row, b in enumerate(context.pictures):
            terms = []
            for target in context.memory["targets"][b]:
                for seen in maps["cross"]:
                    columns = context.memory["columns"]
                    P = seen.values[row][..., [columns.index(c) for c in target.columns]]  # [H, N, K]
                    M = cells_inside(target.region, seen.grid).to(P.device).flatten()[:, None]
                    inside = (P * M).sum(1) / P.sum(1).clamp_min(1e-12)
                    terms.append(target.region.weight * ((1 - inside) ** 2).mean())
            losses.append(self.scale * torch.stack(terms).mean() if terms else maps["cross"][0].values[row].sum() * 0)
        return torch.stack(losses)

    def rate(self, context: Context) -> float:
        return context.sigma**2 / (1 + context.sigma**2)

    def most(self, context: Context) -> int:
        return self.iterations

    def again(self, history: Tensor, context: Context) -> Tensor:
        return history[-1] / self.scale > self.threshold


def cells_inside(region: Region, grid: Grid) -> Tensor:
    """Cells [h, w] of a region: 1 inside, by cutting off fractions as the published code does, at least one cell."""
    h, w = grid
    if region.mask is not None:
        return torch.from_numpy(Layout(region).rasterise(h, w)[0]).ge(0.5).float()
    M = torch.zeros(h, w)
    for x0, y0, x1, y1 in region.instances:
        left, top = min(int(x0 * w), w - 1), min(int(y0 * h), h - 1)
        M[top : max(int(y1 * h), top + 1), left : max(int(x1 * w), left + 1)] = 1
    return M
