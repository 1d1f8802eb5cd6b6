"""From tensors to launches: what each kernel is called with. The report compiles exactly these calls."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels.fused.settings import LISTED, Setting, setting

LOG2E = math.log2(math.e)
FEATURES = ("q", "k", "v", "o", "do", "dq", "dk", "dv")  # whose strides have these names in all kernels


@dataclass(frozen=True)
class Launch:
    """One kernel, how many programs of it, and its arguments by name; constants are what it is compiled for."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    setting: Setting

    @property
    def options(self) -> dict[str, int]:
        """Triton's own keywords beside the constants. It will not always fuse a product and a sum unless told."""
        return {"num_warps": self.setting.warps, "num_stages": self.setting.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Launch it on the device of its tensors."""
        first = next(x for x in self.arguments.values() if isinstance(x, Tensor))
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.constants, **self.options)


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942" or, on a CPU, "interpreter"."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def exactness(arch: str) -> str:
    """How float32 is multiplied: NVIDIA's matrix unit takes three parts of 10 bits; without the unit it spills."""
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def chunks(D: int) -> tuple[int, int]:
    """A head width as one or two powers of two of at least 16: 64 = 64 + 0, 80 = 64 + 16, 40 = 32 + 16 (8 unused)."""
    first = max(16, 1 << (D.bit_length() - 1))
    rest = D - first
    return first, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


def padded(R: int) -> int:
    """Side columns or bits as a matrix instruction takes them: none, 16 or 32."""
    return 0 if R == 0 else max(16, 1 << (R - 1).bit_length())


def column_map(q: Tensor, k: Tensor, lse: Tensor, out: Tensor, scale: float, arch: str) -> Launch:
    """`out` is [B, N, R], or [B, H, N, R]."""
    from diffguide.kernels.fused.columns import columns

    (B, H, N, D), R, mean = q.shape, k.shape[2], out.ndim == 3
    chosen = setting("columns", arch, q.dtype, D, R, region=False, listed=False)
    strides = out.stride()[:-1]
    arguments = {"Q": q, "K": k, "Lse": lse, "Map": out}
    arguments |= _strides("q", "bhnd", q) | _strides("k", "bhnd", k) | _strides("l", "bhn", lse)
    arguments |= dict(zip(("m_b", "m_h", "m_n"), (strides[0], 0, strides[1]) if mean else strides, strict=True))
    arguments |= {"heads": H, "group": H // k.shape[1], "N": N, "R": R, "scale2": scale * LOG2E}
    D0, D1 = chunks(D)
    constants = {"D": D, "D0": D0, "D1": D1, "BM": chosen.BM, "BN": chosen.BN, "MEAN": mean, "EXACT": exactness(arch)}
    programs = _tiles(N, chosen.BM) * _tiles(R, chosen.BN) * B * (1 if mean else H)
    return _launch(columns, programs, arguments, constants, chosen)


@dataclass(frozen=True)
class Problem:
    """The inputs of flash attention, checked, with what every kernel asks of them. Shapes as in `flash`."""

    q: Tensor
    k: Tensor
    v: Tensor
    side: Tensor | None
    query_bits: Tensor | None
    key_bits: Tensor | None
    bias: Tensor | None
    blocks: Tensor | None
    scale: float
    arch: str

    @property
    def sides(self) -> int:
        return 0 if self.side is None else self.side.shape[3]

    def setting(self, kernel: str) -> Setting:
        flags = {"region": self.query_bits is not None, "listed": self.blocks is not None}
        return setting(kernel, self.arch, self.q.dtype, self.q.shape[3], self.sides, **flags)

    def arguments(self) -> dict[str, Any]:
        """What the flash kernels have in common."""
        q, k, v, side = self.q, self.k, self.v, self.side
        if side is not None:
            # [B or 1, 1 or H, M, R]: a stride of 0 along what is shared; float16 beside both half types
            side = side.to(q.dtype if q.dtype == torch.float32 else torch.float16)
            side = side.expand(q.shape[0], q.shape[1], -1, -1)
        given: dict[str, Any] = {"Q": q, "K": k, "V": v, "Side": side}
        given |= {"QueryBits": self.query_bits, "KeyBits": self.key_bits, "Bias": self.bias}
        given |= _strides("q", "bhnd", q) | _strides("k", "bhnd", k) | _strides("v", "bhnd", v)
        given |= _strides("g", "bhnr", side) | _strides("t", "rn", self.bias)
        for name, bits in (("qb", self.query_bits), ("kb", self.key_bits)):
            given |= _strides(name, "bn", None if bits is None else bits.expand(q.shape[0], -1))
        heads = q.shape[1]
        given |= {"heads": heads, "group": heads // k.shape[1], "N": q.shape[2], "M": k.shape[2]}
        return given | {"scale2": self.scale * LOG2E}

    def constants(self, chosen: Setting) -> dict[str, Any]:
        D = self.q.shape[3]
        D0, D1 = chunks(D)
        rows = 0 if self.bias is None else self.bias.shape[0]
        given = {
            "D": D,
            "D0": D0,
            "D1": D1,
            "R": self.sides,
            "RP": padded(self.sides),
            "ROWS": rows,
            "BITS": padded(rows),
        }
        given |= {"BM": chosen.BM, "BN": chosen.BN, "EXACT": exactness(self.arch)}
        return given | {"REGION": self.query_bits is not None, "LIST": self.blocks is not None}


def flash(
    problem: Problem, out: Tensor, lse: Tensor, side_out: Tensor, blend: Tensor | None, rows: tuple[int, int]
) -> Launch:
    """Fill `out` [B, H, N, D], `lse` [B, H, N] and `side_out` [B, H, N, R]."""
    from diffguide.kernels.fused.forward import forward

    chosen = problem.setting("forward")
    arguments = problem.arguments() | {"Out": out, "Lse": lse, "SideOut": side_out, "Blend": blend}
    arguments |= dict(zip(("o_b", "o_h", "o_n"), out.stride(), strict=False))
    arguments |= {"first": rows[0], "last": rows[1]} | _list("Blocks", problem.blocks)
    constants = problem.constants(chosen) | {"BLEND": blend is not None}
    return _launch(forward, _tiles(out.shape[2], chosen.BM) * out.shape[0] * out.shape[1], arguments, constants, chosen)


def delta(problem: Problem, out: Tensor, d_out: Tensor, side_out: Tensor, d_side: Tensor, into: Tensor) -> Launch:
    """Fill `into` [B, H, N]."""
    from diffguide.kernels.fused.delta import delta

    chosen = problem.setting("delta")
    B, H, N, D = out.shape
    arguments = {"Out": out, "DOut": d_out, "SideOut": side_out, "DSide": d_side, "Delta": into, "heads": H, "N": N}
    arguments |= _strides("o", "bhnd", out) | _strides("do", "bhnd", d_out)
    arguments |= _strides("so", "bhnr", side_out) | _strides("ds", "bhnr", d_side)
    D0, D1 = chunks(D)
    constants = {"D": D, "D0": D0, "D1": D1, "R": problem.sides, "RP": padded(problem.sides), "BM": chosen.BM}
    return _launch(delta, _tiles(N, chosen.BM) * B * H, arguments, constants, chosen)


def queries_backward(problem: Problem, saved: dict[str, Tensor], dq: Tensor) -> Launch:
    """Fill `dq` [B, H, N, D]; `saved` holds DOut, DSide, Lse, Delta and Factors."""
    from diffguide.kernels.fused.queries_backward import queries_backward

    chosen = problem.setting("queries_backward")
    arguments = _backward(problem, saved) | {"DQ": dq} | _list("Blocks", problem.blocks)
    arguments |= dict(zip(("dq_b", "dq_h", "dq_n"), dq.stride(), strict=False))
    programs = _tiles(dq.shape[2], chosen.BM) * dq.shape[0] * dq.shape[1]
    return _launch(queries_backward, programs, arguments, problem.constants(chosen), chosen)


def keys_backward(problem: Problem, saved: dict[str, Tensor], dk: Tensor, dv: Tensor) -> Launch:
    """Fill `dk` and `dv` [B, H of k, M, D]."""
    from diffguide.kernels.fused.keys_backward import keys_backward

    chosen = problem.setting("keys_backward")
    takers = None if problem.blocks is None else inverse(problem.blocks, _tiles(problem.k.shape[2], LISTED))
    arguments = _backward(problem, saved) | {"DK": dk, "DV": dv} | _list("Takers", takers)
    arguments |= dict(
        zip(("dk_b", "dk_h", "dk_n", "dv_b", "dv_h", "dv_n"), dk.stride()[:3] + dv.stride()[:3], strict=True)
    )
    programs = _tiles(dk.shape[2], chosen.BN) * dk.shape[0] * dk.shape[1]
    return _launch(keys_backward, programs, arguments, problem.constants(chosen), chosen)


def _launch(
    kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any], chosen: Setting
) -> Launch:
    """A launch whose tensors' strides count in units that the compiler is told.

    It knows of multiples of 16 by itself. Heads of 40 in a row of memory are multiples of 8, which it would take for
    numbers of no property, and then read each number by itself.
    """
    strides = {name: n for name, n in arguments.items() if name.rpartition("_")[0] in FEATURES and name[-1] in "bhn"}
    unit = 8 if all(n % 8 == 0 for n in strides.values()) and any(n % 16 for n in strides.values()) else 1
    counted = {name: n // unit for name, n in strides.items()}
    return Launch(kernel, programs, arguments | counted, constants | {"UNIT": unit}, chosen)


def inverse(blocks: Tensor, tiles: int) -> Tensor:
    """Which query tiles name each of `tiles` key tiles: int32 [tiles, query tiles], padded with -1 at the end."""
    named = torch.zeros(blocks.shape[0], tiles + 1, dtype=torch.bool, device=blocks.device)
    there = (blocks >= 0) & (blocks < tiles)
    named.scatter_(1, torch.where(there, blocks, tiles).long(), True)
    number = torch.arange(blocks.shape[0], dtype=torch.int32, device=blocks.device)
    takers = torch.where(named[:, :tiles].mT, number, blocks.shape[0]).sort(1).values
    return torch.where(takers < blocks.shape[0], takers, -1)


def _backward(problem: Problem, saved: dict[str, Tensor]) -> dict[str, Any]:
    strides = _strides("do", "bhnd", saved["DOut"]) | _strides("ds", "bhnr", saved["DSide"])
    return problem.arguments() | saved | strides | {"scale": problem.scale}


def _list(name: str, blocks: Tensor | None) -> dict[str, Any]:
    """A block list, contiguous, and how far each row of it has to be read."""
    if blocks is None:
        return {name: None, "Counts": None, "width": 0}
    number = torch.arange(1, blocks.shape[1] + 1, dtype=torch.int32, device=blocks.device)
    counts = torch.where(blocks >= 0, number, 0).amax(1)
    return {name: blocks.contiguous(), "Counts": counts, "width": blocks.shape[1]}


def _strides(name: str, axes: str, x: Tensor | None) -> dict[str, int]:
    return {f"{name}_{axis}": 0 if x is None else x.stride(i) for i, axis in enumerate(axes)}


def _tiles(tokens: int, tile: int) -> int:
    return -(-tokens // tile)
