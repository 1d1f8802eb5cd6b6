"""Strangers' files come in small and checked, ours go out whole or not at all."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from diffguide.errors import DiffguideError, OutputError

TEXT_LIMIT = 16 * 2**20  # bytes of a layout or a recipe


def explain(error: ValidationError, where: str = "") -> str:
    """The first fault pydantic found as one line, `field: what is wrong, got what`, the field below `where`."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in fault["loc"] if step != "__root__"]
    field = (where + "".join(steps)).lstrip(".")
    given = repr(fault["input"])
    if fault["type"] == "extra_forbidden":
        text = "unknown field"
    elif fault["type"] == "missing":
        text = "missing"
    elif fault["type"] == "value_error":
        text = str(fault.get("ctx", {}).get("error"))
    else:
        text = f"{fault['msg'][0].lower()}{fault['msg'][1:]}, got {given if len(given) <= 60 else given[:57] + '...'}"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return (f"{field}: {text}" if field else text) + more


def check_version(version: Any, known: int) -> None:
    """Raise ValueError unless `version`, as read from a file, is the integer `known`."""
    if type(version) is int and version > known:
        raise ValueError(f"{version} is newer than {known}, the newest known here; upgrade diffguide")
    if type(version) is not int or version != known:
        raise ValueError(f'expected {known}, got {version!r:.60}; write "version": {known}')


def is_text(value: Any, limit: int) -> bool:
    """Whether `value` is text that UTF-8 can hold, of at most `limit` characters."""
    return isinstance(value, str) and len(value) <= limit and not any("\ud800" <= c <= "\udfff" for c in value)


def read_text(path: str | Path, error: type[DiffguideError]) -> str:
    """The UTF-8 text of a file of at most 16 MiB, else `error` with one line that starts with the path."""
    try:
        with open(path, "rb") as file:
            data = file.read(TEXT_LIMIT + 1)
        if len(data) > TEXT_LIMIT:
            raise error(f"{path}: larger than {TEXT_LIMIT >> 20} MiB")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise error(f"{path}: not UTF-8 text (byte {fault.start})") from None
    except (OSError, ValueError) as fault:
        raise error(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}") from None


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; on any failure nothing is left behind.

    Raises OutputError where the folder is missing or closed or the disk refuses; other errors of `write` pass through.
    """
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r}: not the name of a file")
    part = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")
    made = False
    try:
        with open(
            os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666), "wb"
        ) as file:
            made = True
            write(file)
        os.replace(part, path)
        made = False
    except OSError as fault:
        advice = "; create the folder first" if not path.parent.is_dir() else ""
        raise OutputError(f"cannot write {path}: {fault.strerror or fault}{advice}") from None
    finally:
        if made:
            part.unlink(missing_ok=True)
