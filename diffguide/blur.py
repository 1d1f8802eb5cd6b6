"""Gaussian blur of planes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian(sigma: float, size: int) -> Tensor:
    """Weights of a blur of width `sigma`: an odd number of them, float64, their sum 1."""
    x = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return weights / weights.sum()


def fitting(size: int, side: int) -> int:
    """The largest odd number up to `size` that a side of so many cells can be reflected for."""
    return min(size - 1 + size % 2, side - 1 + side % 2)


def blur(planes: Tensor, sigma: float, size: int) -> Tensor:
    """Planes [..., h, w] blurred, reflected at their edges; a side that is shorter than the kernel shortens it."""
    h, w = planes.shape[-2:]
    flat = planes.reshape(-1, 1, h, w).float()
    for axis, side in ((2, h), (3, w)):
        kernel = gaussian(sigma, fitting(size, side)).to(flat)
        reach = len(kernel) // 2
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), kernel.view(shape))
    return flat.reshape(planes.shape).to(planes.dtype)
