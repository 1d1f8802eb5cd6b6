"""What takes the place of classifier-free guidance: the pipeline combines two predictions, a method combines them anew.

The pipeline goes on to combine as it does. What it made is compared with its two predictions, which tells how strongly
it guided; the method's combination then takes its place at the scheduler's input. So no pipeline is asked how it does.
"""

import torch
from torch import Tensor

from diffguide.errors import SteeringError
from diffguide.method import Context, Method

SLACK = 8.0  # of a rounding step of the type the pipeline combines in


def recombined(
    output: Tensor, pred: dict[str, Tensor], term: Tensor | None, method: Method, context: Context
) -> Tensor:
    """The scheduler's input with the method's combination of the predictions `pred` in place of the pipeline's.

    `term` is what was added to every prediction. Raises SteeringError where there is no classifier-free guidance, or
    another kind of it.
    """
    name = type(method).__name__
    if "uncond" not in pred:
        raise SteeringError(
            f"{name} takes the place of classifier-free guidance, of which this run has none; call the pipeline with "
            "guidance_scale (FLUX, Qwen-Image: true_cfg_scale and a negative prompt) above 1"
        )
    cond, uncond = (_like(output, pred[branch]) for branch in ("cond", "uncond"))
    d = torch.zeros_like(cond) if term is None else _like(output, term)
    turned, strength = _read(output, cond + d, uncond + d, name)
    context.guidance = strength
    return (turned * (method.combine({"cond": cond, "uncond": uncond}, context) + d)).to(output.dtype)


def _like(output: Tensor, prediction: Tensor) -> Tensor:
    """A prediction in float32 without the variances that some models predict beside it."""
    if prediction.ndim == output.ndim and prediction.shape[1] == 2 * output.shape[1]:
        prediction = prediction[:, : output.shape[1]]
    return prediction.float()


def _read(output: Tensor, cond: Tensor, uncond: Tensor, name: str) -> tuple[int, float]:
    """Sign and strength g of what is, up to its sign, uncond + g (cond - uncond)."""
    difference = cond - uncond
    length = difference.square().sum()
    for sign in (1, -1):
        turned = sign * output.float()
        g = float((turned - uncond).mul(difference).sum() / length) if length > 0 else 1.0
        rest = turned - uncond - g * difference
        fine = torch.finfo(output.dtype).eps * SLACK * (uncond.norm() + abs(g) * difference.norm())
        if rest.norm() <= fine:
            return sign, g
    raise SteeringError(
        f"{name} takes the place of classifier-free guidance, but this pipeline makes something else of its two "
        "predictions; leave out guidance_rescale, skipped layers and the like"
    )
