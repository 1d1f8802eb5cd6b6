"""What the compiler makes of the fused kernels, for GPUs that are not here, and what a GPU that is here makes of them.

`python -m diffguide.kernels.report` compiles every kernel ahead of time for five architectures and prints registers,
spills, shared memory and matrix instructions; it ends with exit code 1 if one would not fit. `--device cuda` runs them
instead, against float64, and with `--sweep` times their settings.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
BEGIN, END = "<!-- kernels: written by `python -m diffguide.kernels.report --page` -->", "<!-- /kernels -->"
HEAD = (
    "| kernel | D | flags | tiles | registers | spills | shared memory, bytes | matrix instructions |\n|" + "---|" * 8
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# spills that are known and forgiven: where the flags are "all" or "all, listed", and with none
ALLOWED: dict[tuple[str, str, int], int] = {
    ("sm_80", "forward", 128): 30,
    ("sm_80", "forward", 160): 12,
    ("sm_80", "keys_backward", 40): 14,
    ("sm_80", "keys_backward", 64): 4,
    ("sm_80", "keys_backward", 80): 53,
    ("sm_89", "forward", 128): 24,
    ("sm_89", "forward", 160): 40,
    ("sm_89", "queries_backward", 80): 8,
    ("sm_89", "keys_backward", 40): 13,
    ("sm_89", "keys_backward", 64): 10,
    ("sm_89", "keys_backward", 80): 29,
    ("sm_89", "keys_backward", 128): 2,
    ("sm_100", "forward", 160): 8,
    ("gfx942", "queries_backward", 160): 10,
}
ALLOWED_PLAIN = {("sm_80", "forward", 160): 1}


def configurations(
    archs: Sequence[str] = (), kernels: Sequence[str] = (), widths: Sequence[int] = (), flags: Sequence[str] = ()
) -> Iterator[tuple[str, str, int, str]]:
    """Architecture, kernel, head width and flags of the table, narrowed to those given; empty means all."""
    from diffguide.kernels.fused.samples import WIDTHS
    from diffguide.kernels.fused.settings import unfit

    for arch in archs or ARCHS:
        for kernel in kernels or ("columns", "forward", "delta", "queries_backward", "keys_backward"):
            # the two small kernels know no regions and no lists
            names = ("plain", "all", "all, listed") if kernel not in ("columns", "delta") else ("plain",)
            for width in widths or WIDTHS:
                # what is refused is not compiled
                if kernel in ("columns", "forward") or unfit(arch, torch.bfloat16, width, grad=True) is None:
                    yield from ((arch, kernel, width, name) for name in flags or names)


def build(arch: str, kernel: str, width: int, flags: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Compile one configuration: a row of the table.

    Raises:
        ModuleNotFoundError: triton is not installed.
    """
    from diffguide.kernels.fused.compiled import compile_launch
    from diffguide.kernels.fused.samples import problem, sample

    launch = sample(kernel, problem(arch, width, flags, dtype))
    built = asdict(compile_launch(launch, arch))
    return {"kernel": kernel, "D": width, "flags": flags, "tiles": str(launch.setting)} | built


def faults(row: dict[str, Any]) -> list[str]:
    """What would make a launch of this row fail or crawl, beyond what is allowed."""
    from diffguide.kernels.fused.compiled import Build

    allowed = (ALLOWED if row["flags"].startswith("all") else ALLOWED_PLAIN).get(
        (row["arch"], row["kernel"], row["D"]), 0
    )
    return Build(**{x.name: row[x.name] for x in fields(Build) if x.name in row}).faults(allowed)


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The table in Markdown, one for each architecture."""
    parts = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        names = ("kernel", "D", "flags", "tiles", "registers", "spills", "shared", "matrix")
        lines = ["| " + " | ".join(str(row[x]) for x in names) + " |" for row in rows if row["arch"] == arch]
        parts.append(f"## {arch}\n\n{HEAD}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m diffguide.kernels.report", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this architecture; may be repeated")
    parser.add_argument(
        "--kernel", action="append", help="only this kernel: columns, forward, delta, queries_backward, keys_backward"
    )
    parser.add_argument("--width", action="append", type=int, help="only this head width")
    parser.add_argument("--flags", action="append", help="only these flags: plain, side, regions, all, 'all, listed'")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of q, k and v (default bfloat16)")
    parser.add_argument("--page", metavar="FILE", help="write the table between its marks in this page of Markdown")
    parser.add_argument(
        "--json", metavar="FILE", help="keep the rows in this file; a run that was cut short goes on from it"
    )
    parser.add_argument("--device", choices=["cuda"], help="do not compile for others: check on the GPU that is here")
    parser.add_argument("--sweep", action="store_true", help="on --device, time the settings of what was checked")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile for --device (default 1)")
    options = parser.parse_args(arguments)
    if find_spec("triton") is None:
        parser.exit(2, "triton is not installed: pip install triton\n")
    _check(parser, options)
    if options.device:
        return _measure(parser, options)
    if options.page and not _marked(Path(options.page)):
        parser.exit(2, f"--page: {options.page} is not there or has no line {BEGIN}\n")
    kept = Path(options.json) if options.json else None
    source = _source(options.dtype)
    done = _done(kept, source)
    for chosen in configurations(options.arch or (), options.kernel or (), options.width or (), options.flags or ()):
        if chosen not in done:
            row = done[chosen] = build(*chosen, dtype=DTYPES[options.dtype])
            print(f"{row['arch']} {row['kernel']} D {row['D']} {row['flags']}, {row['tiles']}: {_say(row)}", flush=True)
        if kept:
            kept.write_text(json.dumps({"source": source, "rows": list(done.values())}, indent=1) + "\n")
    rows = [done[chosen] for chosen in configurations() if chosen in done]
    if options.page:
        _write(Path(options.page), page(rows))
    bad = [row for row in rows if faults(row)]
    print(f"{len(rows)} kernels compiled, {len(bad)} do not fit")
    return int(bool(bad))


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from diffguide.kernels.fused import WIDEST
    from diffguide.kernels.fused.samples import FLAGS
    from diffguide.kernels.fused.settings import KERNELS

    for name, known in (("kernel", KERNELS), ("flags", tuple(FLAGS))):
        for value in getattr(options, name) or ():
            if value not in known:
                parser.exit(2, f"--{name} is {value!r}; expected one of {', '.join(known)}\n")
    for width in options.width or ():
        if not 8 <= width <= WIDEST:
            parser.exit(2, f"--width is {width}; expected 8 to {WIDEST}\n")
    if options.sweep and not options.device:
        parser.exit(2, "--sweep times on a GPU: add --device cuda\n")
    if options.jobs < 1:
        parser.exit(2, f"--jobs is {options.jobs}; expected 1 or more\n")


def _source(dtype: str) -> str:
    """What the rows depend on: the kernels, their settings, triton and the dtype."""
    files = sorted((Path(__file__).parent / "fused").glob("*.py"))
    code = b"".join(file.read_bytes() for file in files)
    return f"{hashlib.sha256(code).hexdigest()[:16]}, triton {version('triton')}, {dtype}"


def _done(kept: Path | None, source: str) -> dict[tuple[str, str, int, str], dict[str, Any]]:
    """Rows of an earlier run that was cut short, if it was of the same source."""
    if kept is None or not kept.exists():
        return {}
    found = json.loads(kept.read_text())
    rows = found["rows"] if found.get("source") == source else []
    return {(row["arch"], row["kernel"], row["D"], row["flags"]): row for row in rows}


def _say(row: dict[str, Any]) -> str:
    matrix = row["matrix"] or "no matrix instruction"
    text = f"{row['registers']} registers, {row['spills']} spills, {row['shared']} bytes shared, {matrix}"
    return text + "".join(f"; FAULT: {x}" for x in faults(row))


def _measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        parser.exit(
            2, "--device cuda: torch finds no GPU on this machine; without --device the kernels are compiled only\n"
        )
    from diffguide.kernels.fused.measured import check, sweep

    asked = {"kernels": options.kernel, "widths": options.width, "flags": options.flags}
    own = {name: given for name, given in asked.items() if given}
    versions = {"torch": torch.__version__, "triton": version("triton")}
    report = {"device": torch.cuda.get_device_name(), **versions, "checks": [], "sweep": []}
    for row in check("cuda", **{name: own[name] for name in own if name != "kernels"}, jobs=options.jobs):
        report["checks"].append(row)
        print(row, flush=True)
    bad = sum(not row["good"] for row in report["checks"])
    print(f"{len(report['checks'])} checked, {bad} wrong")
    # nothing is timed that is wrong
    for row in sweep(**own, jobs=options.jobs) if options.sweep and not bad else ():
        report["sweep"].append(row)
        print(row, flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    return int(bad > 0)


def _marked(file: Path) -> bool:
    return file.is_file() and BEGIN in file.read_text() and END in file.read_text()


def _write(file: Path, table: str) -> None:
    before, rest = file.read_text().split(BEGIN)
    file.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
