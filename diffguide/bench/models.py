"""The pipeline that a bench runs on."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffguide import zoo
from diffguide.errors import ModelError, ParamError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(model: Any, device: str | None = None, dtype: str | None = None) -> tuple[Any, str]:
    """The pipeline and what to call it. A pipeline is taken as it is, moved only if a device or dtype is named.

    Raises:
        ModelError: nothing of that name can be loaded.
        ParamError: the dtype or device is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ParamError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if not isinstance(model, str | Path):
        pipe, label = model, type(model).__name__
    else:
        pipe, label = _read(str(model), DTYPES[dtype or "float32"]), Path(model).name or str(model)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if device is not None or dtype is not None:
            pipe.to(device=device, dtype=DTYPES[dtype] if dtype else None)
    except (RuntimeError, AssertionError) as fault:
        raise ParamError(f"device = {device!r} cannot be used: {fault}"[:300]) from None
    return pipe, label


def _read(name: str, dtype: torch.dtype) -> Any:
    source = str(zoo.path(name)) if name in zoo.names() else name
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as fault:
        first = str(fault).strip().splitlines()[0] if str(fault).strip() else type(fault).__name__
        raise ModelError(
            f"model {name!r} cannot be loaded: {first[:200]}; name an embedded model, a folder with model_index.json, "
            "or a hub id"
        ) from None
