"""Methods in place of classifier-free guidance: APG and CFG-Zero*."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from hypothesis import given
from hypothesis import strategies as st
from test_family_pipelines import call
from tiny_pipes import PIPES, built
from torch import Tensor

from diffguide.combination import recombined
from diffguide.errors import AttachError, SteeringError
from diffguide.guide import Guide
from diffguide.method import Context
from diffguide.processors import APG, PAG, CFGZeroStar
from diffguide.refusals import before

NOW = before([], {}, (), 10)
strengths = st.floats(0, 9).filter(lambda g: abs(g - 1) > 1e-2)


def predictions(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    cond, uncond = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return {"cond": cond, "uncond": uncond}


def told(guidance: float, step: int = 5, flow: bool = True, **more: Any) -> Context:
    return replace(NOW, guidance=guidance, step=step, flow=flow, **more)


def guided(pred: dict[str, Tensor], g: float) -> Tensor:
    return pred["uncond"] + g * (pred["cond"] - pred["uncond"])


@given(st.integers(0, 99), strengths, st.floats(0, 2), st.sampled_from([0.0, 3.0, 15.0, 1e3]))
def test_apg_is_its_equation(seed: int, g: float, eta: float, limit: float) -> None:
    pred = predictions(seed)
    found = APG(eta=eta, momentum=0.0, limit=limit).combine(pred, told(g))
    for c, u, e in zip(pred["cond"], pred["uncond"], found, strict=True):
        d = (c - u).flatten()
        if limit:
            d = d * min(1.0, limit / float(d.norm()))
        along = c.flatten() * (d @ c.flatten()) / (c.flatten() @ c.flatten())
        assert torch.allclose(e.flatten(), c.flatten() + (g - 1) * (d - along + eta * along), atol=1e-12)


@given(st.integers(0, 99), strengths)
def test_apg_that_keeps_everything_is_classifier_free_guidance(seed: int, g: float) -> None:
    pred = predictions(seed)
    found = APG(eta=1.0, momentum=0.0, limit=1e4).combine(pred, told(g))
    assert torch.allclose(found, guided(pred, g), atol=1e-12)


def test_apg_carries_its_difference_on_as_diffusers_does() -> None:
    """Its guider in the paper's form takes the conditional prediction and the scale less one."""
    context = told(4.0)
    witness = AdaptiveProjectedGuidance(
        guidance_scale=3.0,
        adaptive_projected_guidance_momentum=-0.4,
        adaptive_projected_guidance_rescale=9.0,
        eta=0.3,
        use_original_formulation=True,
    )
    witness.momentum_buffer = MomentumBuffer(-0.4)
    witness._step, witness._num_inference_steps = 1, 10
    for seed in range(3):
        pred = predictions(seed)
        ours = APG(eta=0.3, momentum=-0.4, limit=9.0).combine(pred, context)
        assert torch.allclose(ours, witness.forward(pred["cond"], pred["uncond"]).pred, atol=1e-10)


@given(st.integers(0, 99), strengths)
def test_cfg_zero_star_is_its_equation(seed: int, g: float) -> None:
    pred = predictions(seed)
    found = CFGZeroStar().combine(pred, told(g))
    witness = ClassifierFreeZeroStarGuidance(guidance_scale=g, zero_init_steps=1)
    witness._step, witness._num_inference_steps = 5, 10
    # it adds 1e-8 to the squared length
    assert torch.allclose(found, witness.forward(pred["cond"], pred["uncond"]).pred, atol=1e-6)
    for c, u, e in zip(pred["cond"], pred["uncond"], found, strict=True):
        a = float((c * u).sum() / (u * u).sum())
        assert torch.allclose(e, a * u + g * (c - a * u), atol=1e-12)
    alike = CFGZeroStar().combine({"cond": pred["cond"], "uncond": pred["cond"]}, told(g))
    assert torch.allclose(alike, pred["cond"], atol=1e-12)


@given(st.floats(0.001, 0.5), st.integers(1, 60))
def test_the_first_steps_are_left_out(zero: float, steps: int) -> None:
    method, pred = CFGZeroStar(zero=zero), predictions()
    out = [not method.combine(pred, told(3.0, step=i, steps=steps)).any() for i in range(steps)]
    count = sum(out)
    assert out == sorted(out, reverse=True) and count >= 1
    assert count == 1 or zero * steps - 1e-6 <= count < zero * steps + 1


@given(st.integers(0, 99), strengths, st.sampled_from([1, -1]), st.booleans())
def test_the_strength_is_read_off(seed: int, g: float, sign: int, term: bool) -> None:
    pred = predictions(seed, torch.float32)
    d = 0.1 * torch.ones_like(pred["cond"]) if term else None
    output = sign * (guided(pred, g) + (0.1 if term else 0.0))
    context = told(0.0)
    out = recombined(output, pred, d, APG(eta=1.0, momentum=0.0, limit=1e4), context)
    assert context.guidance == pytest.approx(g, abs=1e-4) and (out - output).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("g", [0.5, 1.5, 4.0, 7.5, 15.0])
def test_the_strength_is_read_off_in_half_precision(dtype: torch.dtype, g: float) -> None:
    pred = {name: p.to(dtype) for name, p in predictions(7, torch.float32).items()}
    context = told(0.0)
    out = recombined(guided(pred, g), pred, None, CFGZeroStar(zero=0.0), context)
    assert out.dtype == dtype and context.guidance == pytest.approx(g, rel=0.01)


@given(st.integers(0, 99), strengths, st.floats(0.1, 1))
def test_another_guidance_than_the_classifier_free_is_refused(seed: int, g: float, rescale: float) -> None:
    pred = predictions(seed, torch.float32)
    plain = guided(pred, g)
    spread = plain * (pred["cond"].std((1, 2, 3), keepdim=True) / plain.std((1, 2, 3), keepdim=True))
    output = rescale * spread + (1 - rescale) * plain
    if (output - plain).norm() > 1e-2 * plain.norm():
        with pytest.raises(SteeringError, match=r"APG takes the place of .* guidance_rescale"):
            recombined(output, pred, None, APG(), told(0.0))


# On pipelines.

KEEPS = {"eta": 1.0, "momentum": 0.0, "limit": 1e4}  # not neutral, and yet what the pipeline does
NORMALISED = "APG takes the place of classifier-free guidance, whose length .* normalises"
REFUSED = {
    "lumina2": (AttachError, NORMALISED),
    "qwen_image": (AttachError, NORMALISED),
    "z_image_normalised": (AttachError, NORMALISED),
    "flux": (SteeringError, "of which this run has none"),
    "flux2": (SteeringError, "of which this run has none"),
    "sd3_skipping_layers": (SteeringError, "makes something else of its two predictions"),
}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
@pytest.mark.parametrize("name", sorted(PIPES))
def test_every_kind_of_pipeline_is_combined_anew_or_refused(name: str) -> None:
    pipe, given_, _ = built(name)
    plain: Any = call(pipe, given_)
    if name in REFUSED:
        error, words = REFUSED[name]
        with pytest.raises(error, match=words), Guide(pipe, APG()):
            call(pipe, given_)
        assert torch.equal(call(pipe, given_), plain)
        return
    with Guide(pipe, APG(**KEEPS)):
        assert (call(pipe, given_) - plain).abs().max() < 1e-5 * plain.abs().max().clamp_min(1)
    with Guide(pipe, APG()):
        out = call(pipe, given_)
    assert out.isfinite().all() and (out - plain).abs().max() > 1e-3


@pytest.mark.parametrize("make", [tiny.sd, tiny.sd3])
def test_with_a_weak_pass(make: Any) -> None:
    """PAG's term stays as it is: what APG keeps whole is PAG alone."""
    pipe = make()
    with Guide(pipe, PAG(layers="all")):
        alone = tiny.call(pipe)
    with Guide(pipe, PAG(layers="all"), APG(**KEEPS)):
        assert (tiny.call(pipe) - alone).abs().max() < 1e-4
    with Guide(pipe, PAG(layers="all"), APG()):
        assert (tiny.call(pipe) - alone).abs().max() > 1e-2


def test_left_out_steps_leave_the_latents() -> None:
    pipe, seen = tiny.sd3(), []
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"])
        return tensors

    with Guide(pipe, CFGZeroStar(zero=0.5)):
        tiny.call(pipe, latents=noise, callback_on_step_end=keep)
    assert [torch.equal(z, noise) for z in seen] == [True, True, False, False]


def test_what_cannot_be_is_refused_by_name() -> None:
    pipe = tiny.sd()
    with pytest.raises(AttachError, match="APG and CFGZeroStar both take the place"), Guide(pipe, APG(), CFGZeroStar()):
        pass
    with pytest.raises(SteeringError, match=r"CFGZeroStar .* set zero=0"), Guide(pipe, CFGZeroStar()):
        tiny.call(pipe)
    with pytest.raises(SteeringError, match=r"APG .* guidance_scale"), Guide(pipe, APG()):
        tiny.call(pipe, guidance_scale=1.0)
    with pytest.raises(SteeringError, match=r"APG .* leave out guidance_rescale"), Guide(pipe, APG()):
        tiny.call(pipe, guidance_rescale=0.7)
