"""Backward guidance: its equation, known values, and the conversion to the model's scale."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffguide.layout import Layout, Region
from diffguide.maps import Maps, Seen
from diffguide.method import Context
from diffguide.processors.backward_guidance import BackwardGuidance, cells_inside
from diffguide.site import Site
from diffguide.targets import find_targets, union

SITE = Site("site", "cross", "mid", 0, torch.nn.Identity())
HALF = Layout(Region("thing", box=(0.0, 0.0, 0.5, 1.0)))


def loss(P: torch.Tensor, layout: Any = HALF, grid: tuple[int, int] = (8, 8), columns: tuple[int, ...] = (1,)) -> float:
    """The loss of one picture whose maps are `P` [H, N, K]."""
    context = Context(["a thing"], lambda *_: list(columns), lambda _: [1], 0, 50, 1.0, [SITE], {SITE: grid}, grid, [0])
    method = BackwardGuidance(layout)
    method.prepare(context)
    return float(method.loss(Maps({"cross": [Seen(SITE, grid, P[None])]}), context)[0])


def half(inside: float, outside: float) -> torch.Tensor:
    P = torch.full((2, 8, 8), outside)
    P[:, :, :4] = inside
    return P.flatten(1)[..., None]


@pytest.mark.parametrize(
    ("inside", "outside", "E"), [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (0.5, 0.5, 0.25), (0.0, 0.0, 1.0)]
)
def test_known_values(inside: float, outside: float, E: float) -> None:
    assert loss(half(inside, outside)) == pytest.approx(30 * E)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 6), st.integers(1, 3), st.integers(1, 3))
def test_the_loss_is_the_equation(seed: int, h: int, w: int, heads: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    P = rng.random((heads, h * w, tokens))
    layout = Layout(Region("one", boxes=[(0.1, 0.2, 0.6, 0.9)]), Region("two", box=(0.5, 0.0, 1.0, 0.4), weight=2.0))
    wanted = []
    for region in layout.regions:
        M = cells_inside(region, (h, w)).numpy().ravel()
        E = np.mean(
            [[(1 - (P[n, :, t] * M).sum() / P[n, :, t].sum()) ** 2 for t in range(tokens)] for n in range(heads)]
        )
        wanted.append(region.weight * E)
    ours = loss(torch.from_numpy(P), layout, (h, w), tuple(range(tokens)))
    assert ours == pytest.approx(30 * np.mean(wanted), rel=1e-6)


def test_regions_in_another_order_have_the_same_loss() -> None:
    a, b = Region("one", box=(0, 0, 0.5, 0.5)), Region("two", box=(0.5, 0.5, 1, 1))
    P = torch.rand(2, 64, 1, generator=torch.Generator().manual_seed(0))
    assert loss(P, Layout(a, b)) == pytest.approx(loss(P, Layout(b, a)))


def test_boxes_lose_their_fractions_but_keep_a_cell() -> None:
    assert cells_inside(Region("x", box=(0.2, 0.2, 0.7, 0.7)), (8, 8)).sum() == 16  # cells 1 to 4
    assert cells_inside(Region("x", box=(0.99, 0.99, 1.0, 1.0)), (8, 8)).sum() == 1
    mask = np.zeros((16, 16), np.float32)
    mask[:8] = 1
    assert cells_inside(Region("x", mask=mask), (4, 4)).sum(1).tolist() == [4, 4, 0, 0]


def test_the_step_is_sigma_squared_in_sigma_scaled_latents() -> None:
    """z_ve moves by sigma² dL/dz_ve; with z_vp = z_ve / sqrt(1 + sigma²) that is rate * dL/dz_vp."""
    sigma = 3.0
    context = Context([None], lambda *_: [1], lambda _: [1], 0, 50, sigma, [], {}, (4, 4), [0])
    z_ve = torch.randn(4, dtype=torch.float64, requires_grad=True)
    scale = (1 + sigma**2) ** -0.5
    (g_ve,) = torch.autograd.grad((z_ve * scale).sin().sum(), z_ve)
    z_vp = (z_ve * scale).detach().requires_grad_()
    (g_vp,) = torch.autograd.grad(z_vp.sin().sum(), z_vp)
    moved = (z_ve - sigma**2 * g_ve) * scale
    assert torch.allclose(moved, z_vp - BackwardGuidance(HALF).rate(context) * g_vp)


def test_below_the_threshold_a_picture_is_left_alone() -> None:
    method = BackwardGuidance(HALF)
    context = Context([None], lambda *_: [1], lambda _: [1], 0, 50, 1.0, [], {}, (4, 4), [0])
    assert method.again(torch.tensor([[30 * 0.19, 30 * 0.21]]), context).tolist() == [False, True]
    assert method.most(context) == 5


def test_one_layout_for_each_prompt() -> None:
    layouts = [HALF, Layout(Region("other", box=(0, 0, 1, 1)))]
    context = Context(["a", "a", "b", "b"], lambda b, p, o: [b + 1], lambda _: [1], 0, 5, 1.0, [], {}, (4, 4), [0])
    targets = find_targets(context, layouts)
    assert [t[0].region.phrase for t in targets] == ["thing", "thing", "other", "other"]
    assert union(targets) == (1, 2, 3, 4)
