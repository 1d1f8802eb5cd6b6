"""Which columns of the maps a phrase is, and which cells it should stand in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.errors import LayoutError
from diffguide.layout import Layout, Region
from diffguide.method import Context, Mover

# words that say how many, not what: no place in the picture belongs to them
_COUNT = re.compile(r"^(?:(?:an?|the|one|two|three|four|five|six|seven|eight|nine|ten|\d+)\s+)+", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """A region of the layout with the columns of its phrase in the text states."""

    region: Region
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Placed(Mover):
    """A method that puts phrases where a layout says; one layout for all pictures, or one for each prompt."""

    layout: Layout | Sequence[Layout]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layouts(type(self).__name__, self.layout)


def check_layouts(owner: str, layout: object) -> None:
    """Raise LayoutError unless it is a layout with regions, or a sequence of such."""
    each = [layout] if isinstance(layout, Layout) else layout
    if not isinstance(each, list | tuple) or not each or not all(isinstance(one, Layout) for one in each):
        raise LayoutError(
            f"{owner}.layout = {layout!r:.60} is not a Layout; make one of regions, or read one by Layout.load(file)"
        )
    if not any(region.weight > 0 for one in each for region in one.regions):
        raise LayoutError(f"{owner}.layout has no region; give it at least one, Layout(Region(phrase, box=...))")


def bare_phrase(phrase: str) -> str:
    """A phrase without leading articles and numbers: "three red cats" is "red cats"."""
    return _COUNT.sub("", phrase.strip()) or phrase


def find_targets(context: Context, layout: Layout | Sequence[Layout]) -> list[list[Target]]:
    """For each picture its regions with their columns.

    One layout serves all pictures; a sequence has one for each prompt, and pictures of one prompt follow each other.

    Raises:
        LayoutError: the number of layouts does not divide the batch.
        PromptError: a phrase is not in its prompt.
    """
    layouts = [layout] if isinstance(layout, Layout) else list(layout)
    pictures = len(context.prompts)
    if not layouts or pictures % len(layouts):
        raise LayoutError(
            f"{len(layouts)} layouts do not divide a batch of {pictures} pictures; give one, or one a prompt"
        )
    found = []
    for b in range(pictures):
        regions = layouts[b * len(layouts) // pictures].regions
        found.append(
            [Target(r, tuple(context.find(b, bare_phrase(r.phrase), r.occurrence))) for r in regions if r.weight > 0]
        )
    return found


def union(targets: list[list[Target]]) -> tuple[int, ...]:
    """Every column that some target wants, in order."""
    return tuple(sorted({c for each in targets for target in each for c in target.columns}))


def pick(values: Tensor, columns: tuple[int, ...], have: tuple[int, ...]) -> Tensor:
    """Mean over some columns [..., N] of maps [..., N, K] whose columns are `have`."""
    return values[..., [have.index(c) for c in columns]].mean(-1)


def smooth(maps: Tensor, sigma: float = 0.5) -> Tensor:
    """A 3x3 filter over [..., h, w] maps with reflected edges.

    Weights are proportional to exp(-(x / 2 sigma)²) on each axis: the published code of Attend-and-Excite has this in
    place of a Gaussian, and so have its successors.
    """
    line = torch.exp(-((torch.arange(-1.0, 2.0, device=maps.device, dtype=maps.dtype) / (2 * sigma)) ** 2))
    kernel = line[:, None] * line[None, :]
    planes = maps.reshape(-1, 1, *maps.shape[-2:])
    # a grid of one row or column has nothing to reflect
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    return F.conv2d(F.pad(planes, (1, 1, 1, 1), mode=mode), (kernel / kernel.sum())[None, None]).reshape(maps.shape)
