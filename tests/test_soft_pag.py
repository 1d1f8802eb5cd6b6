"""SoftPAG against explicit maps in float64, and what it promises of heads."""

import itertools
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import apart
from test_family_pipelines import call
from tiny_models import MODELS
from tiny_pipes import PIPES, built
from torch import Tensor, nn

from diffguide.errors import AttachError, ParamError, SteeringError
from diffguide.guide import Guide
from diffguide.perturbation import SCOPES, TARGETS, replaced
from diffguide.processors import PAG, SoftPAG
from diffguide.registry import of_model, sites_of
from diffguide.site import Call, Site

EXACT = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")


class Heads(nn.Module):
    heads = 3


SITE = Site("blocks.4.attn", "joint", "mid", 0, Heads(), number=4)


def a_call(image: int, text: int, first: bool, mask: str | None, seed: int, dtype: Any = torch.float64) -> Call:
    g = torch.Generator().manual_seed(seed)
    n = image + text
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=dtype) for _ in range(3))
    words = slice(0, text) if first else slice(image, n)
    own = slice(text, n) if first else slice(0, image)
    bias = None
    if mask is not None:
        closed = torch.rand(2, 1, n if mask.endswith("rows") else 1, n, generator=g) < 0.3
        closed[..., own] = False  # a token of the image may always be seen
        bias = ~closed if mask.startswith("bool") else torch.where(closed, -1e9, 0.0).to(dtype)
    return Call(SITE, q, k, v, bias, None, (image,), own, words, "weak", {"weak": slice(None)}, 0.0)


def the_map(call: Call) -> Tensor:
    logits = call.q @ call.k.mT * call.q.shape[-1] ** -0.5
    if call.mask is not None:
        logits = logits.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else logits + call.mask
    return logits.softmax(-1)


def perturbed(call: Call, target: str, scope: str) -> Tensor:
    """The whole map A* that takes the place of A, [B, H, N, N], row by row as the definitions say."""
    A = the_map(call)
    N = A.shape[-1]
    if scope != "joint":
        image, text = range(N)[call.image], list(range(N)[call.text])
        logits = call.q @ call.k.mT * call.q.shape[-1] ** -0.5
        if call.mask is not None and call.mask.dtype == torch.bool:
            logits = logits.masked_fill(~call.mask, -torch.inf)
        elif call.mask is not None:
            logits = logits + call.mask
        star = A.clone()
        for i in image:
            row = torch.zeros_like(A[:, :, i])
            if scope == "image_block":
                seen = [i, *text]
                row[..., seen] = logits[:, :, i, seen].softmax(-1)
            else:
                row[..., text] = A[:, :, i, text]
                row[..., i] = A[:, :, i, list(image)].sum(-1)
            star[:, :, i] = row
        return star
    if target == "identity":
        return torch.eye(N, dtype=A.dtype).expand_as(A)
    if target == "uniform":
        there = torch.ones_like(A) if call.mask is None else (A > 0).to(A)
        return there / there.sum(-1, keepdim=True)
    if target == "mean_query":
        logits = call.q.mean(2, keepdim=True) @ call.k.mT * call.q.shape[-1] ** -0.5
        logits = logits.expand_as(A)
        if call.mask is not None:
            logits = logits.masked_fill(~call.mask, -torch.inf) if call.mask.dtype == torch.bool else logits + call.mask
        return logits.softmax(-1)
    return nn.functional.one_hot(A.argmax(-1), N).to(A)


which = st.sampled_from([(t, "joint") for t in TARGETS] + [("identity", s) for s in SCOPES[1:]])
calls = st.builds(
    a_call,
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
    st.sampled_from([None, "bool", "bool rows", "bias", "bias rows"]),
    st.integers(0, 10**6),
)


@settings(max_examples=150)
@given(calls, which, st.floats(0, 1), st.sets(st.integers(0, 2)))
def test_the_output_is_that_of_the_blended_map(call: Call, which: tuple[str, str], u: float, heads: set[int]) -> None:
    """Equations 6 and 7, and the forms of section 3.2 of the specification, against the maps themselves."""
    target, scope = which
    method = SoftPAG(heads=[(4, h) for h in heads], blend=u, target=target, scope=scope)
    A, star = the_map(call), perturbed(call, target, scope)
    assert torch.allclose(star.sum(-1), torch.ones(1, dtype=star.dtype))
    for h in heads:
        A[:, h] = (1 - u) * A[:, h] + u * star[:, h]
    found = method.attend(call, lambda c: the_map(c) @ c.v)
    assert (found - A @ call.v).abs().max() < 1e-5  # blended in float32


@given(calls, which)
def test_closed_forms_in_float64(call: Call, which: tuple[str, str]) -> None:
    target, scope = which
    found = replaced(call, the_map(call) @ call.v, target, scope)
    bound = EXACT if scope == "joint" and target != "argmax" else 1e-5  # argmax and image_block work in float32
    assert (found - perturbed(call, target, scope) @ call.v).abs().max() < bound


def test_without_words_every_scope_is_the_same() -> None:
    call = a_call(6, 0, False, None, 0)
    one, two, three = (replaced(call, call.v * 0, "identity", scope) for scope in SCOPES)
    assert torch.equal(one, two) and torch.equal(one, three) and torch.equal(one, call.v)


def test_heads_add_up_in_a_layer_and_degrees_are_linear() -> None:
    call = a_call(5, 3, True, None, 3)
    plain = lambda c: the_map(c) @ c.v  # noqa: E731
    out = lambda heads, u=1.0: SoftPAG(heads=heads, blend=u).attend(call, plain) - plain(call)  # noqa: E731
    each = sum(out([(4, h)]) for h in range(3))
    assert (out("L4") - each).abs().max() < 1e-6
    assert (out("L4", 0.25) - 0.25 * out("L4")).abs().max() < 1e-6


def test_tokens_that_see_others_are_refused() -> None:
    call = a_call(4, 2, False, None, 0)
    narrow = Call(**{**vars(call), "k": call.k[:, :, :3], "v": call.v[:, :, :3]})
    with pytest.raises(SteeringError, match=r"blocks.4.attn: 6 tokens attend to 3 others, .* leave this layer out"):
        replaced(narrow, call.v, "identity")


# Which heads.


def chosen(model: nn.Module, heads: Any) -> list[tuple[int, int]]:
    method, sites = SoftPAG(heads=heads), sites_of(of_model(model), model)
    return sorted((s.number, h) for s in method.where(sites) for h in method.at(s))


def test_layers_are_counted_in_running_order() -> None:
    model = MODELS["sd15"]()
    sites = sorted((s for s in sites_of(of_model(model), model) if s.number >= 0), key=lambda s: s.number)
    ran: list[str] = []
    for site in sites:
        site.module.register_forward_pre_hook(lambda *_, name=site.name: ran.append(name))
    args, kwargs = of_model(model).example(model, (16, 16))
    model(*args, **kwargs)
    assert ran == [s.name for s in sites] and [s.number for s in sites] == list(range(7))


def test_the_ways_to_name_heads() -> None:
    model = MODELS["sd15"]()
    assert chosen(model, "L2H1") == chosen(model, [(2, 1)]) == chosen(model, "l2h1, ") == [(2, 1)]
    assert chosen(model, "L2") == chosen(model, "mid") == chosen(model, ["L2H1", (2, 0)]) == [(2, 0), (2, 1)]
    assert chosen(model, "mid:1,L0H0,L0H0") == [(0, 0), (2, 1)]
    assert chosen(model, "up_blocks.1.*:0") == [(5, 0), (6, 0)]
    assert chosen(model, "all") == list(itertools.product(range(7), range(2)))
    assert SoftPAG(heads=[]).inert and SoftPAG(heads=[(11, 15), "mid"]).heads == "L11H15,mid"


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ("L7", "L7 is not there, the last layer is L6"),
        ("L0H2", "L0H2 is not there, the last head of this layer is 1"),
        ("mid:2", "mid:2 is not there, the last head of this layer is 1"),
        ("mid:x", "mid:x is not there"),
        ("middle", "'middle' matches no layer; use L3H2"),
    ],
)
def test_heads_that_are_not_there_are_refused_when_attaching(heads: str, said: str) -> None:
    pipe = tiny.sd()
    with pytest.raises(ParamError, match=said):
        Guide(pipe, SoftPAG(heads=heads)).attach()
    with Guide(pipe):
        pass


@pytest.mark.parametrize("heads", [[(1,)], [(-1, 2)], [(1, 2.5)], [None]])
def test_what_is_no_head_is_refused(heads: Any) -> None:
    with pytest.raises(ParamError, match=r"is not a pair \(layer, head\)"):
        SoftPAG(heads=heads)


def test_a_scope_of_another_target_is_refused() -> None:
    with pytest.raises(ParamError, match="scope = 'image_block' goes with target = 'identity' alone, not 'uniform'"):
        SoftPAG(target="uniform", scope="image_block")


# In pipelines.


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_whole_layers_replaced_at_once_are_pag(name: str, guidance: float) -> None:
    pipe, given, _ = built(name)
    outs = []
    for method in (PAG(layers="all"), SoftPAG(heads="all", blend=1.0, scope="image_block")):
        with Guide(pipe, method):
            outs.append(call(pipe, given, guidance_scale=guidance))
    assert apart(*outs) < 1e-6


@pytest.mark.parametrize("name", sorted(PIPES))
def test_every_family_is_perturbed_head_by_head(name: str) -> None:
    pipe, given, model = built(name)
    sites = [s for s in sites_of(of_model(model), model) if s.number >= 0]
    if not sites:
        with pytest.raises(AttachError, match="SoftPAG finds no site"):
            Guide(pipe, SoftPAG(heads="all")).attach()
        return
    plain, found = call(pipe, given), []
    for head in (0, 1):
        with Guide(pipe, SoftPAG(heads=[(len(sites) - 1, head)], blend=1.0)):
            found.append(call(pipe, given))
    assert all(out.isfinite().all() and apart(out, plain) > 1e-6 for out in found)
    assert not torch.equal(*found)
