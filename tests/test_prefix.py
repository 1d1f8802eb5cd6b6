"""Weak passes that begin at their first perturbed block."""

from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from probes import Through, apart
from test_family_pipelines import call
from tiny_pipes import PIPES, built

from diffguide.guide import Guide
from diffguide.processors import PAG, SEG, SoftPAG
from diffguide.registry import of_model, sites_of
from diffguide.site import Site

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
ROUNDING = 2e-6  # of the largest value: rows of a batch are not those of a batch of one


def layers(model: Any) -> list[Site]:
    return sorted((s for s in sites_of(of_model(model), model) if s.number >= 0), key=lambda s: s.number)


def counted(model: Any) -> Counter[int]:
    """How often each layer's module runs from now on."""
    counts: Counter[int] = Counter()
    for site in layers(model):
        site.module.register_forward_pre_hook(lambda *_, n=site.number: counts.update([n]))
    return counts


@pytest.mark.parametrize("name", sorted(PIPES))
def test_the_picture_is_that_of_a_whole_weak_pass(name: str) -> None:
    pipe, given, model = built(name)
    sites = layers(model)
    if not sites:
        return  # Sana, which no weak pass is made for
    method = SoftPAG(heads=[(len(sites) - 1, 0)], blend=1.0)
    outs, runs = {}, {}
    counts = counted(model)
    for share in (False, True):
        counts.clear()
        with Guide(pipe, method, share=share):
            outs[share] = call(pipe, given)
        runs[share] = dict(counts)
    assert apart(outs[True], outs[False]) < ROUNDING
    assert runs[True][len(sites) - 1] == runs[False][len(sites) - 1]
    assert runs[True][0] < runs[False][0] or len(sites) == 1


def test_what_is_shared_and_what_is_not() -> None:
    pipe = tiny.sd()
    counts = counted(pipe.unet)
    with Guide(pipe, PAG(layers="mid")):  # layer 2, after down_blocks.0 and .1
        tiny.call(pipe)
    steps = counts[0]
    assert [counts[n] for n in range(7)] == [steps, steps, *[2 * steps] * 5]
    counts.clear()
    with Guide(pipe, PAG(layers="up_blocks.1.attentions.1*"), SEG(layers="down_blocks.1*")):
        tiny.call(pipe)
    # the first begins in the midst of up_blocks.1, at layer 6, the second with layer 1
    assert [counts[n] for n in range(7)] == [steps, *[2 * steps] * 5, 3 * steps]


def test_nothing_is_shared_with_a_pass_that_another_method_changes() -> None:
    pipe = tiny.sd()
    counts = counted(pipe.unet)
    with Guide(pipe, PAG(layers="mid"), Through()):
        tiny.call(pipe)
    assert counts[0] == counts[2]


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.sd()
    plain = tiny.call(pipe)
    before = {name: ("forward" in vars(m), len(m._forward_hooks)) for name, m in pipe.unet.named_modules()}

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("stop here")

    guide = Guide(pipe, PAG(layers="mid"))
    with guide:
        tiny.call(pipe)
    monkeypatch.setattr(pipe.unet.up_blocks[1], "forward", fail)
    with pytest.raises(RuntimeError, match="stop here"), Guide(pipe, PAG(layers="mid")):
        tiny.call(pipe)
    monkeypatch.undo()
    assert before == {name: ("forward" in vars(m), len(m._forward_hooks)) for name, m in pipe.unet.named_modules()}
    assert torch.equal(tiny.call(pipe), plain) and guide._run is not None and guide._run.prefix is None
