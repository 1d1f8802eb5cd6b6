"""Tiles, warps and stages of each kernel: a table, so that the first call measures nothing and two runs agree.

The table holds what the compiler's report calls free of spills (docs/kernels-compiled.md), not what a stopwatch
chose.
`DIFFGUIDE_FUSED` overrides it, for a sweep: "forward=64x64w4s2,keys_backward=64x64w8s1".
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
        R: side columns, 0 for none; columns of the map for the kernel of that name.
        region: whether region bits are tested.
        listed: whether a block list is given; its tiles are 64x64 whatever the table or an override says.

    Raises:
        ValueError: `DIFFGUIDE_FUSED` is set and malformed.
    """
    chosen = _overrides().get(kernel) or _table(kernel, family(arch) or "interpreter", dtype, D, R, region, listed)
    return Setting(LISTED, LISTED, chosen.warps, chosen.stages) if listed else chosen


def _table(kernel: str, arch: str, dtype: torch.dtype, D: int, R: int, region: bool, listed: bool) -> Setting:
    if kernel == "columns":
        return Setting(64, 16 if R <= 16 else 32 if R <= 32 else 64, 4, 2)
    if kernel == "delta" or arch == "interpreter":
        return Setting(64, 64, 4, 1)
    if dtype == torch.float32:  # refused on a GPU, see `unfit`: the least that does not fit
        return Setting(32, 32, 4, 1)
    if arch == "gfx942":  # 64 KiB of shared memory; more than 256 registers leave one wave, and none spill
        return Setting(64, 64, 4, 1 if kernel == "keys_backward" else 2)
    small = arch == "sm_89"  # 99 KiB of shared memory, and the matrix unit's results lie in registers
    if kernel == "keys_backward":
        return _small_keys(D, bool(R) or region, listed) if small else Setting(64, 64, 4 if D <= 80 else 8, 2)
    if small and kernel == "forward" and D > 128 and not listed:
        return Setting(64, 32, 8, 2)
    if listed or (small and kernel == "queries_backward" and D > 80):
        return Setting(64, 64, 4, 2)
    return Setting(128, 64, 8, 2 if small or kernel == "queries_backward" else 3)


def _small_keys(D: int, more: bool, listed: bool) -> Setting:
    """Of the gradient of the keys where registers are few; `more` than plain attention takes smaller tiles."""
    if D > 80:
        return Setting(64, 64, 8, 2 if D == 128 else 1)
    if listed:
        return Setting(64, 64, 4 if D <= 40 else 8, 1)
    if D <= 64 and not more:
        return Setting(64, 64, 4, 2) if D <= 40 else Setting(64, 64, 8, 1)
    return Setting(64, 32, 8, 1) if 40 < D <= 64 else Setting(32, 64, 8, 1)


def family(arch: str) -> str | None:
    """Under which name the table knows an architecture; None if no setting was ever compiled for it."""
    if arch.startswith("sm_"):
        number = int(arch.removeprefix("sm_"))
        # sm_86 and sm_120 have the shared memory of sm_89, 99 KiB; sm_80 has more and uses the same
        return {8: "sm_89", 9: "sm_90", 10: "sm_100", 12: "sm_89"}.get(number // 10)
    return {"gfx942": "gfx942", "gfx950": "gfx942", "interpreter": "interpreter"}.get(arch)


def unfit(arch: str, dtype: torch.dtype, D: int, grad: bool) -> str | None:
    """Why the kernels do not run on an architecture, or None."""
    if arch in ("sm_70", "sm_72", "sm_75"):  # compiled for float16: no matrix instruction, 2691 spills
        return f"{arch} is before sm_80: without its matrix instructions the kernels spill"
    if family(arch) is None:
        return f"no setting for {arch} was ever compiled"
    if grad and D > 128 and family(arch) == "sm_89":  # 310 to 2244 spills
        return f"on {arch} the gradient of heads wider than 128 spills in every setting that was tried"
    return "float32 spills in every setting that was tried" if dtype == torch.float32 else None


def _overrides() -> dict[str, Setting]:
    found = {}
    for part in filter(None, os.environ.get("DIFFGUIDE_FUSED", "").split(",")):
        match = re.fullmatch(r"(\w+)=(\d+)x(\d+)w(\d+)s(\d+)", part.strip())
        if match is None or match[1] not in KERNELS:
            expected = f"KERNEL=BMxBNwWARPSsSTAGES with KERNEL of {', '.join(KERNELS)}"
            raise ValueError(f"DIFFGUIDE_FUSED = {part!r}: expected {expected}")
        found[match[1]] = Setting(*map(int, match.groups()[1:]))
    return found
