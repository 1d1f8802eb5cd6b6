"""Modular Diffusers: the guider that carries a weak branch, and a guide on a modular pipeline."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from probes import apart
from test_family_pipelines import Nudge, Pull, call
from tiny_models import MODELS
from tiny_pipes import PIPES
from torch import Tensor

from diffguide import Guide
from diffguide.errors import AttachError, ParamError
from diffguide.generation import steps_of
from diffguide.pipelines import WeakGuidance
from diffguide.processors import PAG

STEPS = 4
LAYERS = "transformer_blocks.1.*"


def modular(guider: Any) -> Any:
    """The denoising blocks of SD3 with the parts of the classic tiny pipeline."""
    pipe = StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=MODELS["sd3"](),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        guider=guider,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(**more: Any) -> dict[str, Any]:
    given = {k: v for k, v in PIPES["sd3"]()[1].items() if k != "guidance_scale"}
    given |= {"height": 64, "width": 96}  # without a decoder it takes 8 pixels for a latent cell
    return given | {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(2)} | more


def draw(pipe: Any, **more: Any) -> Tensor:
    return pipe(**inputs(**more), output="latents")


def classic(*methods: Any, **more: Any) -> Tensor:
    pipe, given = PIPES["sd3"]()
    pipe.set_progress_bar_config(disable=True)
    with Guide(pipe, *methods):
        return call(pipe, given, num_inference_steps=STEPS, **more)


def test_the_guider_is_the_guide_of_a_classic_pipeline() -> None:
    for window in ((0.0, 1.0), (0.25, 0.75)):
        wanted = classic(PAG(scale=3.0, layers=LAYERS, window=window))
        settings = {"scale": 3.0, "layers": LAYERS, "window": window}
        assert apart(draw(modular(WeakGuidance("pag", settings, guidance_scale=5.0))), wanted) < 2e-5
    assert apart(classic(), wanted) > 1e-3


def test_without_classifier_free_guidance_the_term_stays() -> None:
    wanted = classic(PAG(scale=3.0, layers=LAYERS), guidance_scale=1.0)
    guider = WeakGuidance("pag", {"scale": 3.0, "layers": LAYERS}, guidance_scale=1.0)
    assert guider.num_conditions == 2
    assert apart(draw(modular(guider)), wanted) < 2e-5


def test_neutral_settings_are_plain_guidance() -> None:
    plain = draw(modular(ClassifierFreeGuidance(guidance_scale=5.0)))
    assert torch.equal(draw(modular(WeakGuidance("pag", {"scale": 0.0}, guidance_scale=5.0))), plain)


def test_the_term_is_added_before_the_rescaling_as_in_the_pipelines() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, uncond, weak = (torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    guider = WeakGuidance("pag", {"scale": 2.0}, guidance_scale=5.0, guidance_rescale=0.7)
    wanted = rescale_noise_cfg(uncond + 5 * (cond - uncond) + 2 * (cond - weak), cond, guidance_rescale=0.7)
    assert torch.allclose(guider.forward(cond, uncond, weak).pred, wanted, atol=1e-6)
    original = WeakGuidance("pag", {"scale": 2.0}, guidance_scale=4.0, use_original_formulation=True)
    wanted = uncond + 5 * (cond - uncond) + 2 * (cond - weak)
    assert torch.allclose(original.forward(cond, uncond, weak).pred, wanted, atol=1e-5)


def test_a_guider_is_saved_and_loaded_with_its_method(tmp_path: Path) -> None:
    guider = WeakGuidance("pag", {"scale": 2.5, "layers": LAYERS, "window": (0.25, 0.75)}, guidance_scale=5.0)
    guider.save_pretrained(tmp_path)
    again = WeakGuidance.from_pretrained(tmp_path)
    assert again.method == guider.method == PAG(scale=2.5, layers=LAYERS, window=(0.25, 0.75))
    assert WeakGuidance.from_config(guider.config).method == guider.method
    assert guider.new(guidance_scale=3.0).guidance_scale == 3.0
    assert torch.equal(draw(modular(again)), draw(modular(guider)))


def test_nothing_is_left_in_the_denoiser_even_after_an_error() -> None:
    pipe = modular(WeakGuidance("pag", {"layers": "all"}, guidance_scale=5.0))
    before = dict(pipe.transformer.attn_processors)
    last = pipe.transformer.transformer_blocks[2].ff

    def fail(*_: Any) -> None:
        if type(pipe.transformer.transformer_blocks[0].attn.processor).__name__ == "SteeredProcessor":
            raise ZeroDivisionError

    handle = last.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        draw(pipe)
    handle.remove()
    assert all(pipe.transformer.attn_processors[name] is p for name, p in before.items())
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    draw(pipe)
    assert all(pipe.transformer.attn_processors[name] is p for name, p in before.items())


def test_a_method_that_a_guider_cannot_serve_is_refused() -> None:
    with pytest.raises(AttachError, match=r"AttendExcite needs words.*Guide\(pipe, AttendExcite"):
        WeakGuidance("attend-excite", {"words": ("a",)})
    with pytest.raises(ParamError, match="no method is called 'nothing'"):
        WeakGuidance("nothing")
    with pytest.raises(ParamError, match="pag has no parameter 'strength'"):
        WeakGuidance("pag", {"strength": 1.0})
    with pytest.raises(AttachError, match="PAG finds no site"):
        draw(modular(WeakGuidance("pag", {"layers": "nowhere"})))


def test_a_guide_on_a_modular_pipeline_is_one_on_a_classic_pipeline() -> None:
    """Its two hooks: the move before the first call of a step, the term in every prediction."""
    methods = (Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all"))
    wanted = classic(*methods)
    pipe = modular(ClassifierFreeGuidance(guidance_scale=5.0))
    plain = draw(pipe)
    with Guide(pipe, *methods) as guide:
        ours = draw(pipe)
    assert guide.report.backwards == 2 and guide.report.forwards == 2 + 3 * STEPS
    assert apart(ours, wanted) < 1e-4 and apart(plain, wanted) > 1e-3
    assert torch.equal(draw(pipe), plain)


def test_moves_go_with_any_guider_and_terms_with_those_that_leave_them_alone() -> None:
    pipe = modular(AdaptiveProjectedGuidance(guidance_scale=5.0))
    plain = draw(pipe)
    with Guide(pipe, Pull(window=(0.0, 0.5))):
        assert not torch.equal(draw(pipe), plain)
    with pytest.raises(
        AttachError, match=r"Nudge adds a term that AdaptiveProjectedGuidance would change.*WeakGuidance"
    ):
        Guide(pipe, Nudge()).attach()
    with pytest.raises(AttachError, match="without guidance_rescale"):
        Guide(modular(ClassifierFreeGuidance(guidance_rescale=0.5)), Nudge()).attach()


def test_a_run_from_a_picture_has_the_steps_that_are_left() -> None:
    """Modular pipelines do not say how many they take; the schedule's first index does."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    pipe = types.SimpleNamespace(scheduler=scheduler)
    assert steps_of(pipe) == 10
    scheduler.set_begin_index(6)
    assert steps_of(pipe) == 4
    scheduler.set_timesteps(10)
    assert steps_of(pipe) == 10
    pipe._num_timesteps = 7
    assert steps_of(pipe) == 7
