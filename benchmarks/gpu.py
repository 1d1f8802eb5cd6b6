"""All that is to be known of a GPU, in one go: python benchmarks/gpu.py

First whether the fused kernels and every route agree with float64 on it, while what is measured afterwards is compiled;
then `diffguide bench attention` by groups of cases, alone on the machine. Results go to benchmarks/results/ and are
written group by group, so that a run that is cut short keeps what it has. On an H200 with 16 cores: some five minutes.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from diffguide.kernels import fused

ROOT = Path(__file__).resolve().parents[1]
# of large windows one mask over all tokens takes minutes to make
NO_MASKS = "torch,diffguide,fused,flex,tiles,merged,natten,torch-flash,torch-efficient,torch-cudnn"
# cases, variants if not all, rounds
GROUPS = {
    "sdxl": (
        "sdxl_1024_plain,sdxl_1024_self,sd15_512_self,sdxl_1024_plain_gradient,sdxl_1024_self_gradient,"
        "sdxl_1024_cross,sdxl_1024_cross_gradient,sd15_512_cross,sdxl_1024_regions,sdxl_1024_pag,sdxl_1024_window",
        None,
        15,
    ),
    "flux": (
        "flux_1024_plain,flux_1024_joint,flux_1024_plain_gradient,flux_1024_joint_gradient,flux_1024_joint_regions",
        None,
        15,
    ),
    "windows": ("sdxl_2048_window,sdxl_2048_window_stride8,sdxl_2048_tiles,flux_2048_window", NO_MASKS, 9),
    "guided": ("sd15_blocks_guided,shapes_unet_guided", None, 15),
    "wan-480p": ("wan_480p_self,wan_480p_blocks", NO_MASKS, 5),
    "wan-1080p": ("wan_1080p_self", NO_MASKS, 3),
}


def bench(cases: str, methods: str | None, rounds: int, *more: str) -> list[str]:
    command = [sys.executable, "-m", "diffguide", "bench", "attention", "--device", "cuda", "--dtype", "bfloat16"]
    command += ["--case", cases, "--limit", str(rounds), *more]
    return [*command, "--methods", methods] if methods else command


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default: one of the GPU's name)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile (default: cores)")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which nothing new is begun")
    parser.add_argument("--sweep", action="store_true", help="time the settings of the kernels as well, last")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "torch finds no GPU on this machine\n")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    out = options.out or ROOT / "benchmarks" / "results" / name
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    # more threads than one only get in each other's way
    place = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if why := fused.reason("cuda", torch.bfloat16, 64, grad=True):
        print(f"fused: {why}", flush=True)
        if "TRITON_PTXAS_PATH" in why and (newer := fused.newer_assembler()):
            print("done for this run", flush=True)
            place["TRITON_PTXAS_PATH"] = str(newer)

    def run(title: str, command: list[str]) -> bool:
        if time.monotonic() - began > options.limit:
            print(f"{title}: left out, the time is up", flush=True)
            return True
        done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, check=False)
        (out / f"{title}.log").write_text(done.stdout + done.stderr)
        last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["nothing said"]
        print(f"{time.monotonic() - began:4.0f} s  {title}: {last[0][:160]}", flush=True)
        return done.returncode == 0

    report = [sys.executable, "-m", "diffguide.kernels.report", "--device", "cuda"]
    tests = [sys.executable, "-m", "pytest", "tests/test_routes.py", "-q", "-m", "gpu", "-n", "4", "--tb", "short"]
    tests += ["-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]  # an older torch warns of its own parts
    some = max(1, options.jobs // 2)
    first = {"kernels": [*report, "--jobs", str(some), "--json", str(out / "kernels.json")], "routes": tests}
    singles = [(case, methods) for cases, methods, _ in GROUPS.values() for case in cases.split(",")]
    warm = {f"warm-{case}": bench(case, methods, 1) for case, methods in singles if not case.startswith("wan_1080p")}
    with ThreadPoolExecutor(2 + some) as pool:
        good = list(pool.map(run, *zip(*itertools.chain(first.items(), warm.items()), strict=True)))
    for title, (cases, methods, rounds) in GROUPS.items():
        good.append(run(title, bench(cases, methods, rounds, "--json", str(out / f"{title}.json"))))
    if options.sweep:
        good.append(run("sweep", [*report, "--jobs", str(options.jobs), "--sweep", "--json", str(out / "sweep.json")]))
    for log in out.glob("*.log"):
        if log.stem.startswith("warm-"):
            log.unlink()
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
