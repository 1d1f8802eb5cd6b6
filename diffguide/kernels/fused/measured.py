"""The kernels on a GPU: a matrix of checks against float64, then times of the settings that compile without a fault.

The checks run in Triton's interpreter as well, which is how they are tested. Nearly all the time goes into compiling,
so that both spread over processes; times are taken in this one, when the others are done.
"""

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from diffguide.kernels.fused import dense, launch, ops
from diffguide.kernels.fused.compiled import compile_launch
from diffguide.kernels.fused.samples import FLAGS, WIDTHS, problem, sample
from diffguide.kernels.fused.settings import Setting

# ||x - truth|| / ||truth||: rounding of the dtype, with room
BARS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
NAMES = ("out", "lse", "side", "dq", "dk", "dv", "columns", "blended")
CANDIDATES = tuple(
    Setting(BM, BN, warps, stages)
    for BM, BN in ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128))
    for warps in (4, 8)
    for stages in (1, 2, 3, 4)
    if warps == 8 or BM * BN < 128 * 128  # which spill, and compile for long
)


def check(
    device: str,
    dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16),
    widths: Sequence[int] = WIDTHS,
    flags: Sequence[str] = tuple(FLAGS),
    lengths: Sequence[tuple[int, int]] = ((64, 64), (1024, 77), (1000, 1030)),
    jobs: int = 1,
) -> Iterator[dict[str, Any]]:
    """Each dtype, head width, set of flags, pair of lengths: errors of outputs and gradients, and twice the same bits.

    `device` may be "cpu" under TRITON_INTERPRET=1. Queries have 4 heads, keys 2; each row of the answer has `good`.
    """
    tasks = [(device, *task, tuple(lengths)) for task in itertools.product(dtypes, widths, flags)]
    return itertools.chain.from_iterable(_spread(_check, tasks, jobs))


def _check(
    device: str, dtype: torch.dtype, D: int, flags: str, lengths: tuple[tuple[int, int], ...]
) -> list[dict[str, Any]]:
    arch = launch.architecture(torch.device(device))
    rows = []
    for N, M in lengths:
        torch.manual_seed(0)
        given = problem(arch, D, flags, dtype, device, B=1, H=4, N=N, M=M, keys=2)
        row = {"dtype": str(dtype).removeprefix("torch."), "D": D, "flags": flags, "N": N, "M": M}
        try:
            errors, same = _errors(given)
        except RuntimeError as fault:  # which may end all of this process's
            rows.append(row | {"fault": str(fault).splitlines()[0], "good": False})
            continue
        rows.append(row | errors | {"good": same and all(x <= BARS[dtype] for x in errors.values())})
    return rows


def _spread(work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """What `work` gives for each task, in their order, made by so many processes."""
    if jobs == 1:
        yield from itertools.starmap(work, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, *zip(*tasks, strict=True))


def _errors(given: launch.Problem) -> tuple[dict[str, float], bool]:
    fixed = (given.side, given.query_bits, given.key_bits, given.bias, given.blocks)
    heads, (B, H, N, _) = (given.q, given.k, given.v), given.q.shape
    d_out = torch.randn_like(given.q)
    d_side = torch.randn(B, H, N, given.sides, device=given.q.device) * 1e-5
    runs = []
    for _ in range(2):
        made = ops.flash(*heads, *fixed, None, 0, 0, given.scale)
        back = ops.flash_backward(d_out, d_side, *heads, *fixed, *made, given.scale, True, True)
        runs.append((*made, *back))
    q, k, v, side, bias = (None if x is None else x.double() for x in (*heads, given.side, given.bias))
    assert q is not None and k is not None and v is not None
    rest = (given.query_bits, given.key_bits, bias, given.blocks)
    truth = dense.flash(q, k, v, side, *rest, None, 0, 0, given.scale)
    gradients = dense.flash_backward(d_out.double(), d_side.double(), q, k, v, side, *rest, *truth, given.scale)
    # the small kernel, and the epilogue of the forward one
    few, last = slice(0, 16), min(N, k.shape[2])
    w = torch.linspace(0, 1, H, device=given.q.device)
    shares = ops.column_map(given.q, given.k[:, :, few], runs[0][1], given.scale, True)
    blended, *_ = ops.flash(*heads, *fixed, w, 0, last, given.scale)
    made = (*runs[0], shares, blended)
    right = (*truth, *gradients, dense.column_map(q, k[:, :, few], truth[1], given.scale, True))
    right = (*right, dense.flash(q, k, v, side, *rest, w.double(), 0, last, given.scale)[0])
    errors = {}
    for name, x, y in zip(NAMES, made, right, strict=True):
        if y.numel():
            there = y.isfinite()
            x, y = x.double()[there], y[there]
            errors[name] = float((x - y).norm() / y.norm().clamp_min(1e-300))
    return errors, all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def sweep(
    kernels: Sequence[str] = ("forward", "queries_backward", "keys_backward"),
    widths: Sequence[int] = WIDTHS,
    flags: Sequence[str] = ("plain", "side", "all"),
    rounds: int = 20,
    jobs: int = 1,
) -> Iterator[dict[str, Any]]:
    """Times of each kernel at [2, 8, 4096, D] in bfloat16: settings without a fault, as a ratio to that of the table.

    Rounds are interleaved over the settings; a ratio is the median of those of the rounds.
    """
    arch = launch.architecture(torch.device("cuda"))
    tasks = [(*task, arch) for task in itertools.product(kernels, widths, flags, CANDIDATES)]
    clean = dict(zip(tasks, _spread(_clean, tasks, jobs), strict=True))
    for kernel, D, name in itertools.product(kernels, widths, flags):
        given = problem(arch, D, name, torch.bfloat16, "cuda")
        first = given.setting(kernel)
        runs = {first: sample(kernel, given)}
        for chosen in CANDIDATES:
            if clean[kernel, D, name, chosen, arch] and chosen not in runs:
                with override(kernel, chosen):
                    runs[chosen] = sample(kernel, given)
        times = _times(list(runs.values()), rounds)
        for chosen, own in zip(runs, times, strict=True):
            ratio = statistics.median(a / b for a, b in zip(own, times[0], strict=True))
            row = {"kernel": kernel, "D": D, "flags": name, "setting": str(chosen), "ratio": ratio}
            yield row | {"ms": statistics.median(own)}


@contextmanager
def override(kernel: str, chosen: Setting) -> Iterator[None]:
    """One kernel with another setting than the table's."""
    before = os.environ.get("DIFFGUIDE_FUSED")
    os.environ["DIFFGUIDE_FUSED"] = f"{kernel}={chosen}"
    try:
        yield
    finally:
        del os.environ["DIFFGUIDE_FUSED"]
        if before is not None:
            os.environ["DIFFGUIDE_FUSED"] = before


def _clean(kernel: str, D: int, flags: str, chosen: Setting, arch: str) -> bool:
    """Whether a setting compiles without a fault; what was compiled is kept on the disk for the launch."""
    with override(kernel, chosen):
        run = sample(kernel, problem(arch, D, flags, torch.bfloat16))
    try:
        return not compile_launch(run, arch).faults()
    except Exception as error:  # whatever a compiler says of a tile it cannot build
        print(f"{kernel} D {D} {flags}, {chosen}: {str(error)[:80]!r}", flush=True)
        return False


def _times(runs: list[launch.Launch], rounds: int) -> list[list[float]]:
    """Milliseconds of each run in each round, after three to warm up."""
    found: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 3):
        for own, run in zip(found, runs, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run.run()
            end.record()
            end.synchronize()
            if number >= 3:
                own.append(start.elapsed_time(end))
    return found
