"""R&B, region and boundary. J. Xiao et al., ICLR 2024, arXiv 2310.08872; formulas as in the authors' code."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.concepts import over_words
from diffguide.layout import Layout
from diffguide.maps import Maps, Watch
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.site import Grid
from diffguide.targets import Placed, find_targets, smooth

EPS = 1e-8
FACTOR = 120.0  # of the maps before the softmax over words whose edges are judged
SIGMA = 3.0


@dataclass(frozen=True)
class RegionBoundary(Placed):
    r"""The box around what is attended to is to be the box of the layout; mass and edges move there.

    $A'$ is the map of a phrase in 0..1, $\theta = 0.4\,\mathrm{mean}_M A' + 0.6\,\mathrm{mean}_{\bar M} A'$, $B$ the
    bounding box of $A' > \theta$ and $\iota = \mathrm{IoU}(B, M)$. Region terms: $2 - (1 - \iota)$ times the shares of
    a straight-through $B$ that lie in $M$, and half of that of $\sigma(20 (A' - \theta))$; where there are several
    phrases and one's strongest response is outside, its edges (Sobel) too. Boxes end one cell later than in the
    authors' code, where a single cell has no area (our choice).
    """

    scale: float = param(70.0, "step size: 0 changes nothing, too high spoils the picture", low=0.0, high=1000.0)
    iterations: int = param(5, "most moves in one step", low=1, high=100)
    reached: float = param(0.85, "IoU at which a phrase is left alone", low=0.0, high=1.0)
    boundary: float = param(1.0, "weight of the edges", low=0.0, high=10.0)
    sides: tuple[int, ...] = param((8, 16), "grids of the maps: the nearest the model has, in tokens", low=4, high=64)
    fine: int = param(64, "side of the grid that maps are brought to", low=8, high=128)
    window: Window = param((0.0, 0.2), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    neutral = {"scale": 0.0}
    paper = "arXiv 2310.08872"

    def prepare(self, context: Context) -> None:
        context.memory["targets"] = find_targets(context, self.layout)

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"cross": Watch("cross", self.sides)}

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        grid = max((seen.grid for seen in maps["cross"]), key=lambda g: g[0] * g[1])
        grow = max(1.0, self.fine / max(grid))
        fine = (round(grid[0] * grow), round(grid[1] * grow))
        losses = []
        for row, b in enumerate(context.pictures):
            targets = context.memory["targets"][b]
            planes = [enlarge(seen.values[row], seen.grid, fine) for seen in maps["cross"]]
            A = sum(planes[1:], planes[0]) / len(planes)  # [T, h, w]
            words = over_words(A.flatten(1).T, -1, FACTOR).T.unflatten(1, fine)  # [T', h, w]
            terms = []
            for target in targets:
                cells = Layout(target.region).rasterise(*fine)[0]
                M = torch.from_numpy(cells).ge(0.5).to(A)
                raw = A[list(target.columns)].sum(0)
                term = self.of_phrase(raw, M, words[[c - 1 for c in target.columns]].sum(0), alone=len(targets) == 1)
                terms.append(target.region.weight * term)
            losses.append(torch.stack(terms).mean() if terms else A.sum() * 0)
        return torch.stack(losses)

    def of_phrase(self, raw: Tensor, M: Tensor, words: Tensor, *, alone: bool) -> Tensor:
        """The loss of one phrase from its map, cells and share among the words, all [h, w]."""
        a = (raw - raw.amin()) / (raw.amax() - raw.amin() + EPS)
        threshold = 0.4 * mean_in(a, M) + 0.6 * mean_in(a, 1 - M)
        B = bounding_box(a.detach() > threshold.detach())
        iou = ((B * M).sum() / (B + M).clamp(max=1).sum()).item()
        if iou >= self.reached:
            return raw.sum() * 0
        through, inside = (B - a).detach() + a, (B * M - a).detach() + a
        loss = both_ways(M * inside, through, 1 - iou)
        soft = torch.sigmoid(20 * (a - threshold))
        loss = loss + both_ways(M * soft, soft, 0.5 * (1 - iou))
        if self.boundary and not alone and not M.flatten()[raw.argmax()]:
            E = edges(words / words.amax().detach().clamp_min(EPS))
            crop = M[1:-1, 1:-1]
            loss = loss + self.boundary * (1 - (1 - iou) * (E * crop).sum() / (E.sum() + EPS))
        return loss

    def rate(self, context: Context) -> float:
        return self.scale

    def most(self, context: Context) -> int:
        return self.iterations


def enlarge(values: Tensor, grid: Grid, fine: Grid) -> Tensor:
    """A map [N, T] as planes [T, h, w] on a finer grid."""
    planes = values.T.unflatten(1, grid)[None]
    return F.interpolate(planes, size=fine, mode="bilinear", align_corners=False)[0]


def mean_in(a: Tensor, M: Tensor) -> Tensor:
    """Mean of `a` over the cells of M; over all of them where M has none."""
    return (a * M).sum() / M.sum() if M.any() else a.mean()


def bounding_box(on: Tensor) -> Tensor:
    """1 in the smallest box around the cells that are on; nowhere if none is."""
    box = torch.zeros(on.shape, device=on.device)
    if on.any():
        rows, cols = on.any(1).nonzero()[:, 0], on.any(0).nonzero()[:, 0]
        box[int(rows[0]) : int(rows[-1]) + 1, int(cols[0]) : int(cols[-1]) + 1] = 1
    return box


def both_ways(inside: Tensor, whole: Tensor, weight: float) -> Tensor:
    """1 - weight * share inside, twice: once its numerator has the gradient, once its denominator."""
    part, total = inside.sum(), whole.sum()
    return 2 - weight * part / (total.detach() + EPS) - weight * part.detach() / (total + EPS)


def edges(a: Tensor) -> Tensor:
    """Sobel magnitude [h - 2, w - 2] of the smoothed map [h, w]."""
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=a.device, dtype=a.dtype)
    both = F.conv2d(smooth(a, SIGMA)[None, None], torch.stack([kernel, kernel.T])[:, None])[0]
    return (both.square().sum(0) + EPS).sqrt()
