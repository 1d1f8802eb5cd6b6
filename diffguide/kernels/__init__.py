"""Attention, and what can be asked of it beside its output. Every route has its meaning in plain PyTorch."""

from diffguide.kernels.door import Explanation, attend, explain, keeps_output, observe, prefer
from diffguide.kernels.options import Blend, Blocks, Capture, Regions
from diffguide.kernels.windows import Window

__all__ = [
    "Blend",
    "Blocks",
    "Capture",
    "Explanation",
    "Regions",
    "Window",
    "attend",
    "explain",
    "keeps_output",
    "observe",
    "prefer",
]
