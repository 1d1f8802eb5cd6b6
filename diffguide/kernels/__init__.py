"""Attention and what can be read off it. Every door has its meaning in plain PyTorch."""

from diffguide.kernels.reference import attention, probabilities

__all__ = ["attention", "probabilities"]
