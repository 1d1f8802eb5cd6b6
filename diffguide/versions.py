"""Which releases of the libraries this one was made for, and what to say where others are installed."""

import functools
import importlib.metadata
import re
import warnings

# as in pyproject.toml; diffusers moves its internals in minor releases, so its bound is one minor wide
NEEDED = {
    "torch": ">=2.10",
    "diffusers": ">=0.42.1,<0.43",
    "transformers": ">=5.17,<6",
    "accelerate": ">=1.10,<2",
    "safetensors": ">=0.8,<1",
    "numpy": ">=2.0,<3",
    "pillow": ">=11",
    "pydantic": ">=2.10,<3",
    "tqdm": ">=4.66",
}


def installed(name: str) -> str | None:
    """The installed version of a library, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def strange(name: str) -> str:
    """What to say, with the fix, of an installed version outside the bounds; empty where there is nothing to say.

    A development version counts as the release it leads to.
    """
    found = installed(name)
    if found is None or name not in NEEDED or all(_holds(found, bound) for bound in NEEDED[name].split(",")):
        return ""
    return f"{name} {found} is not {NEEDED[name]}, which this diffguide needs: pip install '{name}{NEEDED[name]}'"


def _holds(found: str, bound: str) -> bool:
    numbers = _numbers(found)
    wanted = _numbers(bound)
    return numbers >= wanted if bound.startswith(">=") else numbers < wanted


def _numbers(version: str) -> tuple[int, ...]:
    """The release alone, without zeros at its end: (2, 15) for "2.15.0+cpu"."""
    release = re.match(r"[<>=]*((?:\d+\.)*\d+)", version)
    parts = [int(n) for n in release[1].split(".")] if release else []
    while parts and not parts[-1]:
        parts.pop()
    return tuple(parts)


@functools.cache
def warn_once() -> None:
    """Warn, the first time, of a diffusers that this diffguide does not know."""
    if text := strange("diffusers"):
        warnings.warn(f"{text}; attention modules may have moved", stacklevel=3)
