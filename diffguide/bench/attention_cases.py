"""Calls of attention as real models make them, and smaller twins of the same kind for a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels import Blend, Blocks, Capture, Regions, Window

Sizes = tuple[int, int, int, int, int]  # B, H, N, M, D


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: the model, its size, and the kind of layer.
        sizes: B, H, N, M, D of the model.
        small: those of the twin.
        asked: makes the options from the sizes.
        gradient: forward and backward, in place of a forward alone.
    """

    name: str
    sizes: Sizes
    small: Sizes
    asked: Callable[[Sizes], dict[str, Any]]
    gradient: bool = False

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """q, k, v and options, always the same numbers."""
        sizes = self.small if device.type == "cpu" else self.sizes
        B, H, N, M, D = sizes
        rng = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, H, n, D, generator=rng).to(device, dtype) for n in (N, M, M))
        return (q, k, v), {name: _moved(option, device) for name, option in self.asked(sizes).items()}


def _moved(option: Any, device: torch.device) -> Any:
    tensors = {n: x.to(device) for n, x in vars(option).items() if isinstance(x, Tensor)}
    return replace(option, **tensors) if tensors else option


def nothing(sizes: Sizes) -> dict[str, Any]:
    return {}


def columns(count: int, every: int = 1) -> Callable[[Sizes], dict[str, Any]]:
    return lambda sizes: {"capture": Capture(range(1, 1 + count * every, every))}


def regions(count: int, base: int) -> Callable[[Sizes], dict[str, Any]]:
    """Prompts for quarters of the picture behind a text of `base` words that all see."""

    def ask(sizes: Sizes) -> dict[str, Any]:
        _, _, N, M, _ = sizes
        query = 1 | 2 << (torch.arange(N) * count // N)
        key = torch.where(torch.arange(M) < base, 1, 2 << ((torch.arange(M) - base).clamp_min(0) * count // (M - base)))
        return {"regions": Regions(query, key)}

    return ask


def window(shape: tuple[int, ...], small: tuple[int, ...], size: Any, less: Any, **more: Any) -> Any:
    """A window on the grid of the model, and a smaller one on that of its twin; text stands before the grid."""

    def ask(sizes: Sizes) -> dict[str, Any]:
        N = sizes[2]
        own, k = (shape, size) if torch.Size(shape).numel() <= N else (small, less)
        return {"window": Window(own, k, first=N - torch.Size(own).numel(), **more)}

    return ask


def blocks(count: int, share: float) -> Callable[[Sizes], dict[str, Any]]:
    """So many blocks of keys, each query of each head with its own choice among them."""

    def ask(sizes: Sizes) -> dict[str, Any]:
        B, H, N, M, _ = sizes
        best = torch.rand(B, H, N, count, generator=torch.Generator().manual_seed(1)).argsort(-1)
        return {"blocks": Blocks(best < round(share * count), keys=-(-M // count))}

    return ask


def blend(sizes: Sizes) -> dict[str, Any]:
    return {"blend": Blend([float(h % 2) for h in range(sizes[1])])}


SELF = (1, 2, 4096, 4096, 64)  # the twin of most
_EVERY = (
    Case("sd15_512_self", (2, 8, 4096, 4096, 40), (1, 2, 4096, 4096, 40), columns(16)),
    Case("sd15_512_cross", (2, 8, 4096, 77, 40), (1, 8, 4096, 77, 40), columns(4)),
    Case("sdxl_1024_plain", (2, 10, 4096, 4096, 64), SELF, nothing),
    Case("sdxl_1024_plain_gradient", (1, 10, 4096, 4096, 64), SELF, nothing, gradient=True),
    Case("sdxl_1024_self", (2, 10, 4096, 4096, 64), SELF, columns(16)),
    Case("sdxl_1024_self_gradient", (1, 10, 4096, 4096, 64), SELF, columns(16), gradient=True),
    Case("sdxl_1024_cross", (2, 10, 4096, 77, 64), (1, 8, 4096, 77, 64), columns(4)),
    Case("sdxl_1024_cross_gradient", (1, 10, 4096, 77, 64), (1, 8, 4096, 77, 64), columns(4), gradient=True),
    Case("sdxl_1024_regions", (2, 10, 4096, 385, 64), (1, 4, 4096, 385, 64), regions(4, 77)),
    Case("sdxl_1024_pag", (2, 10, 4096, 4096, 64), (1, 8, 2048, 2048, 64), blend),
    Case("sdxl_1024_window", (2, 10, 4096, 4096, 64), SELF, window((64, 64), (64, 64), 16, 16)),
    Case(
        "sdxl_2048_window", (1, 10, 16384, 16384, 64), (1, 1, 16384, 16384, 64), window((128, 128), (128, 128), 16, 16)
    ),
    Case(
        "sdxl_2048_window_stride8",
        (1, 10, 16384, 16384, 64),
        (1, 1, 16384, 16384, 64),
        window((128, 128), (128, 128), 16, 16, stride=8),
    ),
    Case(
        "sdxl_2048_tiles",
        (1, 10, 16384, 16384, 64),
        (1, 1, 16384, 16384, 64),
        window((128, 128), (128, 128), 24, 24, stride=8, order=(8, 8)),
    ),
    Case("flux_1024_plain", (1, 24, 4608, 4608, 128), (1, 4, 2304, 2304, 128), nothing),
    Case("flux_1024_plain_gradient", (1, 24, 4608, 4608, 128), (1, 4, 2304, 2304, 128), nothing, gradient=True),
    Case("flux_1024_joint_gradient", (1, 24, 4608, 4608, 128), (1, 4, 2304, 2304, 128), columns(8), gradient=True),
    Case("flux_1024_joint", (1, 24, 4608, 4608, 128), (1, 4, 2304, 2304, 128), columns(8)),
    Case("flux_1024_joint_regions", (1, 24, 4608, 4608, 128), (1, 4, 2304, 2304, 128), regions(4, 512)),
    Case(
        "flux_2048_window",
        (1, 24, 16896, 16896, 128),
        (1, 4, 4608, 4608, 128),
        window((128, 128), (64, 64), 64, 16),
    ),
    Case(
        "wan_480p_self",
        (1, 40, 32760, 32760, 128),
        (1, 4, 4680, 4680, 128),
        window((21, 30, 52), (5, 24, 39), (21, 15, 26), (5, 12, 13)),
    ),
    Case("wan_480p_blocks", (1, 12, 32760, 32760, 128), (1, 4, 4096, 4096, 128), blocks(72, 0.25)),
    Case(
        "wan_1080p_self",
        (1, 40, 171360, 171360, 128),
        (1, 2, 8160, 8160, 128),
        window((21, 68, 120), (4, 34, 60), (21, 31, 53), (4, 15, 27)),
    ),
)
CASES = {case.name: case for case in _EVERY}
