"""A-STAR: equations 2 and 3, what its specification says follows from them, and what is carried from step to step."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffguide.concepts import Carried
from diffguide.errors import ParamError
from diffguide.layout import Layout, Region
from diffguide.maps import Maps, Seen
from diffguide.method import Context
from diffguide.processors.a_star import AStar, claims, overlap, to_unit
from diffguide.site import Site

G = (16, 16)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(0, 10**6))
@settings(max_examples=25)
def test_overlap_is_its_equation_and_symmetric(seed: int) -> None:
    a, b = noise(seed, 2, *G)
    x, y = a.numpy(), b.numpy()
    assert float(overlap(a, b)) == pytest.approx(np.minimum(x, y).sum() / (x + y).sum(), rel=1e-6)
    assert float(overlap(a, b)) == pytest.approx(float(overlap(b, a)), rel=1e-9)
    q = float(overlap(a, b))
    assert float(overlap(a, b, "union")) == pytest.approx(q / (1 - q), rel=1e-6)


def test_values_that_follow() -> None:
    a = noise(0, *G)
    left = torch.zeros(G, dtype=torch.float64)
    left[:, :8] = 1
    assert float(overlap(a, a)) == pytest.approx(0.5)
    assert float(overlap(a * left, a * (1 - left))) == 0
    assert 1 - float(overlap(torch.ones_like(left), left)) == pytest.approx(2 / 3)
    assert 1 - float(overlap(0.01 * a, left)) > 0.99, "why maps are brought to 0..1 first"
    moved = [1 - float(overlap(share * left + (1 - share) * (1 - left), left)) for share in (0.2, 0.5, 0.9)]
    assert moved == sorted(moved, reverse=True)


def test_the_gradient_pulls_mass_into_what_was_held() -> None:
    a = (0.2 + 0.6 * noise(1, *G)).requires_grad_()
    held = torch.zeros(G, dtype=torch.float64)
    held[4:9, 3:8] = 1
    (g,) = torch.autograd.grad(1 - overlap(a, held), a)
    assert (g[held > 0] < 0).all() and (g[held == 0] > 0).all()
    b = noise(2, *G)
    (g,) = torch.autograd.grad(overlap(a, b), a)
    assert (g[a < b] > 0).all()


def test_maps_that_share_a_blob_part() -> None:
    logits = noise(3, 2, *G)
    logits[:, 5:10, 5:10] += 2
    shares = []
    for _ in range(100):
        logits.requires_grad_()
        X = to_unit(logits.softmax(0))
        value = overlap(X[0], X[1])
        (g,) = torch.autograd.grad(value, logits)
        logits = (logits - 20 * g).detach()
        shares.append(value.item())
    assert (
        all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(shares)) and shares[-1] < 0.5 * shares[0]
    )


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=25)
def test_claims_do_not_overlap_and_are_not_empty_for_one(seed: int, count: int) -> None:
    held = claims(to_unit(noise(seed, count, *G)), 0.5)
    assert set(held.unique().tolist()) <= {0.0, 1.0} and held.sum(0).max() <= 1
    point = torch.zeros(1, *G)
    point[0, 3, 3] = 1
    assert claims(point + 1e-3 * torch.rand(1, *G), 0.5).sum() >= 25, "a tenth where too few are above"


def context(step: int = 0, prompts: tuple[str, ...] = ("a cat and a dog",), **more: Any) -> Context:
    columns = {"cat": [2], "dog": [5], "bird": [7]}
    find = lambda b, phrase, occurrence: columns[phrase]  # noqa: E731
    return Context(list(prompts), find, lambda _: [1, 2, 3, 4, 5], step, 50, 1.0, [], {}, G, [0], **more)


def maps(A: Tensor) -> Maps:
    site = Site("x", "cross", "up", 0, torch.nn.Identity())
    return Maps({"cross": [Seen(site, G, A.unsqueeze(0))]})


def ready(method: AStar) -> Context:
    c = context()
    method.prepare(c)
    return c


def test_the_first_step_has_no_retention_and_later_ones_do() -> None:
    A = torch.rand(256, 10, generator=torch.Generator().manual_seed(0)) * 0.2
    lone = AStar(words=("cat",))
    c = ready(lone)
    assert float(lone.loss(maps(A), c)) == 0
    c.step = 1
    later = float(lone.loss(maps(A), c))
    assert 0.5 <= later <= 1
    c.step = 1  # another pass of the same step compares with the same mask
    assert float(lone.loss(maps(A), c)) == pytest.approx(later)
    assert all(not held.requires_grad for _, held in c.memory["held"].now.values())
    off = AStar(words=("cat",), retention=0.0)
    c = ready(off)
    off.loss(maps(A), c)
    c.step = 1
    assert float(off.loss(maps(A), c)) == 0


def test_segregation_adds_pairs_and_the_order_does_not_count() -> None:
    A = torch.rand(256, 10, generator=torch.Generator().manual_seed(0)) * 0.2
    three = [AStar(words=w) for w in (("cat", "dog", "bird"), ("bird", "cat", "dog"))]
    values = [float(m.loss(maps(A), ready(m))) for m in three]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    mean = AStar(words=("cat", "dog", "bird"), reduce="mean")
    assert float(mean.loss(maps(A), ready(mean))) == pytest.approx(values[0] / 3, rel=1e-5)


def test_a_layout_takes_the_place_of_what_was_held() -> None:
    A = torch.rand(256, 10, generator=torch.Generator().manual_seed(0)) * 0.2
    method = AStar(Layout(Region("cat", box=(0, 0, 0.5, 1)), Region("dog", box=(0.5, 0, 1, 1))), segregation=0.0)
    c = ready(method)
    first = float(method.loss(maps(A), c))
    c.step = 7
    assert 1 <= first <= 2 and float(method.loss(maps(A), c)) == pytest.approx(first)


def test_what_is_carried() -> None:
    held = Carried()
    assert [held(0, 0, "a"), held(0, 0, "b"), held(0, 2, "c"), held(0, 2, "d"), held(1, 2, "x")] == [
        None,
        None,
        "b",
        "b",
        None,
    ]


def test_no_concept_is_told() -> None:
    with pytest.raises(ParamError, match=r"AStar.words: no noun phrase found in ''"):
        AStar().prepare(context(prompts=("",)))
