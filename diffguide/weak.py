"""The weak pass: one more evaluation of the denoiser, made worse by a method."""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from diffguide import blocks, caches, passes, stepping
from diffguide.errors import SteeringError
from diffguide.family import Arguments, bare
from diffguide.generation import Generation
from diffguide.method import Context, Method
from diffguide.site import Site


class WeakPass:
    """What `Method.weaken` works with: the rows of one branch of the pipeline's call.

    Attributes:
        context: of the run and the step.
        base: whose rows they are, `"cond"` or, where the method wants them and the call has them, `"uncond"`.
        latents: of these rows, at the model's scale, [B, ...].
        prediction: what the model gave for them, [B, ...].
        rows: how many denoiser rows were evaluated so far, in pictures.
    """

    def __init__(self, run: Generation, number: int, method: Method, pred: dict[str, Tensor], call: Arguments) -> None:
        self.run, self.number, self.method = run, number, method
        self.context: Context = run.context(number)
        self.base = run.base(method)
        family, rows = run.family, run.family.latents(run.model, *call).shape[0]
        self.call = family.take(*call, torch.arange(rows)[run.rows[self.base]], rows)
        self.latents = family.latents(run.model, *self.call)
        self.prediction = pred[self.base]
        self.rows = 0

    def predict(self, latents: Tensor | None = None, model: nn.Module | None = None) -> Tensor:
        """The weak prediction, [B, ...]: with the method's attention and blocks, of other latents, by another model.

        Raises SteeringError where another model does not fit.
        """
        run, method = self.run, self.method
        args, kwargs = self.call
        if latents is not None:
            args, kwargs = run.family.with_latents(run.model, args, kwargs, latents.to(self.latents.dtype))
        self.rows += 1
        if model is not None:
            return self._of_another(model, (args, kwargs))
        bare_model = bare(run.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(passes.eager(run.model))
            if method.asks("attend"):
                words, progress = run.words, run.progress
                stack.enter_context(
                    passes.weakened(run.family, method, run.sites, run.grids, words=words, progress=progress)
                )
            if method.asks("block"):
                chosen = method.where(run.sites)
                stack.enter_context(
                    blocks.carried(
                        run.model,
                        run.family,
                        method.block,
                        chosen,
                        run.sites,
                        run.grids,
                        words=run.words,
                        step=run.step,
                    )
                )
            stack.enter_context(caches.apart(bare_model, f"weak {self.number}"))
            if run.prefix is not None and not method.asks("weaken"):
                stack.enter_context(run.prefix.replayed(self.number))
            return run.family.prediction(passes.evaluate(run.model, args, kwargs))

    def _of_another(self, model: nn.Module, call: Arguments) -> Tensor:
        y = self.run.family.prediction(passes.evaluate(model, passes.lent(call[0]), passes.lent(call[1])))
        if y.shape != self.prediction.shape:
            raise SteeringError(
                f"{type(self.method).__name__}: the weak model predicts {list(y.shape)}, the pipeline's "
                f"{list(self.prediction.shape)}; give one with the same latents"
            )
        return y

    def parts(self) -> tuple[Tensor, Tensor]:
        """The clean picture and the noise that the model sees in the latents, [B, ...] each, in float32."""
        return stepping.parts(self.run.pipe.scheduler, self.run.sigma, self.latents.float(), self.prediction.float())

    def whole(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Latents at the model's scale from a clean picture and noise."""
        a, b = stepping.shares(self.run.pipe.scheduler, self.run.sigma)
        return a * clean + b * noise


def predicted(run: Generation, number: int, method: Method, pred: dict[str, Tensor], *call: Any) -> tuple[Tensor, int]:
    """The prediction of a method's weak pass, and how many evaluations it took."""
    weak = WeakPass(run, number, method, pred, call)
    return method.weaken(weak), weak.rows


def changed(model: nn.Module, method: Method, sites: list[Site]) -> dict[str, nn.Module]:
    """The modules that a method's weak pass changes, by name."""
    chosen = method.where(sites)
    found: dict[str, nn.Module] = {site.name: site.module for site in chosen} if method.asks("attend") else {}
    if method.asks("block"):
        found |= {path: bare(model).get_submodule(path) for path in blocks.blocks(chosen)}
    return found
