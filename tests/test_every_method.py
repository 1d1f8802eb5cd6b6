"""What every method promises, on a tiny pipeline of the real class."""

import math
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from every import EVERY, STEERING, make
from hypothesis import given
from hypothesis import strategies as st

from diffguide.errors import ParamError
from diffguide.guide import Guide
from diffguide.method import Method
from diffguide.processors import PAG, CaptureMaps

every = pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name())
steering = pytest.mark.parametrize("method", STEERING, ids=lambda m: m.name())


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


@pytest.fixture(scope="module")
def plain(pipe: Any) -> torch.Tensor:
    return tiny.call(pipe)


def state(pipe: Any) -> dict[str, Any]:
    """Everything a guide could leave behind."""
    modules = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in pipe.unet.named_modules()}
    return {
        "processors": {name: id(p) for name, p in pipe.unet.attn_processors.items()},
        "hooks": modules,
        "scheduler": sorted(vars(pipe.scheduler)),
        "step": "step" in vars(pipe.scheduler),
        "pipe": sorted(vars(pipe)),
        "weights": {name: t.data_ptr() for name, t in pipe.unet.state_dict().items()},
        "grads": [p.requires_grad for p in pipe.unet.parameters()],
        "config": str(pipe.unet.config) + str(pipe.scheduler.config),
        "rng": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
    }


@steering
def test_neutral_settings_are_bit_identical_to_the_plain_pipeline(
    method: type[Method], pipe: Any, plain: torch.Tensor
) -> None:
    with Guide(pipe, make(method, **method.neutral)) as guide:
        assert torch.equal(tiny.call(pipe), plain)
    assert guide.report.forwards == 0


@steering
def test_it_changes_the_picture(method: type[Method], pipe: Any, plain: torch.Tensor) -> None:
    with Guide(pipe, make(method)):
        out = tiny.call(pipe)
    assert out.shape == plain.shape and out.dtype == plain.dtype and out.isfinite().all()
    assert (out - plain).abs().max() > 1e-4


def test_capturing_maps_changes_nothing(pipe: Any, plain: torch.Tensor) -> None:
    with Guide(pipe, CaptureMaps()) as guide:
        assert torch.equal(tiny.call(pipe), plain)
    assert set(guide.maps) == set(tiny.PROMPT.split())


@every
def test_nothing_is_left_after_a_run(method: type[Method], pipe: Any, plain: torch.Tensor) -> None:
    before = state(pipe)
    with Guide(pipe, make(method)):
        tiny.call(pipe)
    after = state(pipe)
    # the scheduler and the pipeline keep what their own run set
    assert {k: v for k, v in after.items() if k not in ("scheduler", "pipe")} == {
        k: v for k, v in before.items() if k not in ("scheduler", "pipe")
    }
    assert not {"step", "set_timesteps"} & set(vars(pipe.scheduler)) and "encode_prompt" not in vars(pipe)
    assert torch.equal(tiny.call(pipe), plain)


@every
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["callback", "denoiser"])
def test_nothing_is_left_after_an_error(
    method: type[Method], error: type[BaseException], where: str, plain: torch.Tensor
) -> None:
    pipe = tiny.sd()
    before = state(pipe)

    def fail(*_: Any, **__: Any) -> Any:
        raise error("stop here")

    handle = pipe.unet.up_blocks[1].resnets[0].register_forward_pre_hook(fail) if where == "denoiser" else None
    options = {"callback_on_step_end": fail} if where == "callback" else {}
    with pytest.raises(error, match="stop here"), Guide(pipe, make(method)):
        tiny.call(pipe, **options)
    if handle is not None:
        handle.remove()
    after = state(pipe)
    kept = ("processors", "hooks", "step", "weights", "grads", "config", "rng", "numpy")
    assert {k: after[k] for k in kept} == {k: before[k] for k in kept}
    assert torch.equal(tiny.call(pipe), plain)


@every
def test_the_same_seed_gives_the_same_picture(method: type[Method], pipe: Any) -> None:
    with Guide(pipe, make(method)):
        assert torch.equal(tiny.call(pipe), tiny.call(pipe))


@steering
def test_it_works_in_company(method: type[Method], pipe: Any) -> None:
    other = PAG(scale=2.0, layers="down")
    with Guide(pipe, make(method), other) as guide:
        both = tiny.call(pipe)
    with Guide(pipe, make(method)):
        alone = tiny.call(pipe)
    assert both.isfinite().all() and not torch.equal(both, alone)
    assert not guide.explain(steps=4).refusals


@steering
def test_a_batch_gives_what_single_runs_give(method: type[Method], pipe: Any) -> None:
    """Two prompts, two pictures each: every picture is what it would be alone."""
    prompts = [tiny.PROMPT, "a blue square below a red circle"]
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    with Guide(pipe, make(method)):
        together = tiny.call(pipe, prompts, latents=noise, num_images_per_prompt=2)
        for i in range(4):
            alone = tiny.call(pipe, prompts[i // 2], latents=noise[i : i + 1])
            assert (together[i] - alone[0]).abs().max() < 2e-4


@every
def test_hooks_of_others_are_kept_and_seen(method: type[Method], pipe: Any) -> None:
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    with Guide(pipe, make(method)):
        tiny.call(pipe)
    assert len(calls) == 4, "only the pipeline's own calls are hooked"
    tiny.call(pipe)
    assert len(calls) == 8
    handle.remove()


@every
@given(data=st.data())
def test_every_knob_refuses_what_is_outside_its_range(method: type[Method], data: st.DataObject) -> None:
    knobs = [k for k in method.params() if k.low is not None and k.name != "window"]
    if not knobs:
        return
    knob = data.draw(st.sampled_from(knobs))
    assert knob.low is not None and knob.high is not None
    bad = data.draw(
        st.one_of(st.floats(max_value=knob.low - 1e-3), st.floats(min_value=knob.high + 1e-3), st.just(float("nan")))
    )
    value: Any = bad
    if knob.type is int and bad == bad:
        value = math.floor(max(bad, -1e9)) if bad < knob.low else math.ceil(min(bad, 1e9))
    if "tuple" in str(knob.type):
        value = (value,)
    with pytest.raises(ParamError, match=f"{method.__name__}.{knob.name}"):
        make(method, **{knob.name: value})


@every
def test_every_knob_says_what_it_does(method: type[Method]) -> None:
    for knob in method.params():
        assert len(knob.help) > 10 and knob.name.isidentifier()
        if knob.type in (int, float):
            assert knob.low is not None and knob.high is not None


@every
def test_explain_names_the_sites(method: type[Method], pipe: Any) -> None:
    plan = Guide(pipe, make(method)).explain(steps=10)
    names = {n for n, _ in pipe.unet.named_modules()}
    looks = [verb for verb in ("attend", "block", "watch") if make(method).asks(verb)]
    assert bool(plan.sites[method.name()]) == bool(looks) and set(plan.sites[method.name()]) <= names
    assert method.__name__ in str(plan) and not plan.refusals
