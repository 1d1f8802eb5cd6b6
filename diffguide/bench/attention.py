"""Routes of attention against each other and against torch's own: first whether they are right, then what they cost.

Nothing is timed that does not agree with dense attention in float64. `seconds_ratio` is to torch's attention over all
tokens without what is asked for, in the same round.
"""

import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from diffguide import versions
from diffguide.bench.attention_cases import CASES, Case
from diffguide.bench.attention_oracle import BARS, distance, sampled, samples, truth
from diffguide.bench.drawing import settle
from diffguide.bench.guided_steps import GUIDED, guided_step
from diffguide.bench.statistics import quartiles
from diffguide.errors import KernelError, ParamError
from diffguide.kernels import attend, door, explain
from diffguide.pipelines import source
from diffguide.report import peak, reset_peak

OPTIONS = ("methods", "limit", "cases")
MODEL = False  # the cases have their own
PLAIN, AUTO = "torch", "diffguide"
BACKENDS = {
    "torch-math": SDPBackend.MATH,
    "torch-flash": SDPBackend.FLASH_ATTENTION,
    "torch-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch-cudnn": SDPBackend.CUDNN_ATTENTION,
}
VARIANTS = (PLAIN, AUTO, *door.ROUTES, *BACKENDS)
USUAL = ("sd15_512_cross", "sdxl_1024_self", "sdxl_1024_regions", "sd15_blocks_guided")
PEERS = ("triton", "natten", "xformers")  # libraries behind some routes
ROUNDS = 7
FLUSH = 2**26  # bytes written between timings on an accelerator, more than its cache holds
MOST = 2**31  # bytes of a whole map that a variant may make

Call = Callable[[], Any]


def check(*, methods: Sequence[str] | None = None, cases: Sequence[str] | None = None, **_: Any) -> None:
    """Raise ParamError where `run` would, before any work."""
    for title, given, known in (("variant", methods, VARIANTS), ("case", cases, (*CASES, *GUIDED))):
        if isinstance(given, str):
            raise ParamError(f"{title}s = {given!r} is one text; give a list of names")
        for name in given or ():
            if name not in known:
                raise ParamError(f"no {title} is called {name!r} (known: {', '.join(known)})")


def run(
    pipe: None,
    frame: dict[str, Any],
    *,
    methods: Sequence[str] | None = None,
    cases: Sequence[str] | None = None,
    limit: int = ROUNDS,
    device: str | None = None,
    dtype: str | None = None,
    part: Path | None = None,
    out: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Every case with every variant that can, `limit` rounds in turns."""
    check(methods=methods, cases=cases)
    where = torch.device(source.usable(device))
    kind = source.DTYPES[dtype or ("float32" if where.type == "cpu" else "bfloat16")]
    rows: list[dict[str, Any]] = []
    absent: dict[str, dict[str, str]] = {}
    for name in tqdm(cases or USUAL, unit="case", disable=not progress, file=sys.stderr):
        if name in GUIDED:
            rows += guided_step(name, where, kind, limit)
            continue
        found, lost = compare(CASES[name], methods or VARIANTS, where, kind, limit)
        rows += found
        absent[name] = lost
    return {
        "rows": rows,
        "absent": absent,
        "settings": {
            "rounds": limit,
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else _processor(),
            "dtype": str(kind).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            **{name: version for name in PEERS if (version := versions.installed(name))},
        },
        "intervals": "lower and upper quartile around the median of the rounds' ratios",
    }


def compare(
    case: Case, methods: Sequence[str], device: torch.device, dtype: torch.dtype, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the variants of a case, and why each of the others is absent."""
    tensors, options = case.inputs(device, dtype)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    absent: dict[str, str] = {}
    for name in dict.fromkeys((PLAIN, *methods)):
        call = _variant(name, tensors, {} if name == PLAIN or name in BACKENDS else options, case.gradient)
        if isinstance(call, str):
            absent[name] = call
            continue
        try:
            error = _error(name, tensors, options, case.gradient)
        except (RuntimeError, NotImplementedError, ImportError) as fault:  # of libraries that load and cannot
            absent[name] = f"{type(fault).__name__}: {str(fault).strip().splitlines()[0]}"[:160]
            continue
        if error < BARS[dtype]:
            calls[name], errors[name] = call, error
        else:
            absent[name] = f"wrong: its error against float64 is {error:.1e}, above {BARS[dtype]:.0e}"
    times = _interleaved(calls, rounds, device)
    rows = []
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times[PLAIN], strict=True)]
        row: dict[str, Any] = {"method": name, "case": case.name, "n": rounds}
        if name == AUTO:
            row["route"] = _routed(tensors, options, case.gradient)
        row |= {"seconds_ratio": quartiles(ratios), "least_ratio": quartiles([min(seconds) / min(times[PLAIN])])}
        row |= {"seconds": quartiles(seconds), "memory": quartiles([_memory(calls[name], device)])}
        rows.append({**row, "error": quartiles([errors[name]])})
    return rows, absent


def _variant(name: str, tensors: Any, options: dict[str, Any], gradient: bool) -> Call | str:
    """A function that does the work once, or why there is none."""
    q, k, v = (x.detach().requires_grad_(gradient) for x in tensors)
    if name in BACKENDS:
        if q.device.type == "cpu" and name != "torch-math":
            return "torch has one fused attention on a CPU"
        if name == "torch-math" and _map_bytes(q, k) > MOST:
            return "it makes the whole map"

        def forward() -> Any:
            with sdpa_kernel(BACKENDS[name]):
                return F.scaled_dot_product_attention(q, k, v)
    elif name == PLAIN:

        def forward() -> Any:
            return F.scaled_dot_product_attention(q, k, v)
    else:
        if name == "reference" and _map_bytes(q, k) > MOST:
            return "it makes the whole map"
        route = "auto" if name == AUTO else name
        try:
            explain(q, k, v, **options, backend=route)
        except KernelError as fault:
            return str(fault).removeprefix(f"attention by {name}: ").partition("; leave")[0]

        def forward() -> Any:
            return attend(q, k, v, **options, backend=route)

    if not gradient:
        return forward

    def both() -> Any:
        found = forward()
        found = found if isinstance(found, tuple) else (found,)
        return torch.autograd.grad(found, (q, k, v), [torch.ones_like(x) for x in found])

    return both


def _map_bytes(q: Tensor, k: Tensor) -> int:
    return 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]


def _error(name: str, tensors: Any, options: dict[str, Any], gradient: bool) -> float:
    """Of output, maps and gradients at the sampled rows."""
    asked = {} if name == PLAIN or name in BACKENDS else options
    rows = samples(tensors[0].shape[2])
    call = _variant(name, tensors, asked, False)
    assert not isinstance(call, str)
    found = call()
    found = sampled(found if isinstance(found, tuple) else (found,), rows)
    with torch.no_grad():
        error = distance(found, truth(tensors, asked, rows))
    if not gradient:
        return error
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    if name in BACKENDS:
        with sdpa_kernel(BACKENDS[name]):
            out: Any = F.scaled_dot_product_attention(q, k, v)
    else:
        out = attend(q, k, v, **asked, backend="auto" if name in (PLAIN, AUTO) else name)
    got = sampled(out if isinstance(out, tuple) else (out,), rows)
    ours = torch.autograd.grad(got, (q, k, v), [torch.ones_like(x) for x in got])
    exact = [x.detach().double().requires_grad_() for x in tensors]
    right = truth(tuple(exact), asked, rows)  # type: ignore[arg-type]
    theirs = torch.autograd.grad(right, exact, [torch.ones_like(x) for x in right])
    return max(error, distance(ours, theirs))


def _interleaved(calls: dict[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one to warm up; the order turns from round to round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(_timed(calls[name], device))
    return times


def _timed(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    torch.empty(FLUSH, dtype=torch.int8, device=device).zero_()
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began_at.record()
    call()
    ended_at.record()
    torch.cuda.synchronize()
    return began_at.elapsed_time(ended_at) / 1000


def _memory(call: Call, device: torch.device) -> float:
    """MiB above what was there before, at most, result included."""
    cuda = device.type == "cuda"
    settle(cuda)
    reset_peak(cuda)
    before = torch.cuda.memory_allocated() / 2**20 if cuda else peak()
    result = call()
    used = peak(cuda) - before
    del result
    return max(0.0, used)


def _routed(tensors: Any, options: dict[str, Any], gradient: bool) -> str:
    q, k, v = (x.detach().requires_grad_(gradient) for x in tensors)
    return explain(q, k, v, **options).route


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
