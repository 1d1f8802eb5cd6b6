"""The embedded models: where the trained folders lie. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from diffguide.errors import ModelError

MODELS = ("shapes-unet", "shapes-mmdit")  # what this repository trains
GUIDANCE_SCALE = 4.0  # at which the embedded models draw best
_FOLDER = Path(__file__).parent / "models"


def names() -> list[str]:
    """The embedded models whose trained folders are there."""
    return [name for name in MODELS if (_FOLDER / name / "model_index.json").is_file()]


def path(name: str = "shapes-unet") -> Path:
    """The folder of an embedded model, in the ordinary format of diffusers.

    Raises ModelError, with the fix, if there is no such model or it has not been trained yet.
    """
    if name not in MODELS:
        raise ModelError(f"no embedded model is called {name!r} (known: {', '.join(MODELS)})")
    if name not in names():
        raise ModelError(
            f"the embedded model {name} is not in this installation; train it with "
            f"`diffguide zoo train {name} --work FOLDER`, or name another model"
        )
    return _FOLDER / name


def left_out(folder: str | Path) -> dict[str, None]:
    """The components that a pipeline's folder names as missing, such as the T5 of a Stable Diffusion 3.

    diffusers 0.42 wants to hear of them again: pass them to `from_pretrained`. A hub id has none here.
    """
    index = Path(folder) / "model_index.json"
    named = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return {name: None for name, value in named.items() if value == [None, None]}


def no_zeros(pipe: Any) -> dict[str, int]:
    """Arguments of the call: where a pipeline leaves its T5 out, one token of zeros for it instead of 256."""
    return {"max_sequence_length": 1} if getattr(pipe, "text_encoder_3", 0) is None else {}
