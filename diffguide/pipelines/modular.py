"""A guider for Modular Diffusers: classifier-free guidance and the term of a method with a weak branch."""

import contextlib
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from diffguide import passes
from diffguide.describe import make
from diffguide.errors import AttachError
from diffguide.family import bare
from diffguide.method import Method
from diffguide.processors.steered import check_processor
from diffguide.registry import of_model

BEYOND = ("prepare", "loss", "observe", "edit", "block", "weaken")  # what a guider cannot do for a method


class WeakGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance, and what a method says of a third prediction, whose attention is its own.

    Put it into a modular pipeline by `pipe.update_components(guider=WeakGuidance("pag", {"scale": 3.0}))`. It is saved
    and loaded as every guider is: `save_pretrained`, `from_pretrained`, `from_config`.

    Args:
        method: name of a method with a weak branch that needs no words: `"pag"`.
        settings: its parameters by name; the defaults where they are not given. Its `window` says when it acts.
        guidance_scale: of the classifier-free part; the others are those of `ClassifierFreeGuidance`.

    Raises:
        ParamError: no method is called so, or a parameter is unknown or out of range.
        AttachError: the method needs more than a guider is told, or finds nothing to perturb.
    """

    _input_predictions = ["pred_cond", "pred_uncond", "pred_weak"]

    @register_to_config
    def __init__(
        self,
        method: str = "pag",
        settings: dict[str, Any] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.method = _made(method, settings or {})
        self._undo = contextlib.ExitStack()

    @property
    def num_conditions(self) -> int:
        return super().num_conditions + self._is_weak_enabled()

    @property
    def is_conditional(self) -> bool:
        return self._current() != "pred_uncond"

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The batches of a step, one for each prediction; the weak one has the arguments of the conditional one."""
        return [self._prepare_batch(data, name == "pred_uncond", name) for name in self._wanted()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        return [
            self._prepare_batch_from_block_state(input_fields, data, name == "pred_uncond", name)
            for name in self._wanted()
        ]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before each call of the denoiser: from here to `cleanup_models` its attention may be the method's."""
        super().prepare_models(denoiser)
        if self._current() == "pred_weak":
            disabled: Any = torch.compiler.disable
            before = denoiser.register_forward_pre_hook(disabled(self._steer), with_kwargs=True)
            after = denoiser.register_forward_hook(lambda *_: self._undo.close(), always_call=True)
            self._undo.callback(before.remove)
            self._undo.callback(after.remove)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._undo.close()

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_weak: Tensor | None = None
    ) -> GuiderOutput:
        """The combination of the predictions, [B, ...] each, with the method's term."""
        pred = pred_cond
        if pred_uncond is not None:
            start = pred_cond if self.use_original_formulation else pred_uncond
            pred = start + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_weak is not None:
            branches = {"cond": pred_cond, "weak": pred_weak}
            branches |= {} if pred_uncond is None else {"uncond": pred_uncond}
            pred = pred + self.method.shift(branches)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _is_weak_enabled(self) -> bool:
        acts = self.method.acts_at(self._step or 0, self._num_inference_steps or 1)
        return self._enabled and not self.method.inert and acts

    def _progress(self) -> float:
        return (self._step or 0) / max(1, self._num_inference_steps or 1)

    def _wanted(self) -> list[str]:
        """The predictions of this step, in the order of their calls."""
        wanted = {"pred_uncond": self._is_cfg_enabled(), "pred_weak": self._is_weak_enabled()}
        return [name for name in self._input_predictions if wanted.get(name, True)]

    def _current(self) -> str:
        """The prediction that the model was prepared for."""
        wanted = self._wanted()
        return wanted[min(max(self._count_prepared, 1), len(wanted)) - 1]

    def _steer(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        family = of_model(model)
        sites = family.sites(bare(model))
        chosen = self.method.where(sites)
        if not chosen:
            raise AttachError(f"{type(self.method).__name__} finds no site in this denoiser; change its layers")
        for site in chosen:
            check_processor(site)
        grids = {site: family.grid(site, family.size(args, kwargs)) for site in sites}
        words = family.words(args, kwargs)
        self._undo.enter_context(passes.eager(model))
        self._undo.enter_context(
            passes.weakened(family, self.method, sites, grids, words=words, progress=self._progress())
        )


def _made(name: str, settings: dict[str, Any]) -> Method:
    method = make(name, settings)
    if method.branch != "weak" or any(method.asks(verb) for verb in BEYOND):
        raise AttachError(
            f"{type(method).__name__} needs words, maps, blocks or latents, of which a guider is told nothing; use "
            f"Guide(pipe, {type(method).__name__}(...))"
        )
    return method
