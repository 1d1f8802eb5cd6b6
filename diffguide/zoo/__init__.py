"""The embedded models: where the trained folders lie. Nothing here imports torch."""

from pathlib import Path

from diffguide.errors import ModelError

MODELS = ("shapes-unet",)  # what this repository trains
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
