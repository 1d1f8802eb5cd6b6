"""Promises of the fused kernels, kept on the CPU by Triton's interpreter: `test_fused.py` runs this in a process.

TRITON_INTERPRET=1 has to be set before the kernels are imported. The judge is float64 attention the long way round.
"""

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from fused_oracle import error, exact, oracle, tensors
from torch import Tensor

from diffguide.kernels import fused
from diffguide.kernels.fused import launch, ops

# rounding of the dtype, with room: measured were 5e-7, 3.3e-4 and 6.2e-3; there bfloat16 is cut, not rounded
BAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1.5e-2}
# side values are multiplied in float16 beside bfloat16, too
SIDE_BAR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-3}
DTYPES = pytest.mark.parametrize("dtype", list(BAR), ids=lambda x: str(x).removeprefix("torch."))

CASES: dict[str, dict[str, Any]] = {
    "D40": {"B": 2, "H": 1, "D": 40, "R": 5},
    "D64": {"D": 64, "N": 33, "R": 1, "H": 4, "keys": 2, "regions": 3},
    "D80": {"D": 80, "N": 65, "M": 130, "R": 16, "H": 1, "regions": 3, "bias": True},
    "D96": {"D": 96, "N": 33, "M": 64, "H": 1},
    "D128": {"D": 128, "N": 130, "M": 33, "H": 1, "R": 32},
    "D160": {"D": 160, "N": 33, "M": 97, "R": 20, "H": 3, "keys": 1},
    "D24": {"D": 24, "N": 64, "M": 64, "H": 1, "R": 3},
    "one query": {"H": 1, "N": 1, "M": 77, "R": 2},
}


def gradients(outputs: list[Tensor], given: dict[str, Any], cotangents: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [given[x] for x in "qkv"], cotangents)


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    return given | {x: given[x].detach().requires_grad_() for x in "qkv"}


def check(given: dict[str, Any], dtype: torch.dtype, *, cotangent: float = 1.0, bar: float = 1.0) -> None:
    """Forward and backward against the oracle: out, lse, side_out, dq, dk, dv. `bar` times the bars of the dtype."""
    given = leaves(given)
    truth = leaves(exact(given))
    out, lse, side_out = fused.flash(**given)
    own, own_lse, own_side = oracle(**truth)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert error(out, own) < bar * BAR[dtype]
    there = own_lse.isfinite()
    assert torch.equal(lse.isfinite(), there) and bool((lse[~there] == -math.inf).all())
    assert float((lse - own_lse)[there].detach().abs().max()) < bar * 1e-5
    draw = torch.Generator().manual_seed(1)
    made, meant = [out], [own]
    if own_side is not None:
        assert side_out.dtype == torch.float32 and error(side_out, own_side) < bar * SIDE_BAR[dtype]
        made, meant = [out, side_out], [own, own_side]
    cotangents = [(cotangent * torch.randn(x.shape, generator=draw)).to(x.dtype) for x in made]
    found = gradients(made, given, cotangents)
    right = gradients(meant, truth, [x.double() for x in cotangents])
    for name, x, y in zip("qkv", found, right, strict=True):
        assert bool(x.isfinite().all())
        # a gradient below what the dtype can hold is rounded when it is handed over, whoever computed it
        rounding = error(y.to(dtype), y)
        assert error(x, y) < bar * BAR[dtype] + 1.5 * rounding, f"d{name}"


def test_one_key_gets_all_attention() -> None:
    """The softmax over one number is 1: what reaches q and k is rounding, of cotangents and values of about 1."""
    given = leaves(tensors(N=70, M=1, D=40, R=2))
    out, _, side_out = fused.flash(**given)
    assert torch.equal(out, given["v"].expand_as(out)) and torch.equal(side_out, given["side"].expand_as(side_out))
    dq, dk, dv = gradients([out, side_out], given, [out.detach(), torch.ones_like(side_out)])
    assert float(dq.abs().max()) < 1e-5 and float(dk.abs().max()) < 1e-4
    assert error(dv, out.detach().double().sum(2, keepdim=True)) < BAR[torch.float32]


@DTYPES
def test_block_lists_agree_with_float64(dtype: torch.dtype) -> None:
    """Uneven lists, one that is empty, padding in the middle, the last tile half full, and side values beside them."""
    given = tensors(H=1, N=200, M=150, D=40, R=3, dtype=dtype)
    given["blocks"] = torch.tensor([[2, 0, -1], [-1, -1, -1], [-1, 1, -1], [0, 1, 2]], dtype=torch.int32)
    check(given, dtype)


def test_lists_and_regions_and_bias_together() -> None:
    given = tensors(H=1, N=130, M=130, D=80, R=2, regions=4, bias=True)
    given["blocks"] = torch.tensor([[0, 2], [1, -1], [2, 1]], dtype=torch.int32)
    check(given, torch.float32)


@pytest.mark.parametrize("tiles", ["128x64", "64x32", "32x128"])
def test_other_tiles_agree_with_float64(monkeypatch: pytest.MonkeyPatch, tiles: str) -> None:
    kernels = ("forward", "queries_backward", "keys_backward", "delta")
    monkeypatch.setenv("DIFFGUIDE_FUSED", ",".join(f"{x}={tiles}w4s2" for x in kernels))
    check(tensors(H=1, N=100, M=90, D=40, R=5, regions=2, bias=True), torch.float32)


@pytest.mark.parametrize("tiles", ["128x64", "64x32"])
def test_lists_are_of_64_tokens_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch, tiles: str) -> None:
    kernels = ("forward", "queries_backward", "keys_backward")
    monkeypatch.setenv("DIFFGUIDE_FUSED", ",".join(f"{x}={tiles}w4s2" for x in kernels))
    given = tensors(H=1, N=200, M=200, D=40)
    given["blocks"] = torch.tensor([[0, 3], [1, -1], [2, 1], [3, 0]], dtype=torch.int32)
    check(given, torch.float32)


def test_two_batches_of_bits_and_side_values_per_head() -> None:
    given = tensors(B=2, N=20, M=50, D=40, regions=3)
    given["key_bits"] = torch.stack((given["key_bits"][0], given["key_bits"][0].flip(0)))
    given["query_bits"] = given["query_bits"].expand(2, -1)
    given["side"] = torch.rand(2, 2, 50, 4, generator=torch.Generator().manual_seed(5)).half().float()
    check(given, torch.float32)


def test_the_highest_bit_is_a_bit_like_others() -> None:
    given = tensors(H=1, N=20, M=20, D=40, regions=2)
    given["query_bits"], given["key_bits"] = (
        torch.where(x == 1, -(2**31), x) for x in (given["query_bits"], given["key_bits"])
    )
    check(given, torch.float32)


def test_slices_of_a_joint_tensor_and_other_strides() -> None:
    """q, k and v as parts of one projection; text before the image; head width not innermost."""
    draw = torch.Generator().manual_seed(2)
    joint = torch.randn(2, 60, 3, 2, 40, generator=draw)
    q, k, v = joint.permute(2, 0, 3, 1, 4).unbind(0)
    check({"q": q[:, :, 20:], "k": k[:, :, :50], "v": v[:, :, :50].contiguous()}, torch.float32)
    crossed = torch.randn(3, 1, 1, 40, 70, generator=draw).transpose(-1, -2)
    q, k, v = crossed.unbind(0)
    assert k.stride(-1) != 1
    check({"q": q, "k": k, "v": v, "side": torch.rand(1, 1, 3, 70, generator=draw).transpose(-1, -2)}, torch.float32)


def test_expanded_keys_give_the_sum_of_the_gradients() -> None:
    given = tensors(B=1, N=40, M=33, D=40, R=2)
    small = {x: given[x][:, :1].detach().requires_grad_() for x in "kv"}
    wide = given | {x: small[x].expand(3, 2, -1, -1) for x in "kv"} | {"q": given["q"].expand(3, -1, -1, -1)}
    truth = exact(given) | {x: small[x].detach().double().requires_grad_() for x in "kv"}
    meant = truth | {x: truth[x].expand(3, 2, -1, -1) for x in "kv"} | {"q": truth["q"].expand(3, -1, -1, -1)}
    (out, _, side_out), (own, _, own_side) = fused.flash(**wide), oracle(**meant)
    found = torch.autograd.grad(out.sum() + side_out.square().sum(), list(small.values()))
    right = torch.autograd.grad(own.sum() + own_side.square().sum(), [truth[x] for x in "kv"])
    for x, y in zip(found, right, strict=True):
        assert error(x, y) < BAR[torch.float32]


def test_offsets_are_counted_in_64_bits() -> None:
    """The last key lies 2^31 elements behind the first; of the 4 GiB only the pages of the rows are ever touched."""
    given = tensors(H=1, N=5, M=33, D=40, dtype=torch.float16)
    try:
        far = torch.empty(2**31 + 40, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of addresses: {error}")
    far = far.as_strided((1, 1, 33, 40), (0, 0, 2**26, 1))
    far.copy_(given["k"])
    near = fused.flash(**given)[0]
    assert torch.equal(fused.flash(**given | {"k": far})[0], near)


@DTYPES
def test_rows_without_a_key_are_zero_and_their_gradients_too(dtype: torch.dtype) -> None:
    given = leaves(tensors(N=70, M=40, D=40, R=2, H=1, regions=2, dtype=dtype))
    given["query_bits"][:, 64:] = 0
    out, lse, side_out = fused.flash(**given)
    empty = torch.zeros(70, dtype=torch.bool)
    empty[3] = empty[64:] = True
    assert not out[:, :, empty].any() and not side_out[:, :, empty].any()
    assert bool((lse[:, :, empty] == -math.inf).all()) and bool(lse[:, :, ~empty].isfinite().all())
    dq, dk, dv = gradients([out, side_out], given, [torch.ones_like(out), torch.ones_like(side_out)])
    assert not dq[:, :, empty].any() and all(bool(x.isfinite().all()) for x in (dq, dk, dv))


@DTYPES
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    """Logits of ±1e4: float32 itself knows them to half a unit in the last place, 1e4 · 6e-8, and a share with them."""
    given = tensors(H=1, N=40, M=70, D=64, R=2, dtype=dtype)
    reach = float(torch.einsum("bhnd,bhmd->bhnm", given["q"].double(), given["k"].double()).abs().max()) / 8
    given["q"] = given["q"] * (1e4 / reach)
    exact_logits = torch.einsum("bhnd,bhmd->bhnm", given["q"].double(), given["k"].double()) / 8
    assert 9e3 < float(exact_logits.abs().max()) < 1.1e4
    given = leaves(given)
    truth = leaves(exact(given))
    out, lse, side_out = fused.flash(**given)
    own, own_lse, own_side = oracle(**truth)
    unit = 1e4 * 2.0**-24 * math.log2(math.e)
    room = 16 * unit  # 64 products are added in steps of at most half a unit each, seen as random; twice that for lse
    assert float((lse.double() - own_lse).detach().abs().max()) < room
    assert error(out, own) < BAR[dtype] + room and error(side_out, own_side) < SIDE_BAR[dtype] + room
    ones = [torch.ones_like(out), torch.ones_like(side_out)]
    ones[0][:, :, ::2] = -0.5
    found = gradients([out, side_out], given, ones)
    assert all(bool(x.isfinite().all()) for x in found)
    right = gradients([own, own_side], truth, [x.double() for x in ones])
    assert error(found[2], right[2]) < BAR[dtype] + room


def test_logits_far_below_zero_are_as_good_as_others() -> None:
    """All logits about -300: behind the last key, where 0 would stand, exp(0 - lse) is beyond float32."""
    given = tensors(H=1, N=33, M=70, D=64, R=2)
    given["q"][..., 0], given["k"][..., 0] = 8.0, -300.0
    # float32 knows 300 to 1.5e-5, and the exponential of it, 50 times the rounding of 1
    check(given, torch.float32, bar=50)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 1e-7])
def test_small_cotangents_of_a_map_survive_float16(size: float) -> None:
    """Keys of 8192 and queries of 1/8192, so that dq itself is within float16 however small dS is."""
    given = tensors(H=1, N=64, M=128, D=64, R=4, dtype=torch.float16)
    given["k"], given["q"] = given["k"] * 8192, given["q"] / 8192
    given, truth = leaves(given), leaves(exact(given))
    draw = torch.Generator().manual_seed(1)
    side_out, own_side = fused.flash(**given)[2], oracle(**truth)[2]
    cotangent = size * torch.randn(side_out.shape, generator=draw)
    (found,) = torch.autograd.grad(side_out, [given["q"]], cotangent)
    (right,) = torch.autograd.grad(own_side, [truth["q"]], cotangent.double())
    assert error(found, right) < BAR[torch.float16] + 1.5 * error(right.half(), right)


def test_keys_that_get_a_millionth_keep_their_gradients_in_float16() -> None:
    """One key takes all but 1e-6 of each row; float16 alone would know such a share to four bits."""
    given = tensors(H=1, N=64, M=50, D=64, dtype=torch.float16)
    given["q"] = given["q"].abs() / 8
    given["k"][:, :, 0] = 14 * 8 / given["q"].float().sum(-1).mean().item()
    given, truth = leaves(given), leaves(exact(given))
    out, own = fused.flash(**given)[0], oracle(**truth)[0]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half()
    found, right = gradients([out], given, [cotangent]), gradients([own], truth, [cotangent.double()])
    assert 1e-8 < float(right[2][:, :, 1:].abs().mean()) < 1e-4
    for x, y in zip(found[1:], right[1:], strict=True):
        x, y = x[:, :, 1:], y[:, :, 1:]
        assert error(x, y) < BAR[torch.float16] + 1.5 * error(y.half(), y)


def test_large_cotangents_and_values_stay_within_float16() -> None:
    given = tensors(H=1, N=40, M=50, D=64, R=4, dtype=torch.float16)
    check(given | {"v": given["v"] * 1000}, torch.float16, cotangent=30.0)


def test_the_same_inputs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        given = leaves(tensors(H=2, keys=1, N=70, M=70, D=40, R=3, regions=3, dtype=torch.float16))
        out, lse, side_out = fused.flash(**given)
        return [out, lse, side_out, *gradients([out, side_out], given, [torch.ones_like(out), side_out.detach()])]

    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@DTYPES
def test_side_values_leave_the_output_alone(dtype: torch.dtype) -> None:
    given = tensors(H=1, N=40, D=80, R=7, dtype=dtype)
    plain, lse, nothing = fused.flash(**given | {"side": None})
    out, with_side, _ = fused.flash(**given)
    assert nothing is None and torch.equal(out, plain) and torch.equal(lse, with_side)


def test_one_region_of_all_tokens_changes_nothing() -> None:
    given = tensors(D=40, R=2)
    ones = {"query_bits": torch.ones(1, 70, dtype=torch.int32), "key_bits": torch.ones(1, 77, dtype=torch.int32)}
    for x, y in zip(fused.flash(**given), fused.flash(**given | ones), strict=True):
        assert torch.equal(x, y)


def test_a_list_of_all_tiles_changes_nothing() -> None:
    given = tensors(H=1, N=130, M=130, D=40, R=2)
    every = torch.arange(3, dtype=torch.int32).expand(3, 3)
    for x, y in zip(fused.flash(**given), fused.flash(**given | {"blocks": every}), strict=True):
        assert torch.equal(x, y)


def test_two_lists_merge_by_their_row_sums() -> None:
    given = tensors(N=128, M=192, D=40)
    parts = [[[0], [1]], [[1, 2], [2, 0]]]
    outs, logs = [], []
    for rows in parts:
        out, lse, _ = fused.flash(**given, blocks=torch.tensor(rows, dtype=torch.int32))
        outs.append(out.double())
        logs.append(lse.double())
    weights = torch.stack(logs).softmax(0)
    merged = (weights[..., None] * torch.stack(outs)).sum(0)
    assert error(merged, oracle(**exact(given))[0]) < BAR[torch.float32]


def test_a_bias_is_a_factor_of_the_weights() -> None:
    """log w on the logits against weights multiplied by w, for w as different as float16 would not resolve."""
    given = tensors(H=1, N=40, M=50, D=40, R=1, regions=1)
    given["query_bits"][:] = 1
    w = torch.tensor([1e-4, 0.37, 1.0, 2.5, 1e4]).repeat(10)
    side = {"side": torch.ones(1, 1, 50, 1)}
    out = fused.flash(**given | side | {"bias": w.log()[None]})[0]
    q, k, v = (given[x].double() for x in "qkv")
    weights = (q @ k.mT / 40**0.5).softmax(-1) * w.double()
    assert error(out, weights @ v / weights.sum(-1, keepdim=True)) < BAR[torch.float32]


def test_shares_of_all_parts_sum_to_one() -> None:
    given = tensors(N=33, M=77, D=40, regions=2)
    part = torch.arange(77) % 5
    out = fused.flash(**given | {"side": torch.nn.functional.one_hot(part)[None, None].float()})[2]
    full = torch.ones(33)
    full[3] = 0
    assert float((out.sum(-1) - full).abs().max()) < 2e-6


def test_the_order_of_keys_does_not_matter() -> None:
    given = tensors(N=33, M=130, D=40, R=3, regions=3)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(4))
    mixed = given | {x: given[x][:, :, order] for x in ("k", "v", "side")} | {"key_bits": given["key_bits"][:, order]}
    (out, lse, side_out), other = fused.flash(**given), fused.flash(**mixed)
    there = lse.isfinite()
    assert error(other[0], out.double()) < 2e-6 and error(other[2], side_out.double()) < 2e-6
    assert float((lse - other[1])[there].abs().max()) < 1e-5


def test_heads_that_share_keys_equal_heads_with_copies() -> None:
    given = tensors(H=4, keys=2, N=40, M=40, D=40, R=2)
    copies = given | {x: given[x].repeat_interleave(2, 1) for x in "kv"}
    for x, y in zip(fused.flash(**given), fused.flash(**copies), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("rows", [None, slice(5, -3)], ids=["all rows", "5 to -3"])
@DTYPES
def test_a_blend_agrees_with_float64_with_and_without_a_graph(dtype: torch.dtype, rows: slice | None) -> None:
    given = tensors(H=4, keys=2, N=60, M=60, D=80, dtype=dtype)
    given |= {"blend": torch.tensor([0.0, 0.3, 0.9, 1.0]), "blend_rows": rows}
    own = oracle(**exact(given) | {"blend_rows": rows})[0]
    assert error(fused.flash(**given)[0], own) < BAR[dtype]
    check(given, dtype)


@pytest.mark.parametrize("graph", [False, True], ids=["epilogue", "graph"])
def test_a_blend_of_zero_changes_nothing_and_of_one_gives_the_values(graph: bool) -> None:
    given = tensors(N=77, M=77, D=40, dtype=torch.float16)
    plain = fused.flash(**given)[0]
    given = leaves(given) if graph else given
    out = fused.flash(**given, blend=torch.tensor([0.0, 1.0]), blend_rows=slice(10, 70))[0]
    assert torch.equal(out[:, 0], plain[:, 0]) and torch.equal(out[:, 1, 10:70], given["v"][:, 1, 10:70])
    assert torch.equal(out[:, 1, :10], plain[:, 1, :10]) and torch.equal(out[:, 1, 70:], plain[:, 1, 70:])


@DTYPES
@pytest.mark.parametrize("mean", [True, False])
def test_columns_of_a_map_agree_with_float64(dtype: torch.dtype, mean: bool) -> None:
    given = tensors(B=2, H=2, keys=1, N=70, M=130, D=80, dtype=dtype)
    chosen = list(range(0, 130, 2))  # 65 columns: more than one tile of them
    lse = oracle(**exact(given))[1].float()
    found = fused.column_map(given["q"], given["k"][:, :, chosen], lse, scale=80**-0.5, head_mean=mean)
    one_hot = torch.eye(130, dtype=torch.float64)[:, chosen]
    truth = oracle(**exact(given) | {"side": one_hot[None, None]})[2]
    assert found.dtype == torch.float32 and found.shape == ((2, 70, 65) if mean else (2, 2, 70, 65))
    # exact products of half types and exp in float32: no rounding of the dtype at all
    assert error(found, truth.mean(1) if mean else truth) < BAR[torch.float32]


def test_columns_of_a_map_are_those_of_side_values() -> None:
    given = tensors(H=2, N=70, M=77, D=40, regions=2)
    eye = torch.eye(77)[:, 5:9][None, None]
    _, lse, side_out = fused.flash(**given | {"side": eye})
    columns = fused.column_map(given["q"], given["k"][:, :, 5:9], lse, scale=40**-0.5, head_mean=False)
    met = (given["query_bits"][0, :, None] & given["key_bits"][0, None, 5:9]) != 0
    assert float((columns * met - side_out).abs().max()) < 1e-6
    assert not columns[:, :, 3].any()  # in no region: lse is -inf


def test_one_key_side_gradients_are_skipped_when_unasked() -> None:
    given = tensors(H=1, N=40, M=40, D=40, R=2)
    q = given["q"].detach().requires_grad_()
    side_out = fused.flash(**given | {"q": q})[2]
    side_out.square().sum().backward()
    whole = leaves(given)
    fused.flash(**whole)[2].square().sum().backward()
    assert torch.equal(q.grad, whole["q"].grad)
    assert given["k"].grad is None


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at its copies
def test_operators_keep_what_they_promise_to_torch() -> None:
    given = leaves(tensors(H=1, N=20, M=20, D=40, R=2, regions=2))
    bits = (given["query_bits"], given["key_bits"])
    args = (given["q"], given["k"], given["v"], given["side"], *bits, None, None, None, 0, 0, 0.2)
    torch.library.opcheck(ops.flash, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_and_with_the_same_gradients(backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor wants a C++ compiler")
    given = leaves(tensors(H=2, N=20, M=20, D=40, R=2))

    def steer(q: Tensor, k: Tensor, v: Tensor, side: Tensor) -> Tensor:
        out, _, side_out = fused.flash(2 * q, k, v, side=side)
        return out.square().sum() + side_out.square().sum()

    args = [given[x] for x in ("q", "k", "v", "side")]
    compiled = torch.compile(steer, fullgraph=True, backend=backend)
    loss, own = steer(*args), compiled(*args)
    # inductor may add the squares in another order; in each order there is a rounding of 2**-24 for each at most
    terms = given["q"].numel() // 40 * 42 if backend == "inductor" else 0
    assert abs(loss.item() - own.item()) <= 2 * terms * 2**-24 * loss.item()
    for x, y in zip(torch.autograd.grad(loss, args[:3]), torch.autograd.grad(own, args[:3]), strict=True):
        assert torch.equal(x, y)


def test_each_key_tile_knows_the_query_tiles_that_name_it() -> None:
    blocks = torch.tensor([[0, 2], [2, -1], [1, 9]], dtype=torch.int32)
    assert launch.inverse(blocks, 3).tolist() == [[0, -1, -1], [2, -1, -1], [0, 1, -1]]


def test_the_checks_for_a_gpu_find_nothing_wrong_here() -> None:
    """What `python -m diffguide.kernels.report --device cuda` will run, at one of its cases."""
    from diffguide.kernels.fused.measured import check

    for row in check("cpu", [torch.float16], [40], ["all, listed"], [(33, 60)]):
        assert row["good"], row


class Watched:
    """The interpreter's memory, with a look at each address: does it lie in a tensor of the launch?"""

    def __init__(self, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory, self.tensors, self.touched, self.astray = memory, [], 0, []
        run = launch.Launch.run

        def watched(own: launch.Launch) -> None:
            self.tensors = [x for x in own.arguments.values() if isinstance(x, Tensor) and x.numel()]
            run(own)

        monkeypatch.setattr(launch.Launch, "run", watched)

    def load(self, at: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self.look(at, mask, np.dtype(dtype).itemsize)
        return self.memory.load(at, mask, other, dtype)

    def store(self, at: Any, value: Any, mask: Any) -> None:
        self.look(at, mask, value.dtype.itemsize)
        self.memory.store(at, value, mask)

    def look(self, at: Any, mask: Any, size: int) -> None:
        at = at[np.broadcast_to(mask, at.shape).astype(bool)]
        inside = np.zeros(at.shape, bool)
        for x in self.tensors:
            last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
            inside |= (at >= x.data_ptr()) & (at + size <= x.data_ptr() + (last + 1) * x.element_size())
        self.touched += at.size
        self.astray += at[~inside].tolist()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)


@pytest.mark.parametrize(("flags", "D", "N", "M"), [("all, listed", 40, 66, 70), ("regions", 80, 33, 77)])
def test_nothing_outside_the_tensors_is_touched(
    monkeypatch: pytest.MonkeyPatch, flags: str, D: int, N: int, M: int
) -> None:
    """Neither read nor written, in any of the kernels: what a memory checker says on a GPU, said here."""
    from triton.runtime import interpreter

    from diffguide.kernels.fused.measured import check

    watched = Watched(interpreter._interpreter, monkeypatch)
    monkeypatch.setattr(interpreter, "_interpreter", watched)
    assert all(row["good"] for row in check("cpu", [torch.float16], [D], [flags], [(N, M)]))
    assert watched.touched > 10_000 and not watched.astray


@DTYPES
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case: str, dtype: torch.dtype) -> None:
    check(tensors(dtype=dtype, **CASES[case]), dtype)
