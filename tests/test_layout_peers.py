"""BoxDiff, Attention Refocusing and R&B: their equations by loops, and the values that follow."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffguide.layout import Layout, Region
from diffguide.method import Context, Method
from diffguide.processors.attention_refocusing import AttentionRefocusing, refocus, stay
from diffguide.processors.box_diff import BoxDiff, inside_and_sides
from diffguide.processors.region_boundary import RegionBoundary, both_ways, bounding_box

G = (16, 16)
BOX = (0.25, 0.125, 0.75, 0.625)  # columns 4 to 12, rows 2 to 10
LAYOUT = Layout(Region("x", box=BOX))
boxes = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.05, 1), st.floats(0.05, 1)).map(
    lambda b: (b[0], b[1], min(1.0, b[0] + b[2]), min(1.0, b[1] + b[3]))
)


def cells(box: Any = BOX) -> torch.Tensor:
    return inside_and_sides([box], G, 0)[0].double()


def test_box_diff_has_no_loss_where_the_map_is_the_box() -> None:
    assert float(BoxDiff(LAYOUT).of_phrase(cells(), [BOX])) == pytest.approx(0)
    wrong = float(BoxDiff(LAYOUT).of_phrase(1 - cells(), [BOX]))
    assert wrong == pytest.approx(2 + (3 + 3) / 16), "all outside; profiles full beyond the box too"


@settings(max_examples=30)
@given(boxes, st.integers(0, 10**6), st.integers(0, 3))
def test_box_diff_is_its_equation(box: Any, seed: int, reach: int) -> None:
    X = np.random.default_rng(seed).random(G)
    x0, y0, x1, y1 = (round(16 * v) for v in box)
    x1, y1 = max(x1, min(x0, 15) + 1), max(y1, min(y0, 15) + 1)
    M = inside_and_sides([box], G, reach)[0].numpy()
    if M[min(y0, 15) : y1, min(x0, 15) : x1].sum() != M.sum():
        return  # rounding of cells is the layout's own, tested there

    def top(values: np.ndarray, count: float) -> float:
        return float(np.sort(values.ravel())[::-1][: max(1, int(count))].mean())

    rows, cols = M.any(1).nonzero()[0], M.any(0).nonzero()[0]
    wanted = max(0.0, 1 - top(X * M, 0.2 * M.sum())) + top(X * (1 - M), 0.2 * (1 - M).sum())
    for axis, (first, last) in ((0, (cols[0], cols[-1] + 1)), (1, (rows[0], rows[-1] + 1))):
        off = np.abs(X.max(axis) - M.max(axis))
        wanted += sum(off[i] for i in range(16) if min(abs(i - first), abs(i - last)) <= reach) / 16
    ours = BoxDiff(LAYOUT, reach=reach).of_phrase(torch.from_numpy(X), [box])
    assert float(ours) == pytest.approx(wanted, rel=1e-5)


def test_refocusing_has_no_loss_where_words_and_cells_stay() -> None:
    M = cells()[None]
    assert float(refocus(M, M)) == 0 and float(refocus(1 - M, M)) == 2
    S = torch.eye(256, dtype=torch.float64)
    assert float(stay(S, M.flatten(1))) == 0


@settings(max_examples=20)
@given(st.integers(0, 10**6))
def test_refocusing_of_selves_is_its_equation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    S, M = rng.dirichlet(np.ones(20), 20), rng.random((3, 20)) > 0.5
    M[:, 0], M[:, 1] = True, False
    wanted = [sum(S[p][~m].mean() for p in range(20) if m[p]) for m in M]
    ours = stay(torch.from_numpy(S), torch.from_numpy(M).double())
    assert ours.numpy() == pytest.approx(np.array(wanted))


def test_the_schedule_of_refocusing() -> None:
    method = AttentionRefocusing(LAYOUT)

    def at(step: int) -> tuple[float, int]:
        c = Context([None], lambda *_: [1], lambda _: [1], step, 50, 1.0, [], {}, G, [0])
        return method.rate(c), method.most(c)

    assert [at(s) for s in (0, 1, 2, 4, 5, 9, 10, 11, 15, 20, 25, 35, 36)] == [
        *[(4, 2)] * 2,
        *[(4, 6)] * 2,
        *[(3, 3)] * 2,
        (3, 2),
        (0, 0),
        (3, 2),
        *[(1, 2)] * 3,
        (0, 0),
    ]


def test_region_boundary_has_no_loss_where_the_map_is_the_box() -> None:
    assert float(RegionBoundary(LAYOUT).of_phrase(cells(), cells(), cells(), alone=False)) == 0
    assert torch.equal(bounding_box(cells() > 0).double(), cells())
    assert not bounding_box(torch.zeros(4, 4) > 0).any()


def test_the_straight_through_box_has_the_gradient_of_the_map() -> None:
    a = torch.rand(G, dtype=torch.float64).requires_grad_()
    B = bounding_box(a.detach() > 0.9).double()
    through = (B - a).detach() + a
    assert torch.allclose(through.detach(), B)
    (g,) = torch.autograd.grad((through * cells()).sum(), a)
    assert torch.equal(g, cells())
    assert both_ways(through * cells(), through, 0.0).item() == 2


@pytest.mark.parametrize("kind", [BoxDiff, RegionBoundary])
def test_moving_down_the_loss_brings_mass_inside(kind: type[Method]) -> None:
    logits = torch.zeros(G, dtype=torch.float64)
    logits[9:15, 8:15] = 3
    method: Any = kind(LAYOUT)  # type: ignore[call-arg]
    inside = []
    for _ in range(60):
        logits.requires_grad_()
        X = logits.sigmoid()
        value = method.of_phrase(X, [BOX]) if kind is BoxDiff else method.of_phrase(X, cells(), X, alone=False)
        inside.append(((X * cells()).sum() / X.sum()).item())
        (g,) = torch.autograd.grad(value, logits)
        logits = (logits - 20 * g).detach()
    assert inside[-1] > inside[0] + 0.1


@settings(max_examples=30)
@given(boxes, st.integers(0, 10**6), st.booleans())
def test_finite_for_any_box(box: Any, seed: int, flat: bool) -> None:
    X = torch.rand(G, generator=torch.Generator().manual_seed(seed)) * (not flat)
    X.requires_grad_()
    M = inside_and_sides([box], G, 1)[0]
    for value in (
        BoxDiff(LAYOUT).of_phrase(X, [box]),
        RegionBoundary(LAYOUT).of_phrase(X, M, X, alone=False),
        refocus(X[None], M[None]).sum(),
    ):
        assert value.isfinite() and torch.autograd.grad(value, X)[0].isfinite().all()
