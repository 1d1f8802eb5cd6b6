"""BACON (reconstructed): the values that its specification states, and what a loss of boxes must keep."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffguide.layout import Layout, Region
from diffguide.maps import Maps, Seen
from diffguide.method import Context
from diffguide.processors.bacon import Bacon, inner_loss, instances, marginal_loss, outer_loss, region_loss
from diffguide.site import Site

G = (16, 16)
TWO = [(0.05, 0.3, 0.45, 0.7), (0.55, 0.3, 0.95, 0.7)]
TOUCHING = [(0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75)]
ANY = Bacon(Layout(Region("x", box=(0, 0, 1, 1))))


def total(a: Tensor, boxes: list[Any]) -> float:
    return float(ANY.of_object(a, instances(boxes, G)))


def test_a_filled_box_has_no_loss_at_any_scale() -> None:
    M = instances(TWO, G)
    for factor in (1.0, 7.0, 0.01):
        assert total(factor * M[0], TWO[:1]) == pytest.approx(0, abs=2e-4)
        assert total(factor * M.amax(0), TWO) == pytest.approx(0, abs=2e-4)


def test_one_of_two_instances_missing() -> None:
    M = instances(TWO, G)
    a = M[0]
    assert float(region_loss(a, M)) == pytest.approx(0.5, abs=1e-4)
    assert float(inner_loss(a, M)) == pytest.approx(0.5, abs=1e-4)
    assert total(a, TWO) == pytest.approx(0.75, abs=1e-3)


def test_everything_outside() -> None:
    M = instances(TWO[:1], G)
    a = 1 - M[0]
    assert float(region_loss(a, M)) == pytest.approx(2, abs=1e-3)
    assert float(outer_loss(a, M)) == pytest.approx(1, abs=1e-3)
    assert float(inner_loss(a, M)) == pytest.approx(1, abs=1e-3)


def test_touching_instances_want_a_trench() -> None:
    M = instances(TOUCHING, G)
    blob = M.amax(0)
    assert float(outer_loss(blob, M)) == pytest.approx(1 / 9, abs=1e-4)
    blob[:, 7:9] = 0
    assert float(outer_loss(blob, M)) == pytest.approx(0, abs=1e-6)


def test_a_box_over_everything_has_no_loss() -> None:
    assert total(torch.ones(G), [(0, 0, 1, 1)]) == pytest.approx(0, abs=1e-4)


boxes = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.02, 1), st.floats(0.02, 1)).map(
    lambda b: (b[0], b[1], min(1.0, b[0] + b[2]), min(1.0, b[1] + b[3]))
)


@settings(max_examples=60)
@given(st.lists(boxes, min_size=1, max_size=4), st.integers(0, 10**6), st.booleans())
def test_finite_ordered_and_differentiable(found: list[Any], seed: int, empty: bool) -> None:
    """Any boxes, 1-cell ones and heaps included; a map of zeros too. The order of instances does not count."""
    a = torch.rand(G, generator=torch.Generator().manual_seed(seed)) * (not empty)
    a.requires_grad_()
    for boundary in ("rings", "marginal"):
        method = Bacon(ANY.layout, boundary=boundary)
        value = method.of_object(a, instances(found, G))
        (g,) = torch.autograd.grad(value, a)
        assert value.isfinite() and value >= 0 and g.isfinite().all()
        with torch.no_grad():
            assert method.of_object(a, instances(found[::-1], G)).item() == pytest.approx(value.item(), abs=1e-5)


@settings(max_examples=40)
@given(st.lists(boxes, min_size=1, max_size=3), st.integers(0, 10**6))
def test_the_region_loss_is_its_equation(found: list[Any], seed: int) -> None:
    a = np.random.default_rng(seed).random(G)
    M = instances(found, G).numpy().astype(np.float64)
    U, top, eps = M.max(0), a.max() + 1e-6, 1e-6
    wanted = (1 - (a * U).sum() / (a.sum() + eps)) ** 2
    wanted += np.mean([max(0.0, 1 - (a * m).max() / (0.8 * top)) ** 2 for m in M])
    assert float(region_loss(torch.from_numpy(a), torch.from_numpy(M))) == pytest.approx(wanted, rel=1e-6)


@settings(max_examples=40)
@given(st.lists(boxes, min_size=1, max_size=3), st.integers(0, 10**6))
def test_the_outer_loss_is_its_equation(found: list[Any], seed: int) -> None:
    """D = dilate(M) (1 - M) (1 - cores of the others), cell by cell."""
    a = np.random.default_rng(seed).random(G)
    M = instances(found, G).numpy() > 0.5

    def around(mask: np.ndarray, y: int, x: int) -> np.ndarray:
        return mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]

    leaks = []
    for k, mask in enumerate(M):
        leak = 0.0
        for y in range(16):
            for x in range(16):
                core = any(around(other, y, x).all() for n, other in enumerate(M) if n != k)
                if around(mask, y, x).any() and not mask[y, x] and not core:
                    leak += a[y, x]
        leaks.append(leak / (leak + (a * mask).sum() + 1e-6))
    ours = outer_loss(torch.from_numpy(a), torch.from_numpy(M.astype(np.float64)))
    assert float(ours) == pytest.approx(np.mean(leaks), rel=1e-6)


def test_the_marginal_reading_is_zero_for_a_filled_box() -> None:
    M = instances(TWO[:1], G)
    assert float(marginal_loss(M[0], M)) == pytest.approx(0, abs=1e-4)
    assert float(marginal_loss(1 - M[0], M)) == pytest.approx(0.5, abs=1e-4)


SITES = {k: Site(k, k, "mid", 0, torch.nn.Identity()) for k in ("cross", "self")}  # type: ignore[arg-type]


def prepared(method: Bacon, columns: tuple[int, ...] = (1,)) -> Context:
    context = Context(["x"], lambda *_: list(columns), lambda _: [1], 0, 50, 1.0, [], {}, G, [0])
    method.prepare(context)
    return context


def maps(c: Tensor, S: Tensor) -> Maps:
    return Maps({"cross 16": [Seen(SITES["cross"], G, c[None])], "self 16": [Seen(SITES["self"], G, S[None])]})


def test_alignment_by_the_identity_or_of_a_constant_changes_nothing() -> None:
    aligned, bare = (
        Bacon(Layout(Region("x", box=TWO[0])), sides=(16,)),
        Bacon(Layout(Region("x", box=TWO[0])), align=0.0, sides=(16,)),
    )
    rng = torch.Generator().manual_seed(0)
    c, S = torch.rand(256, 1, generator=rng), torch.rand(256, 256, generator=rng).softmax(-1)
    context = prepared(aligned)
    wanted = float(bare.loss(maps(c, S), context))
    assert float(aligned.loss(maps(c, torch.eye(256)), context)) == pytest.approx(wanted, rel=1e-5)
    assert float(aligned.loss(maps(c, S), context)) != pytest.approx(wanted, rel=1e-3)
    flat = torch.full((256, 1), 0.3)
    assert float(aligned.loss(maps(flat, S), context)) == pytest.approx(
        float(bare.loss(maps(flat, S), context)), rel=1e-4
    )


def test_the_gradient_goes_through_cross_attention_alone() -> None:
    method = Bacon(Layout(Region("x", box=TWO[0])), sides=(16,))
    rng = torch.Generator().manual_seed(0)
    c = torch.rand(256, 1, generator=rng, requires_grad=True)
    S = torch.rand(256, 256, generator=rng).softmax(-1).requires_grad_()
    value = method.loss(maps(c, S), prepared(method)).sum()
    g_c, g_S = torch.autograd.grad(value, (c, S), allow_unused=True)
    assert g_c.abs().sum() > 0 and g_S is None


def test_descending_brings_attention_into_the_boxes() -> None:
    """200 steps of size 30 on the logits of two words."""
    method = Bacon(Layout(Region("x", boxes=TWO)), align=0.0, sides=(16,))
    context, M = prepared(method), instances(TWO, G).amax(0).flatten()
    logits = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        logits = logits.detach().requires_grad_()
        a = logits.softmax(-1)
        value = method.loss(Maps({"cross 16": [Seen(SITES["cross"], G, a[None, :, 1:])]}), context).sum()
        logits = logits - 30 * torch.autograd.grad(value, logits)[0]
    a = logits.detach().softmax(-1)[:, 1]
    assert float((a * M).sum() / a.sum()) > 0.85 and value.item() < 0.1


def test_more_moves_in_the_first_step() -> None:
    first, later = prepared(ANY), prepared(ANY)
    later.step = 3
    method = Bacon(Layout(Region("x", box=(0, 0, 1, 1))), first_iterations=7, iterations=3)
    assert (method.most(first), method.most(later)) == (7, 3)
    assert ANY.again(torch.tensor([[0.1, 0.3]]), first).tolist() == [False, True]
