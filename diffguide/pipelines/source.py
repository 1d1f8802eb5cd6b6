"""A pipeline from the name of an embedded model, a folder or a hub id; safetensors only, and no code of strangers."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from diffguide import zoo
from diffguide.errors import ModelError, ParamError
from diffguide.zoo.place import locate

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2-a": "KDPM2AncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def load(model: str | Path, dtype: str = "float32", device: str | None = None) -> Any:
    """A diffusers pipeline.

    Args:
        model: an embedded model, a folder in the format of diffusers, or a hub id such as `owner/name`.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        device: such as `"cpu"`, `"cuda"` or `"cuda:1"`; None takes the best there is.

    Raises:
        ModelError: there is no such model, or it cannot be read.
        ParamError: no such dtype or device here.
    """
    if dtype not in DTYPES:
        raise ParamError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    place = usable(device)
    source = locate(model)
    try:
        missing = zoo.left_out(source)
        pipe = DiffusionPipeline.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True, **missing)
    except (
        Exception
    ) as error:  # whatever a wrong folder can cause: broken JSON, unknown classes, weights that do not fit
        raise ModelError(f"{model} cannot be loaded: {_short(error)}") from error
    return pipe.to(place)


def usable(device: str | None) -> torch.device:
    """The device of this name, or the best one; raises ParamError if it is not there."""
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:  # torch has a different one for each kind of device
        raise ParamError(f"device = {device!r} cannot be used here: {_short(error)}") from None
    return place


def scheduler_class(name: str) -> Any:
    """The scheduler of this name; raises ParamError with the known ones."""
    if name not in SCHEDULERS:
        raise ParamError(f"no scheduler is called {name!r} (known: {', '.join(SCHEDULERS)})")
    return getattr(diffusers, SCHEDULERS[name])


def _short(error: Exception, most: int = 500) -> str:
    """The first sentence of an error of another library."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
