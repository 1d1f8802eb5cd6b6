"""Plants one error at a time in a copy of the fused kernels and tells which test notices: python tests/mutations.py

An error that no test notices makes the exit code 1. The interpreter runs the tests, so half a minute each is usual.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FUSED = Path("diffguide/kernels/fused")
TESTS = ("fused_in_interpreter.py", "fused_oracle.py")


class Mutation(NamedTuple):
    """In `file`, `right` becomes `wrong` wherever it stands; tests of the name `first` are tried before all others."""

    file: str
    right: str
    wrong: str
    first: str


MUTATIONS = {
    "delta is not subtracted": Mutation("queries_backward.py", "(dp - row_delta[:, None])", "dp", "one_key"),
    "delta forgets the side values": Mutation(
        "delta.py", "total += tl.sum(so * ds, 1)", "total += 0.0", "small_cotangents"
    ),
    "lse in powers of two": Mutation("forward.py", "(top + tl.log2(total)) * LN2", "top + tl.log2(total)", "one_key"),
    "lse taken for powers of two": Mutation("keys_backward.py", "lse * LOG2E - LIFT", "lse - LIFT", "one_key"),
    "no mask behind the last key": Mutation(
        "forward.py", "tl.where((keys < M)[None, :], s,", "tl.where(keys[None, :] >= 0, s,", "one_key"
    ),
    "no mask behind the last key, backward": Mutation(
        "queries_backward.py", "(keys < M)[None, :], s", "(keys >= 0)[None, :], s", "far_below"
    ),
    "a stride of k taken for 1": Mutation(
        "forward.py", "load(K, keys, M, k_n, k_d,", "load(K, keys, M, k_n, 1,", "other_strides"
    ),
    "a stride of v taken for that of k": Mutation(
        "queries_backward.py", "load(V, keys, M, v_n, v_d,", "load(V, keys, M, k_n, k_d,", "other_strides"
    ),
    "offsets in 32 bits": Mutation("tiles.py", "rows.to(tl.int64)[:, None]", "rows[:, None]", "64_bits"),
    "units of strides taken for numbers": Mutation("tiles.py", "row_stride * UNIT", "row_stride", "agrees"),
    "units of bases taken for numbers": Mutation(
        "forward.py", "(b * v_b + (h // group) * v_h) * UNIT", "b * v_b + (h // group) * v_h", "agrees"
    ),
    "padding of a list taken for tile 0": Mutation(
        "forward.py", "tl.where(at < 0, M, at * BN)", "tl.maximum(at, 0) * BN", "block_lists"
    ),
    "padding of a list, backward": Mutation(
        "queries_backward.py", "tl.where(at < 0, M, at * BN)", "tl.maximum(at, 0) * BN", "block_lists"
    ),
    "the list not turned round for the keys": Mutation(
        "launch.py", "named[:, :tiles].mT, number", "named[:, :tiles].mT.flip(0), number", "each_key_tile"
    ),
    "lists of larger tiles": Mutation(
        "settings.py", "if listed else chosen", "if False else chosen", "lists_are_of_64"
    ),
    "regions meet with any bit": Mutation(
        "forward.py", "(bits[:, None] & own[None, :]) != 0", "(bits[:, None] | own[None, :]) != 0", "highest_bit"
    ),
    "the highest bit is a sign": Mutation(
        "forward.py", "(bits[:, None] & own[None, :]) != 0", "(bits[:, None] & own[None, :]) > 0", "highest_bit"
    ),
    "regions forgotten in the gradient of keys": Mutation(
        "keys_backward.py", "own[:, None] & bits[None, :]", "own[:, None] | bits[None, :]", "highest_bit"
    ),
    "a bias in 11 bits": Mutation(
        "tiles.py", "(bias - high.to(tl.float32)).to(tl.float16)", "(high - high).to(tl.float16)", "a_bias_is"
    ),
    "float16 is not lifted": Mutation(
        "tiles.py", "LIFT = tl.constexpr(14.0)", "LIFT = tl.constexpr(0.0)", "a_millionth"
    ),
    "float16 is not scaled": Mutation(
        "ops.py", "torch.exp2(-torch.frexp(x)", "torch.exp2(0 * torch.frexp(x)", "small_cotangents"
    ),
    "d_side is not scaled": Mutation(
        "ops.py", "sides = _largest(d_side)", "sides = 0 * _largest(d_side) + 1", "small_cotangents"
    ),
    "rows without a key": Mutation("forward.py", "if EMPTY:", "if False:", "rows_without"),
    "rows without a key, backward": Mutation(
        "queries_backward.py", 'lse == float("-inf"), float("inf")', 'lse == float("inf"), float("inf")', "rows_without"
    ),
    "key heads taken in turn": Mutation("forward.py", "(h // group)", "(h % (heads // group))", "heads_that_share"),
    "one query head of a group": Mutation("keys_backward.py", "in range(0, group)", "in range(0, 1)", "D64-float32"),
    "dk without its scale": Mutation("keys_backward.py", "back = scale *", "back = 1.0 *", "highest_bit"),
    "blended one row too far": Mutation("forward.py", "(rows < last)", "(rows <= last)", "a_blend_of_zero"),
    "the mean of one head too many": Mutation("columns.py", "acc / heads", "acc / (heads + 1)", "columns_of_a_map"),
    "bfloat16 by its bits": Mutation("tiles.py", "if INTERPRETED:", "if False:", "D64-bfloat16"),
}


def attempt(mutation: Mutation | None, *only: str) -> str | None:
    """The first test that fails in a copy of the kernels alone, without the rest of the package and its imports."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / FUSED, copy / FUSED, ignore=shutil.ignore_patterns("__pycache__"))
        for test in TESTS:
            shutil.copy(ROOT / "tests" / test, copy)
        if mutation is not None:
            plant(mutation, copy)
        return caught(copy, *only)


def plant(mutation: Mutation, copy: Path) -> None:
    file = copy / FUSED / mutation.file
    text = file.read_text()
    if mutation.right not in text:
        raise SystemExit(f"{mutation.file} has no {mutation.right!r}: this list is behind the kernels")
    file.write_text(text.replace(mutation.right, mutation.wrong))


def caught(copy: Path, *only: str) -> str | None:
    """The first test that fails in the copy, None if none does."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *only, TESTS[0]]
    told = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if told.returncode == 0:
        return None
    if told.returncode < 0:  # a wrong address is read as it is
        return f"signal {-told.returncode} in {' '.join(only) or 'one of them'}"
    failed = re.search(r"^FAILED \S*?::(.*?)(?: - .*)?$", told.stdout, re.M)
    if failed is None:  # no test of that name, or none that could begin
        raise SystemExit(f"pytest ended with {told.returncode}: {(told.stdout + told.stderr)[-400:]}")
    return failed[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", action="append", choices=MUTATIONS, metavar="NAME", help="only this error; may be repeated"
    )
    chosen = parser.parse_args().only or list(MUTATIONS)
    tests = " or ".join(dict.fromkeys(MUTATIONS[name].first for name in chosen))
    if already := attempt(None, "-k", tests):
        raise SystemExit(f"{already} fails without an error planted")
    missed = 0
    for name in chosen:
        found = attempt(MUTATIONS[name], "-k", MUTATIONS[name].first) or attempt(MUTATIONS[name])
        missed += found is None
        print(f"{name}: {'NOT NOTICED' if found is None else found}", flush=True)
    print(f"{len(chosen)} errors planted, {missed} not noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
