"""The compiler's report of the fused kernels: a few of its rows, what it calls a fault, and its command."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from diffguide.kernels import report
from diffguide.kernels.fused import ops

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(ops.interpreted(), reason="Triton interprets, so nothing is compiled"),
]
PAGE = Path(__file__).parent.parent / "docs/kernels-compiled.md"


def parts() -> None:
    """Skip without the compilers that come inside triton's wheel."""
    from triton import knobs

    if not Path(knobs.nvidia.cuobjdump.path).exists():
        pytest.skip("this triton comes without cuobjdump")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kernel", "width", "matrix"),
    [
        ("sm_90", "forward", 64, "HGMMA"),
        ("sm_80", "keys_backward", 40, "HMMA"),
        ("gfx942", "columns", 64, "mfma"),
        ("sm_90", "delta", 80, ""),
    ],
)
def test_kernels_fit_their_gpus_and_use_the_matrix_unit(arch: str, kernel: str, width: int, matrix: str) -> None:
    parts()
    row = report.build(arch, kernel, width, "plain")
    assert report.faults(row) == [] and row["spills"] == 0
    assert row["matrix"].split(" ")[0] == matrix


def test_a_fault_is_shared_memory_that_is_not_there_or_a_spill_that_is_not_allowed() -> None:
    from diffguide.kernels.fused.compiled import Build

    assert Build("sm_89", 255, 0, 101376, "HMMA 8").faults() == []
    assert Build("sm_89", 255, 0, 101377, "HMMA 8").faults() == ["101377 bytes of shared memory, 101376 there"]
    assert Build("sm_90", 255, 8, 0, "HGMMA 8").faults(7) == ["8 spills, 7 allowed"]
    assert Build("sm_90", 255, 8, 0, "HGMMA 8").faults(8) == []


@pytest.mark.parametrize("flags", ["plain", "side", "all, listed"])
@pytest.mark.parametrize("kernel", ["columns", "forward", "delta", "queries_backward", "keys_backward"])
def test_triton_would_compile_a_launch_as_the_report_does(
    kernel: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own launcher, told that there is an H100 and stopped where it calls the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget

    from diffguide.kernels.fused import compiled, samples

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    class ReachedError(Exception):
        pass

    asked = []

    def stop(source: Any, target: Any = None, options: Any = None, **more: Any) -> None:
        asked.append((source, options))
        raise ReachedError

    launch = samples.sample(kernel, samples.problem("sm_90", 80, flags, torch.float16))
    fresh = triton.jit(launch.kernel.fn)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.compiler, "compile", stop)
    with pytest.raises(ReachedError):
        fresh.warmup(grid=(1,), **launch.arguments, **launch.constants, **launch.options)
    ((source, options),) = asked
    types, constants, aligned = compiled._signature(fresh.arg_names, launch)
    assert dict(source.signature) == {name: types[name] for name in fresh.arg_names}
    assert {fresh.arg_names[i]: x for (i,), x in source.constants.items()} == constants
    assert {where for where, known in source.attrs.items() if known} == set(aligned)
    assert {name: options[name] for name in launch.options} == launch.options


def test_constants_and_alignments_of_a_launch() -> None:
    """1 and None are constants; tensors and multiples of 16 are known to be aligned."""
    from diffguide.kernels.fused import compiled, samples

    launch = samples.sample("forward", samples.problem("sm_90", 80, "side", torch.float16))
    names = launch.kernel.arg_names
    types, constants, aligned = compiled._signature(names, launch)
    assert set(names) == set(types) == set(launch.arguments) | set(launch.constants)
    assert types["Q"] == "*fp16" and types["Lse"] == "*fp32" and types["scale2"] == "fp32" and types["M"] == "i32"
    assert constants["q_d"] == 1 and constants["Bias"] is None and constants["BM"] == launch.setting.BM
    numbers = {names[i] for (i,) in aligned}
    assert {"Q", "q_n", "M"} <= numbers and not numbers & {"heads", "q_d", "BM", "scale2"}


SASS = """
--:-:-:-:1	UMOV UR12, 0x400;
--:-:-:-:1	UIADD3 UR5, UR12, 0x3000, URZ;
{}
--:-:-:-:4	STS.U16 [R116+UR12+0x3000], R127;
--:-:-:-:1	UIADD3.64 UR18, UR4, 0x3e, URZ;
--:-:-:-:3	HGMMA.64x32x16.F32 R56, R28, gdesc[UR16].tnspB, R56;
--:-:-:-:2	@P1 IMAD R27, R125, UR5, RZ;
"""


@pytest.mark.parametrize(
    ("line", "unwritten"),
    [
        ("--:-:-:-:1\tR2UR UR4, R3;", []),
        ("--:-:-:-:1\tFADD R1, R2, R3;", ["UR4"]),
        ("--:-:-:-:1\tULDC.64 UR4, c[0x0][0x260];", []),
        ("--:-:-:-:1\tUIADD3 UR4, UP0, UR30, 0x20, URZ;", ["UR30"]),
        ("--:-:-:-:1\tUMOV UR4, 0x1;\n--:-:-:-:1\tHGMMA.64x16x16.F32 R2, R8, gdesc[UR20].tnspB, R2;", ["UR22", "UR23"]),
    ],
)
def test_registers_that_nothing_wrote_are_found(line: str, unwritten: list[str]) -> None:
    from diffguide.kernels.fused.compiled import Build, unwritten_registers

    assert unwritten_registers(SASS.format(line)) == unwritten
    faults = Build("sm_90", 32, 0, 0, "", ", ".join(unwritten)).faults()
    assert bool(faults) == bool(unwritten) and all("which nothing wrote" in fault for fault in faults)


def test_matrix_instructions_are_counted_by_name() -> None:
    from diffguide.kernels.fused.compiled import MATRIX, _matrix

    assert _matrix("  HGMMA.64x64x16.F32 R1\n HGMMA.64 R2\n HMMA.16816 R3; FFMA", MATRIX["sm"]) == "HGMMA 2, HMMA 1"
    assert _matrix("v_mfma_f32_16x16x16_f16 a, v_add_f32", MATRIX["gfx"]) == "mfma 1"


def test_the_whole_table_is_every_architecture_kernel_and_width() -> None:
    rows = list(report.configurations())
    # of two architectures delta and both backward kernels at width 160 are refused
    assert len(rows) == len(set(rows)) == 5 * (2 + 3 * 3) * 5 - 2 * (1 + 2 * 3)
    assert {
        (arch, kernel, 160, "plain") in rows for arch in ("sm_80", "sm_89") for kernel in ("forward", "columns")
    } == {True}
    assert list(report.configurations(["sm_90"], ["delta"], [64])) == [("sm_90", "delta", 64, "plain")]


ROW: dict[str, Any] = {
    "kernel": "delta", "D": 64, "flags": "plain", "tiles": "64x64w4s1", "arch": "sm_90",
    "registers": 32, "spills": 0, "shared": 256, "matrix": "",
}  # fmt: skip


def test_the_page_is_written_between_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "build", lambda arch, kernel, width, flags, dtype: ROW | {"D": width})
    page, kept = tmp_path / "page.md", tmp_path / "rows.json"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    only = ["--arch", "sm_90", "--kernel", "delta", "--width", "64", "--page", str(page), "--json", str(kept)]
    assert report.main(only) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "## sm_90" in text and "| delta | 64 | plain | 64x64w4s1 | 32 | 0 | 256 |  |" in text
    assert json.loads(kept.read_text())["rows"] == [ROW]
    assert "1 kernels compiled, 0 do not fit" in capsys.readouterr().out


def test_a_run_that_was_cut_short_goes_on_unless_the_kernels_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def build(arch: str, kernel: str, width: int, flags: str, dtype: torch.dtype) -> dict[str, Any]:
        made.append(width)
        return ROW | {"D": width}

    monkeypatch.setattr(report, "build", build)
    only = ["--arch", "sm_90", "--kernel", "delta", "--json", str(tmp_path / "rows.json")]
    assert report.main([*only, "--width", "64"]) == 0
    assert report.main([*only, "--width", "64", "--width", "80"]) == 0
    assert made == [64, 80]
    monkeypatch.setattr(report, "_source", lambda dtype: "another")
    assert report.main([*only, "--width", "64"]) == 0
    assert made == [64, 80, 64]


def test_a_fault_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(report, "build", lambda *_, dtype: ROW | {"spills": 8})
    assert report.main(["--arch", "sm_90", "--kernel", "delta", "--width", "64"]) == 1
    assert "FAULT: 8 spills, 0 allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--kernel", "backward"], "--kernel is 'backward'; expected one of columns, forward, delta"),
        (["--flags", "none"], "--flags is 'none'; expected one of plain"),
        (["--width", "192"], "--width is 192; expected 8 to 160"),
        (["--page", "nowhere.md"], "--page: nowhere.md is not there or has no line <!-- kernels"),
        (["--sweep"], "--sweep times on a GPU: add --device cuda"),
        (["--jobs", "0"], "--jobs is 0; expected 1 or more"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU on this machine"),
    ],
)
def test_wrong_input_ends_with_one_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        report.main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(told) and said.count("\n") == 1


def test_the_page_in_the_repository_has_its_marks() -> None:
    assert report.BEGIN in PAGE.read_text() and report.END in PAGE.read_text()
