"""The pipeline that a bench runs on."""

from pathlib import Path
from typing import Any

from diffguide.errors import ParamError
from diffguide.pipelines import source


def load(model: Any, device: str | None = None, dtype: str | None = None) -> tuple[Any, str]:
    """The pipeline and what to call it. A pipeline is taken as it is, moved only if a device or dtype is named.

    Raises:
        ModelError: nothing of that name can be loaded.
        ParamError: the dtype or device is unknown.
    """
    if isinstance(model, str | Path):
        return source.load(model, dtype or "float32", device), Path(model).name or str(model)
    if dtype is not None and dtype not in source.DTYPES:
        raise ParamError(f"dtype = {dtype!r} is not one of {', '.join(source.DTYPES)}")
    if device is not None or dtype is not None:
        model.to(device=source.usable(device) if device else None, dtype=source.DTYPES[dtype] if dtype else None)
    return model, type(model).__name__
