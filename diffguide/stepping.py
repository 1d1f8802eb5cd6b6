"""The scheduler's side: when a step begins and ends, how its input is scaled, and what it does to a moved sample."""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WRAPPED = ("step", "set_timesteps")


class Stepper:
    """Wraps `step` and `set_timesteps` of one scheduler instance, and takes the wrapping away again.

    The wrappers are bound methods that go to the class's function, so that a deep copy of the scheduler steps itself;
    they keep the signature, which pipelines read to find `eta` and `generator`.
    """

    def __init__(
        self,
        scheduler: Any,
        begin: Callable[[], None],
        before: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        after: Callable[[Tensor], Tensor],
    ) -> None:
        """`begin` hears of new timesteps, `before` may change sample and model output of a step.

        `after` the sample that comes out.
        """
        self.scheduler = scheduler
        self.own = {name: vars(scheduler)[name] for name in WRAPPED if name in vars(scheduler)}
        own = self.own

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            plain = own["step"] if "step" in own else types.MethodType(type(self).step, self)
            bound = inspect.signature(plain).bind(*args, **kwargs)
            sample = bound.arguments["sample"]
            output = bound.arguments["model_output"]
            moved, bound.arguments["model_output"] = before(sample, output)
            bound.arguments["sample"] = moved
            with uncorrected(self) if moved is not sample else contextlib.nullcontext():
                out = plain(*bound.args, **bound.kwargs)
            if isinstance(out, tuple):
                return (after(out[0]), *out[1:])
            out.prev_sample = after(out.prev_sample)
            return out

        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            begin()
            plain = own["set_timesteps"] if "set_timesteps" in own else types.MethodType(type(self).set_timesteps, self)
            return plain(*args, **kwargs)

        for name, wrapper in (("step", step), ("set_timesteps", set_timesteps)):
            functools.update_wrapper(wrapper, getattr(type(scheduler), name))
            setattr(scheduler, name, types.MethodType(wrapper, scheduler))

    def remove(self) -> None:
        for name in WRAPPED:
            vars(self.scheduler).pop(name, None)
            if name in self.own:
                setattr(self.scheduler, name, self.own[name])


@contextlib.contextmanager
def uncorrected(scheduler: Any) -> Iterator[None]:
    """UniPC's corrector rebuilds the sample from the one before and would erase a move: leave it out for this step."""
    steps = getattr(scheduler, "disable_corrector", None)
    index = getattr(scheduler, "step_index", None)
    if steps is None:
        yield
        return
    scheduler.disable_corrector = [*steps, (index or 0) - 1]
    try:
        yield
    finally:
        scheduler.disable_corrector = steps


def uses_sample(scheduler: Any) -> bool:
    """Whether the coming step starts from the sample it is given.

    PNDM, Heun and the KDPM2s evaluate some steps twice, the second time from a stored sample: a move would be lost.
    """
    if not getattr(scheduler, "state_in_first_order", True):
        return False
    if hasattr(scheduler, "plms_timesteps"):  # PNDM
        if scheduler.config.skip_prk_steps or scheduler.counter >= len(scheduler.prk_timesteps):
            return scheduler.counter - len(scheduler.prk_timesteps if not scheduler.config.skip_prk_steps else ()) != 1
        return scheduler.counter % 4 == 0
    return True


def input_scale(scheduler: Any, timestep: Any) -> float:
    """The factor between the pipeline's latents and the model's input.

    1 / sqrt(1 + sigma²) for Euler and its kin, else 1.
    """
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    t = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
    return float(scheduler.scale_model_input(torch.ones(1, device=getattr(t, "device", None)), t))


def noise_level(scheduler: Any, timestep: Any) -> float:
    """Noise over signal, sigma, of the latents at this timestep."""
    scale = input_scale(scheduler, timestep)
    if scale < 1:
        return (scale**-2 - 1) ** 0.5
    t = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
    if not is_flow(scheduler):
        alphas = scheduler.alphas_cumprod
        a = float(alphas[min(max(round(t), 0), len(alphas) - 1)])
        return ((1 - a) / max(a, 1e-8)) ** 0.5
    share = t / scheduler.config.num_train_timesteps  # z = (1 - share) x + share noise
    return share / max(1 - share, 1e-4)


def is_flow(scheduler: Any) -> bool:
    """Whether the model predicts the velocity of a straight flow from the picture to noise."""
    return (
        getattr(scheduler, "alphas_cumprod", None) is None
        or scheduler.config.get("prediction_type") == "flow_prediction"
    )


def shares(scheduler: Any, sigma: float) -> tuple[float, float]:
    """How much of the latents, at the model's scale, is picture and how much noise, at noise over signal `sigma`."""
    if is_flow(scheduler):
        return 1 / (1 + sigma), sigma / (1 + sigma)
    length = (1 + sigma**2) ** 0.5
    return 1 / length, sigma / length


def parts(scheduler: Any, sigma: float, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The clean picture and the noise in latents `z`, at the model's scale, according to a prediction `y`."""
    a, b = shares(scheduler, sigma)
    if is_flow(scheduler):
        return z - b * y, z + a * y
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return a * z - b * y, b * z + a * y
    if kind == "sample":
        return y, (z - a * y) / b
    return (z - b * y) / a, y
