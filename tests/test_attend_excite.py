"""Attend-and-Excite: the equation in float64, the rule of repetition, and diffusers' own pipeline as a witness."""

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from diffguide.errors import ParamError
from diffguide.guide import Guide
from diffguide.method import Context
from diffguide.processors.attend_excite import AttendExcite, excite
from diffguide.targets import smooth


def reference(A: np.ndarray, columns: list[list[int]], stop: int, grid: tuple[int, int]) -> float:
    """The loss of one picture by loops, in float64."""
    h, w = grid
    kernel = np.array([[math.exp(-(y * y) - x * x) for x in (-1, 0, 1)] for y in (-1, 0, 1)])
    kernel /= kernel.sum()
    losses = []
    for each in columns:
        X = np.zeros((h, w))
        for i in range(h * w):
            row = [math.exp(100 * a) for a in A[i, 1:stop]]
            X[i // w, i % w] = sum(row[c - 1] for c in each) / sum(row)
        P = np.pad(X, 1, mode="reflect")
        G = [[(P[y : y + 3, x : x + 3] * kernel).sum() for x in range(w)] for y in range(h)]
        losses.append(max(0.0, 1 - np.max(G)))
    return max(losses)


@settings(max_examples=25)
@given(st.integers(2, 6), st.integers(2, 6), st.integers(4, 9), st.integers(0, 10**6))
def test_the_loss_is_the_equation(h: int, w: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    A = rng.dirichlet(np.ones(tokens), h * w)
    columns = [[1], [1, 2]]
    ours = excite(torch.from_numpy(A), columns, -1, (h, w))
    assert float(ours) == pytest.approx(reference(A, columns, -1, (h, w)), abs=1e-9)


def test_the_smoothing_weights() -> None:
    point = torch.zeros(5, 5)
    point[2, 2] = 1
    seen = smooth(point)
    assert [round(float(seen[y, x]), 4) for y, x in ((2, 2), (2, 1), (1, 1))] == [0.3319, 0.1221, 0.0449]
    assert torch.allclose(smooth(torch.ones(4, 7)), torch.ones(4, 7))
    assert smooth(torch.ones(1, 3)).shape == (1, 3)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_phrase_may_be_seen_as_clearly_as_a_word_whatever_its_pieces(pieces: list[int]) -> None:
    """Each phrase has a cell of its own, whose attention its pieces share."""
    starts = [1 + sum(pieces[:k]) for k in range(len(pieces))]
    columns = [list(range(start, start + n)) for start, n in zip(starts, pieces, strict=True)]
    A = torch.zeros(len(pieces) * 9, 2 + sum(pieces))
    for k, each in enumerate(columns):
        A[9 * k : 9 * k + 9, each] = 1.0  # of a block of 3 x 3 cells, so that smoothing keeps the middle one
    assert float(excite(A, columns, -1, (3 * len(pieces), 3))) < 1e-6


def test_a_word_that_is_seen_has_no_loss() -> None:
    A = torch.zeros(16, 4)
    A[:, 1] = 1.0  # the softmax of 100 over 0 is 1 to float precision
    assert float(excite(A, [[1]], -1, (4, 4))) < 1e-6
    assert float(excite(A, [[1], [2]], -1, (4, 4))) == pytest.approx(1.0)


def context(step: int, steps: int = 50) -> Context:
    return Context([None], lambda *_: [1], lambda _: [1], step, steps, 1.0, [], {}, (4, 4), [0])


@pytest.mark.parametrize(
    ("step", "losses", "moves"),
    [
        (3, [0.9], 1),  # an ordinary step
        (3, [0.0], 0),  # nothing to gain
        (10, [0.4], 1),  # below 1 - 0.5 from the start: the step's own move
        (10, [0.9, 0.7, 0.4, 0.4], 4),  # above, above, below: that pass moves too, then the step's own
        (10, [0.9, 0.4, 0.6, 0.6], 3),
        (10, [0.9] * 30, 21),  # twenty repetitions, then the step's own
        (20, [0.9, 0.1, 0.0], 2),  # the step's own move is left out when the loss is zero
    ],
)
def test_when_a_move_is_repeated(step: int, losses: list[float], moves: int) -> None:
    method, at = AttendExcite(), context(step)
    done = 0
    for k in range(min(len(losses), method.most(at))):
        if not method.again(torch.tensor(losses[: k + 1])[:, None], at).item():
            break
        done += 1
    assert done == moves


def test_the_step_size_falls_to_the_root_of_a_half() -> None:
    assert AttendExcite().rate(context(0)) == 20
    assert AttendExcite().rate(context(49)) == pytest.approx(20 * 0.5**0.5)


def test_refine_and_targets_go_together() -> None:
    with pytest.raises(ParamError, match=r"AttendExcite\.targets has 3 values, refine has 1"):
        AttendExcite(refine=(0.1,))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # the witness calls it the old way
@pytest.mark.parametrize("guidance", [7.5])
def test_diffusers_pipeline_moves_the_same_latents(guidance: float) -> None:
    """The deprecated pipeline as a witness: same indices, same repetitions, same latents.

    It skips `scale_model_input`, which changes nothing with DDIM, and its smoothing is the one our `smooth`
    reproduces; our `side` is its `attn_res`, our `refine` and `targets` its `thresholds`, our `window` its
    `max_iter_to_alter`. In float64, where only our maps are float32: 2.3e-6 apart after 43 moves at latents of about
    13, against 2.1e-5 with everything in float32.
    """
    sched = DDIMScheduler(**tiny.NOISE, clip_sample=False, set_alpha_to_one=False)
    parts: dict[str, Any] = tiny.sd(sched).to(dtype=torch.float64).components
    parts.pop("image_encoder", None)
    peer = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    peer.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = peer(
        tiny.PROMPT,
        token_indices=[3, 7],
        num_inference_steps=5,
        max_iter_to_alter=3,
        thresholds={0: 0.05, 1: 0.5},
        attn_res=(16, 16),
        height=32,
        width=32,
        guidance_scale=guidance,
        latents=noise.clone(),
        output_type="latent",
    ).images
    pipe = tiny.sd(sched).to(dtype=torch.float64)
    plain = tiny.call(pipe, latents=noise.clone(), num_inference_steps=5, guidance_scale=guidance)
    method = AttendExcite(tokens=(3, 7), refine=(0.0, 0.2), targets=(0.05, 0.5), window=(0.0, 0.6))
    with Guide(pipe, method) as guide:
        ours = tiny.call(pipe, latents=noise.clone(), num_inference_steps=5, guidance_scale=guidance)
    assert [len(s.losses) for s in guide.report.steps] == [21, 21, 1]
    assert (theirs - plain).abs().max() > 1e-2, "the witness does something"
    assert (ours - theirs).abs().max() < 1e-5
