"""CONFORM: InfoNCE by loops, its floors, and what the published code got wrong."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffguide.errors import ParamError
from diffguide.maps import Maps, Seen
from diffguide.method import Context
from diffguide.processors.conform import Conform, contrastive, cosines, ntxent
from diffguide.site import Site

G = (16, 16)


def reference(e: np.ndarray, labels: list[int], tau: float) -> float:
    """The mean over ordered pairs of one group, by loops."""
    terms = []
    for a in range(len(e)):
        s = [math.exp(float(e[a] @ x) / (np.linalg.norm(e[a]) * np.linalg.norm(x)) / tau) for x in e]
        repel = sum(s[b] for b in range(len(e)) if labels[b] != labels[a])
        terms += [-math.log(s[p] / (s[p] + repel)) for p in range(len(e)) if p != a and labels[p] == labels[a]]
    return float(np.mean(terms))


@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), st.integers(0, 10**6), st.floats(0.05, 2))
@settings(max_examples=30)
def test_the_loss_is_its_equation(sizes: list[int], seed: int, tau: float) -> None:
    labels = [k for k, n in enumerate(sizes) for _ in range(n)]
    e = np.random.default_rng(seed).random((len(labels), 30))
    if max(sizes) == 1:
        labels, e = labels * 2, np.concatenate([e, e[::-1]])
    ours = float(ntxent(torch.from_numpy(e), torch.tensor(labels), tau))
    assert ours == pytest.approx(reference(e, labels, tau), rel=1e-5)
    order = np.random.default_rng(seed).permutation(len(labels))
    mixed = ntxent(torch.from_numpy(3.7 * e[order]), torch.tensor(labels)[order.tolist()], tau)
    assert float(mixed) == pytest.approx(ours, rel=1e-5), "neither order nor scale counts"


@pytest.mark.parametrize(
    ("labels", "floor", "together"), [([0, 0, 1, 1, 0, 0, 1, 1], 0.4327, 1.6094), ([0, 1, 0, 1], 0.2395, 1.0986)]
)
def test_floor_and_coincidence(labels: list[int], floor: float, together: float) -> None:
    apart = torch.eye(2)[labels]
    assert float(ntxent(apart, torch.tensor(labels), 0.5)) == pytest.approx(floor, abs=1e-4)
    assert float(ntxent(torch.ones(len(labels), 4), torch.tensor(labels), 0.5)) == pytest.approx(together, abs=1e-4)


def test_nothing_to_attract_or_to_repel_is_no_loss() -> None:
    e = torch.rand(3, 9).requires_grad_()
    for labels in ([0, 1, 2], [0, 0, 0]):
        value = ntxent(e, torch.tensor(labels), 0.5)
        assert value.item() == 0 and torch.autograd.grad(value, e)[0].isfinite().all()
    assert ntxent(torch.zeros(4, 9), torch.tensor([0, 0, 1, 1]), 0.5).isfinite(), "empty maps"


@pytest.mark.parametrize("loss", [lambda e, y: ntxent(e, y, 0.5), contrastive])
def test_a_step_parts_groups_and_joins_tokens(loss: Any) -> None:
    e = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    before = cosines(e.detach())
    (g,) = torch.autograd.grad(loss(e, labels), e)
    after = cosines((e - 0.5 * g).detach())
    assert after[0, 1] > before[0, 1] and after[2, 3] > before[2, 3]
    assert after[:2, 2:].mean() < before[:2, 2:].mean()


def context(**more: Any) -> Context:
    columns = {"green glasses": [2, 3], "yellow clock": [6, 7], "cat": [4]}
    find = lambda b, phrase, occurrence: columns[phrase]  # noqa: E731
    prompt = "a green glasses and a yellow clock"
    return Context([prompt], find, lambda _: [1], 0, 50, 1.0, [], {}, G, [0], **more)


def maps(A: Tensor) -> Maps:
    site = Site("x", "cross", "up", 0, torch.nn.Identity())
    return Maps({"cross": [Seen(site, G, A.unsqueeze(0))]})


def test_seen_twice_is_the_same_and_the_map_is_untouched() -> None:
    A = torch.rand(256, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = A.detach().clone()
    for softmax in (False, True):
        method, c = Conform(softmax=softmax), context()
        method.prepare(c)
        assert c.memory["groups"] == [[[2, 3], [6, 7]]]
        values = [method.loss(maps(A), c).item() for _ in range(2)]
        assert values[0] == values[1] > 0 and torch.equal(A.detach(), kept)
        c.step = 1
        method.loss(maps(torch.rand(256, 10)), c)
        before = c.memory["before"].before[0]
        assert before.shape == (4, 256) and not before.requires_grad
        alone = Conform(softmax=softmax, previous=False)
        assert alone.loss(maps(A), c).item() == pytest.approx(values[0])


def test_when_a_move_is_repeated() -> None:
    c = context()
    assert [Conform().most(c), Conform(refine=()).most(c)] == [21, 1]
    c.step = 20
    assert Conform().most(c) == 21 and Conform().again(torch.tensor([[0.7]]), c)
    assert not Conform(target=0.8).again(torch.tensor([[0.7]]), c) and not Conform().again(torch.zeros(1, 1), c)
    c.step = 3
    assert Conform().most(c) == 1 and Conform(target=0.8).again(torch.tensor([[0.7]]), c)
    rates = [Conform().rate(Context(**{**vars(c), "step": i})) for i in (0, 10, 20, 29)]
    assert rates == pytest.approx([20, 18.95, 17.84, 16.78], abs=0.01)


def test_one_group_is_refused() -> None:
    with pytest.raises(ParamError, match=r"only 'cat' found in .*; name 2 or more"):
        Conform(words=("cat",)).prepare(context())


def test_a_prompt_of_one_group_is_told_and_nothing_moves() -> None:
    """Its neighbours in the batch may have two."""
    c, method = context(), Conform()
    c.prompts = ["a cat on a white background"]
    with pytest.warns(UserWarning, match=r"only 'cat' found in .*, or nothing is done in this picture"):
        method.prepare(c)
    A = torch.rand(256, 10, generator=torch.Generator().manual_seed(0))
    for step in (0, 1):
        c.step = step
        assert not method.again(method.loss(maps(A), c)[None], c).any()
    c.prompts = ["in the park"]
    with pytest.raises(ParamError, match="no noun phrase found in 'in the park'"):
        method.prepare(c)
