"""Kernels compiled ahead of time, for GPUs that are not here: registers, spills, shared memory, matrix instructions.

The calls are those of `launch`, made with tensors without storage, so that the report is about the kernels as they are
launched. The way into the compiler is only half public; it is in this file and nowhere else.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffguide.kernels.fused.launch import Launch

# bytes of shared memory that one program may use: 163, 99, 227 KiB of the vendors' tables, 64 KiB of LDS
SHARED = {"sm_75": 65536, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
# the instructions of a matrix unit, as the assembly spells them
MATRIX = {"sm": r"\b(?:HMMA|HGMMA|UTC\w*MMA|QGMMA|DMMA)\b", "gfx": r"\bv_mfma\w*"}
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@dataclass(frozen=True)
class Build:
    """What the compiler says of one kernel on one architecture."""

    arch: str
    registers: int  # of a thread; on AMD the vector registers
    spills: int  # instructions that store registers to local memory; on AMD registers spilled
    shared: int  # bytes a program
    matrix: str  # the matrix instruction and how many there are, "" for none
    unwritten: str = ""  # uniform registers that are read before anything wrote them: a fault of the assembler

    def faults(self, allowed: int = 0) -> list[str]:
        """What would make a launch fail or crawl; `allowed` spills are forgiven."""
        found = []
        if self.shared > SHARED[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {SHARED[self.arch]} there")
        if self.spills > allowed:
            found.append(f"{self.spills} spills, {allowed} allowed")
        if self.unwritten:
            found.append(f"reads {self.unwritten}, which nothing wrote: the assembler is at fault, take another")
        return found


def compile_launch(launch: Launch, arch: str) -> Build:
    """Compile one launch for `arch`; the tensors of the launch may be on the meta device.

    Raises:
        RuntimeError: the compiler refuses the kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel: Any = launch.kernel
    source = ASTSource(kernel, *_signature(kernel.arg_names, launch))
    built = triton.compile(source, target=target, options=launch.options)
    return _amd(arch, built) if amd else _nvidia(arch, built)


def _signature(names: list[str], launch: Launch) -> tuple[dict, dict, dict]:
    """Types, constants and alignments as a launch specialises them: 1 and None constant, multiples of 16 known."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int], list] = {}
    for number, name in enumerate(names):
        value = launch.arguments.get(name, launch.constants.get(name))
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            types[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i64" if abs(value) >= 2**31 else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(number,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def _nvidia(arch: str, built: Any) -> Build:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", said.stdout + said.stderr)
    if registers is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {said.stdout + said.stderr!r:.200}")
    code = built.asm["sass"]
    spills = len(re.findall(r"\bSTL\b", code))
    # sm_100 writes uniform registers by instructions of many kinds, among which this would find what is none
    unwritten = [] if arch == "sm_100" else unwritten_registers(code)
    matrix = _matrix(code, MATRIX["sm"])
    return Build(arch, int(registers[1]), spills, built.metadata.shared, matrix, ", ".join(unwritten))


def unwritten_registers(code: str) -> list[str]:
    """Uniform registers that SASS reads before any line above writes them.

    ptxas 12.8 makes such code for sm_90: descriptors of shared memory are then what the register happens to hold.
    """
    written: set[int] = set()
    found: dict[str, None] = {}
    for line in code.splitlines():
        match = re.search(r"([A-Z][A-Z0-9_.]+) (\S.*);", line)
        if match is None:
            continue
        first, *others = (_uniform(x) for x in match[2].split(","))
        uniform = re.match(r"U|C?S2UR|R2UR|VOTEU|REDUX|LDCU", match[1])
        wide = ".64" in match[1] or ".WIDE" in match[1]
        reads = {n for some in others for n in some} | (set() if uniform else first)
        found |= {f"UR{n}": None for n in sorted(reads - written)}
        if uniform:
            written |= first | ({n + 1 for n in first} if wide else set())
    return list(found)


def _uniform(operand: str) -> set[int]:
    """The numbers of the uniform registers of an operand; a descriptor of a matrix instruction is four of them.

    Of those the last two are read in any case, the first two only where both factors lie in shared memory.
    """
    numbers = {int(n) for n in re.findall(r"\bUR(\d+)\b", operand)}
    return {n + 2 for n in numbers} | {n + 3 for n in numbers} if "gdesc[" in operand else numbers


def _amd(arch: str, built: Any) -> Build:
    code = built.asm["amdgcn"]
    found = {name: re.search(rf"\.{name}:\s+(\d+)", code) for name in ("vgpr_count", "vgpr_spill_count")}
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    if len(numbers) < len(found):
        raise RuntimeError(f"the assembly of {arch} does not tell its registers")
    matrix = _matrix(code, MATRIX["gfx"])
    return Build(arch, numbers["vgpr_count"], numbers["vgpr_spill_count"], built.metadata.shared, matrix)


def _matrix(code: str, pattern: str) -> str:
    found = [name.split("_")[1] if name.startswith("v_") else name for name in re.findall(pattern, code)]
    return ", ".join(f"{name} {found.count(name)}" for name in sorted(set(found)))
