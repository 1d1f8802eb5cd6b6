"""Tiles, warps and stages of each kernel: a table, so that the first call measures nothing and two runs agree.

The table holds what the compiler's report calls free of spills (docs/kernels-compiled.md), not what a stopwatch chose: no GPU has
run these kernels yet. `DIFFGUIDE_FUSED` overrides it, for a sweep: "forward=64x64w4s2,keys_backward=64x64w8s1".
"""

import os
import re
from dataclasses import dataclass

import torch

LISTED = 64  # tokens of a tile in a block list, along queries and along keys
KERNELS = ("columns", "forward", "delta", "queries_backward", "keys_backward")


@dataclass(frozen=True)
class Setting:
    """BM queries by BN keys to a tile, warps to a program, stages of loads in flight."""

    BM: int
    BN: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.BM}x{self.BN}w{self.warps}s{self.stages}"


def setting(kernel: str, arch: str, dtype: torch.dtype, D: int, R: int, *, region: bool, listed: bool) -> Setting:
    """The setting of one kernel.

    Args:
        kernel: one of `KERNELS`.
        arch: "sm_90" and the like, "gfx942" and the like, or "interpreter".
        dtype: of q, k and v.
        D: head width.
        R: side columns, 0 for none.
        region: whether region bits are tested.
        listed: whether a block list is given; its tiles are 64x64 whatever the table says.

    Raises:
        ValueError: `DIFFGUIDE_FUSED` is set and malformed.
    """
    chosen = _overrides().get(kernel) or _table(kernel, arch, dtype, D, R, region)
    return Setting(LISTED, LISTED, chosen.warps, chosen.stages) if listed else chosen


def _table(kernel: str, arch: str, dtype: torch.dtype, D: int, R: int, region: bool) -> Setting:
    return Setting(64, 64, 4, 2)


def _overrides() -> dict[str, Setting]:
    found = {}
    for part in filter(None, os.environ.get("DIFFGUIDE_FUSED", "").split(",")):
        match = re.fullmatch(r"(\w+)=(\d+)x(\d+)w(\d+)s(\d+)", part.strip())
        if match is None or match[1] not in KERNELS:
            expected = f"KERNEL=BMxBNwWARPSsSTAGES with KERNEL of {', '.join(KERNELS)}"
            raise ValueError(f"DIFFGUIDE_FUSED = {part!r}: expected {expected}")
        found[match[1]] = Setting(*map(int, match.groups()[1:]))
    return found
