"""The fused kernels where none can run: their operators, what they refuse, their promises in Triton's interpreter."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_oracle import error, exact, oracle, tensors
from torch import Tensor

from diffguide.kernels import fused
from diffguide.kernels.fused import launch, ops, samples, settings

HERE = Path(__file__).parent
FULL = {
    "plain": tensors(H=2, N=5, M=6, D=8),
    "side": tensors(B=2, H=4, keys=2, N=5, M=6, D=8, R=3),
    "regions": tensors(H=2, N=5, M=6, D=8, R=2, regions=2, bias=True),
    "list": tensors(H=1, N=66, M=70, D=4, R=1) | {"blocks": torch.tensor([[1], [-1]], dtype=torch.int32)},
}
pytestmark = pytest.mark.skipif(ops.interpreted(), reason="Triton interprets: fused_in_interpreter.py is for that")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
def test_every_promise_is_kept_in_the_interpreter() -> None:
    """In a process of its own: the kernels are interpreted or compiled from the moment they are imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "fused_in_interpreter.py")]
    told = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-2000:]


@pytest.mark.parametrize("case", FULL)
def test_the_meaning_in_torch_is_attention(case: str) -> None:
    given = exact(FULL[case])
    out, lse, side_out = fused.flash(**given)
    own, own_lse, own_side = oracle(**given)
    assert error(out, own) < 1e-14 and torch.equal(lse.isfinite(), own_lse.isfinite())
    assert float((lse - own_lse)[own_lse.isfinite()].abs().max()) < 1e-13
    assert own_side is None or error(side_out, own_side) < 1e-14


@pytest.mark.parametrize("case", FULL)
def test_gradients_of_the_meaning_are_those_of_finite_differences(case: str) -> None:
    given = exact(FULL[case])
    points = tuple(given.pop(x).detach().requires_grad_() for x in "qkv")

    def steer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out, _, side_out = fused.flash(q, k, v, **given)
        return (out,) if side_out is None else (out, side_out)

    assert torch.autograd.gradcheck(steer, points, fast_mode=True)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_only_the_gradients_that_are_asked_for_are_made(wanted: str) -> None:
    given, truth = exact(FULL["side"]), exact(FULL["side"])
    for x in (given, truth):
        x[wanted] = x[wanted].clone().requires_grad_()
    for (out, _, side_out), x in ((fused.flash(**given), given), (oracle(**truth), truth)):
        loss = out.square().sum() + (side_out.square().sum() if side_out.requires_grad else 0)
        loss.backward()
        assert [name for name in "qkv" if x[name].grad is not None] == [wanted]
    assert error(given[wanted].grad, truth[wanted].grad) < 1e-13


def test_a_blend_has_the_gradient_of_a_blend() -> None:
    given = exact(tensors(H=2, N=6, M=6, D=8)) | {"blend": torch.tensor([0.3, 1.0], dtype=torch.float64)}
    points = tuple(given.pop(x).detach().requires_grad_() for x in "qkv")
    assert torch.autograd.gradcheck(lambda q, k, v: fused.flash(q, k, v, **given, blend_rows=slice(1, 5))[0], points)
    q, k, v = points
    with pytest.raises(RuntimeError, match="blend epilogue has no backward"):
        ops.flash(q, k, v, None, None, None, None, None, given["blend"], 0, 6, 0.3)[0].sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its copies
@pytest.mark.parametrize("layout", ["heads inside tokens", "tokens inside heads"])
def test_operators_keep_what_they_promise_to_torch(layout: str) -> None:
    given = tensors(H=2, N=5, M=6, D=8, R=2, regions=2, bias=True)
    q, k, v = (given[x] if layout == "heads inside tokens" else given[x].contiguous() for x in "qkv")
    rest = (given["side"], given["query_bits"], given["key_bits"], given["bias"], None)
    torch.library.opcheck(ops.column_map, (q, k, torch.zeros(1, 2, 5), 0.3, True))
    torch.library.opcheck(ops.column_map, (q, k, torch.zeros(1, 2, 5), 0.3, False))
    made = ops.flash(q, k, v, *rest, None, 0, 0, 0.3)
    backward = (made[0], made[2], q, k, v, *rest, *made, 0.3)
    torch.library.opcheck(ops.flash_backward, (*backward, True, True))
    torch.library.opcheck(ops.flash_backward, (*backward, False, True))
    points = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.flash, (*points, *rest, None, 0, 0, 0.3))


def test_compiles_whole_with_the_same_gradients() -> None:
    given = FULL["regions"]
    points = [given[x].detach().requires_grad_() for x in "qkv"]
    fixed = {x: given[x] for x in given if x not in "qkv"}

    def steer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, side_out = fused.flash(2 * q, k, v, **fixed, blend=torch.tensor([0.0, 0.5]), blend_rows=slice(0, 3))
        assert side_out is not None
        return out.square().sum() + side_out.sum(), fused.column_map(2 * q, k, lse, scale=8**-0.5)

    loss, columns = steer(*points)
    own, own_columns = torch.compile(steer, fullgraph=True, backend="aot_eager")(*points)
    assert torch.equal(columns, own_columns) and torch.equal(loss, own)
    for x, y in zip(torch.autograd.grad(loss, points), torch.autograd.grad(own, points), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("graph", [False, True])
def test_the_output_lies_in_memory_as_the_queries_do(graph: bool) -> None:
    given = tensors(H=2, N=5, M=6, D=8)
    q = given["q"].detach().requires_grad_(graph)
    assert fused.flash(**given | {"q": q})[0].stride() == q.stride()
    q = q.detach().contiguous()
    assert fused.flash(**given | {"q": q})[0].is_contiguous()


def test_imports_without_triton() -> None:
    code = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
from importlib import util
util.find_spec, found = lambda name, package=None: None if name == "triton" else found(name, package), util.find_spec
import torch
from diffguide.kernels import fused
print(fused.reason("cuda", torch.float16, 64, False))
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE.parent)
    assert told.stdout.strip() == "triton is not installed"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("cpu", torch.float16, 64, True), "no CUDA or ROCm device"),
        (("cpu", torch.float64, 64, False), "float64 is not float16, bfloat16 or float32"),
        (("cpu", torch.float16, 192, False), "heads are 192 wide, and the kernels go to 160"),
    ],
)
def test_says_why_not(args: Any, why: str) -> None:
    assert fused.reason(*args) == why


@pytest.mark.parametrize(
    ("arch", "dtype", "why"),
    [
        ("sm_75", torch.bfloat16, "sm_75 is before sm_80: without its matrix instructions the kernels spill"),
        ("sm_75", torch.float16, "sm_75 is before sm_80: without its matrix instructions the kernels spill"),
        ("gfx1100", torch.float16, "no setting for gfx1100 was ever compiled"),
        ("sm_80", torch.bfloat16, None),
        ("sm_120", torch.float16, None),
        ("sm_90", torch.float32, "float32 spills in every setting that was tried"),
        ("gfx942", torch.float16, None),
    ],
)
def test_architectures_are_refused_by_name(arch: str, dtype: torch.dtype, why: str | None) -> None:
    assert settings.unfit(arch, dtype, 64, True) == why


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_gradients_of_wide_heads_are_refused_where_they_spill(arch: str) -> None:
    why = f"on {arch} the gradient of heads wider than 128 spills in every setting that was tried"
    assert settings.unfit(arch, torch.float16, 160, True) == why
    assert settings.unfit(arch, torch.float16, 160, False) is settings.unfit(arch, torch.float16, 128, True) is None
    assert settings.unfit("sm_90", torch.float16, 160, True) is None


@pytest.mark.parametrize(
    ("arch", "version", "beside", "why"),
    [
        ("sm_90", "12.8", True, r"ptxas 12.8 .* registers nothing wrote; set TRITON_PTXAS_PATH=.*ptxas-blackwell, or"),
        ("sm_90", "12.8", False, "set TRITON_PTXAS_PATH=one of CUDA 12.9 or later, or update torch"),
        ("sm_90", "12.9", True, None),
        ("sm_90", "13.0", True, None),
        ("sm_80", "12.8", True, None),
    ],
)
def test_an_assembler_that_makes_wrong_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, version: str, beside: bool, why: str | None
) -> None:
    tool = SimpleNamespace(path=str(tmp_path / "ptxas"), version=version)
    if beside:
        (tmp_path / "ptxas-blackwell").touch()
    monkeypatch.setattr(fused, "_ptxas", lambda: tool)
    fused._assembler.cache_clear()
    said = fused._assembler(arch)
    fused._assembler.cache_clear()
    assert said is None if why is None else re.search(why, str(said))


@pytest.mark.parametrize(("D", "unit"), [(40, 8), (24, 8), (64, 1), (80, 1), (33, 1)])
def test_strides_count_in_what_the_compiler_is_told(D: int, unit: int) -> None:
    """Multiples of 16 it knows of itself; of those of 8 it is told; others are what they are."""
    pytest.importorskip("triton")
    given = samples.problem("sm_90", D, "plain", torch.float16, H=3, keys=3)
    for kernel in settings.KERNELS:
        made = samples.sample(kernel, given)
        assert made.constants["UNIT"] == unit
        for name in ("q_b", "q_h", "q_n", "o_n", "dq_h", "dk_n", "dv_b"):
            if name in made.arguments:
                axis = {"b": 0, "h": 1, "n": 2}[name[-1]]
                assert made.arguments[name] * unit == given.q.stride(axis)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "q of three axes": ({"q": torch.zeros(2, 5, 8)}, r"q: \[2, 5, 8\], expected \[B, H, N, D\]"),
    "k of another width": ({"k": torch.zeros(1, 2, 6, 16)}, r"k: \[1, 2, 6, 16\], expected \[1, 1 to 2, .*, 8\]"),
    "v of another dtype": ({"v": torch.zeros(1, 2, 6, 8).half()}, "v: torch.float16, expected torch.float32"),
    "3 heads for 2": ({"k": torch.zeros(1, 3, 6, 8), "v": torch.zeros(1, 3, 6, 8)}, r"k: \[1, 3, 6, 8\], expected"),
    "side of 33": ({"side": torch.zeros(1, 1, 6, 33)}, r"side: \[1, 1, 6, 33\], expected \[1, 2 or 1, 6, 1 to 32\]"),
    "bits alone": ({"query_bits": torch.zeros(1, 5, dtype=torch.int32)}, "query_bits and key_bits come together"),
    "bits of 64": (
        {"query_bits": torch.zeros(1, 5).long(), "key_bits": torch.zeros(1, 6).long()},
        "query_bits: torch.int64",
    ),
    "bias alone": ({"bias": torch.zeros(2, 6)}, "bias is per region bit"),
    "a list too short": ({"blocks": torch.zeros(2, 1, dtype=torch.int32)}, r"blocks: \[2, 1\], expected \[1, "),
    "blend of 3": ({"blend": torch.zeros(3)}, r"blend: \[3\], expected \[2\]"),
    "every second row": ({"blend": torch.zeros(2), "blend_rows": slice(0, 4, 2)}, "expected neighbouring rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_what_does_not_fit_by_name(case: str) -> None:
    wrong, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        fused.flash(**tensors(H=2, N=5, M=6, D=8) | wrong)


def test_a_wrong_override_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFGUIDE_FUSED", "forward=64x64w4s2,backward=64x64")
    with pytest.raises(ValueError, match=r"backward=64x64.*expected KERNEL=BMxBNwWARPSsSTAGES"):
        settings.setting("forward", "sm_90", torch.float16, 64, 0, region=False, listed=False)


@pytest.mark.parametrize(
    ("width", "parts"),
    [(8, (16, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (160, (128, 32))],
)
def test_head_widths_are_two_powers_of_two(width: int, parts: tuple[int, int]) -> None:
    assert launch.chunks(width) == parts
