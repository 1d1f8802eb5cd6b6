"""SEG: queries blurred over the picture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_family_pipelines import call
from tiny_pipes import built
from torch import Tensor, nn

from diffguide.blur import fitting, gaussian
from diffguide.guide import Guide
from diffguide.processors import SEG
from diffguide.processors.seg import blurred, kernel
from diffguide.site import Call, Site

sides = st.integers(1, 9)
widths = st.floats(0.1, 6)


def queries(*grid: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, math.prod(grid), 4, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0.05, 20), sides)
def test_the_weights(sigma: float, side: int) -> None:
    weights = gaussian(sigma, fitting(kernel(sigma), side))
    assert len(weights) % 2 == 1 and len(weights) <= side and float(weights.sum()) == pytest.approx(1)
    assert torch.equal(weights, weights.flip(0)) and (weights.diff()[: len(weights) // 2] >= 0).all()
    wanted = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
    assert len(weights) == min(wanted, side - 1 + side % 2)


@given(sides, sides, widths, st.integers(0, 100))
def test_the_blur_is_a_convolution_over_the_grid(h: int, w: int, sigma: float, seed: int) -> None:
    q = queries(h, w, seed=seed)
    rows, columns = (gaussian(sigma, fitting(kernel(sigma), side)).numpy() for side in (h, w))
    plane = q[1, 2, :, 3].view(h, w).double().numpy()
    padded = np.pad(plane, ((len(rows) // 2,) * 2, (len(columns) // 2,) * 2), mode="reflect")
    wanted = [
        [float(rows @ padded[y : y + len(rows), x : x + len(columns)] @ columns) for x in range(w)] for y in range(h)
    ]
    assert np.abs(blurred(q, (h, w), sigma)[1, 2, :, 3].view(h, w).numpy() - wanted).max() < 1e-5


def test_wider_blurs_leave_less_difference_between_tokens() -> None:
    """What an inverted condition upstream gets wrong: a narrow blur must not be the mean."""
    q = queries(16, 16)
    spread = [float(blurred(q, (16, 16), sigma).var(2).mean()) for sigma in (0, 0.3, 0.6, 1, 2, 4, 9999)]
    assert spread == sorted(spread, reverse=True) and len(set(spread)) == len(spread) and spread[-1] < 1e-12
    assert torch.equal(blurred(q, (16, 16), 0.0), q)


def test_frames_are_blurred_apart_and_words_stay() -> None:
    q = queries(3, 4, 5)
    whole = blurred(q, (3, 4, 5), 1.5).unflatten(2, (3, 20))
    assert all(torch.allclose(whole[:, :, f], blurred(q.unflatten(2, (3, 20))[:, :, f], (4, 5), 1.5)) for f in range(3))
    site = Site("a", "joint", "mid", 0, nn.Identity())
    joint = torch.cat([torch.ones(2, 3, 6, 4), q], 2)
    made: list[Call] = []
    asked = Call(
        site, joint, joint, joint, None, None, (3, 4, 5), slice(6, 66), slice(0, 6), "weak", {"weak": slice(None)}, 0.0
    )
    SEG(sigma=2.0).attend(asked, lambda c: made.append(c) or c.q)  # type: ignore[func-returns-value]
    assert torch.equal(made[0].q[:, :, :6], joint[:, :, :6]) and torch.equal(made[0].k, joint)
    assert torch.allclose(made[0].q[:, :, 6:], blurred(q, (3, 4, 5), 2.0))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan", "animatediff"])
def test_it_steers_every_kind_of_model(name: str) -> None:
    pipe, given, _ = built(name)
    plain: Any = call(pipe, given)
    outs = []
    for sigma in (1.0, 10_000.0):
        with Guide(pipe, SEG(sigma=sigma, layers="all")):
            outs.append(call(pipe, given))
    assert all(out.isfinite().all() and not torch.equal(out, plain) for out in outs) and not torch.equal(*outs)
