"""What keeps the editor to this machine and to one folder."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from diffguide.errors import OutputError, ParamError
from diffguide.heads import mentioned
from diffguide.recipe import MethodSpec

UPLOAD = "20mb"  # of one file
WAITING = 16  # jobs in the queue; who comes later is told that the editor is busy


def output_folder(path: str | Path) -> Path:
    """The folder of the pictures, made if need be: the one that is served, so nothing but pictures may lie there.

    Raises:
        OutputError: it cannot be made, or holds something else.
    """
    folder = Path(path).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(
            p.name for p in folder.iterdir() if p.suffix != ".png" or p.name.startswith(".") or p.is_symlink()
        )
    except OSError as fault:
        raise OutputError(f"cannot use {folder} for pictures: {fault.strerror or fault}") from None
    if strange:
        raise OutputError(
            f"{folder} holds {strange[0]!r}; whoever opens the editor can read its output folder, so it may hold "
            ".png files alone: name an empty folder with --output-dir"
        )
    return folder


def check_texts(specs: Sequence[MethodSpec]) -> None:
    """A parameter may name a preset, "@name", and no file, "@file.json": what comes over the net opens nothing here."""
    for spec in specs:
        for key, value in spec.params.items():
            for text in value if isinstance(value, list) else [value]:
                if any(not re.fullmatch(r"[\w-]+", name) for name in mentioned(str(text))):
                    raise ParamError(f"{spec.name}.{key} = {text!r:.60} names a file; an editor reads presets alone")


def logins(given: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of name and password from `NAME:PASSWORD`; raises ParamError, without repeating a password."""
    pairs = []
    for text in given:
        name, colon, password = text.partition(":")
        if not (name and colon and password):
            raise ParamError("--auth: expected NAME:PASSWORD, both not empty")
        pairs.append((name, password))
    return pairs


def check_host(host: str, auth: Sequence[object], anyone: bool) -> None:
    """Raise ParamError where other machines would get in without a password that was not waived on purpose."""
    if not is_loopback(host) and not auth and not anyone:
        raise ParamError(
            f"--host {host} lets other machines in; add --auth NAME:PASSWORD, or --no-auth if everyone who reaches "
            "this machine may use it"
        )


def check_port(host: str, port: int | None) -> None:
    """Raise ParamError where a port is no port, or another program has it."""
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise ParamError(f"--port {port} is not in [1, 65535]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was just given up is free
        try:
            own.bind((host.strip("[]"), port))
        except OSError as fault:
            why = fault.strerror or fault
            raise ParamError(f"--port {port} of {host}: {why}; name another, or none for a free one") from None


def admit(
    host: str, port: int | None, auth: Sequence[str], anyone: bool, output: str | Path
) -> tuple[list[tuple[str, str]], Path]:
    """Who may come in, and where pictures go; raises where an option of `serve` is wrong, before anything is loaded."""
    pairs = logins(auth)
    check_host(host, pairs, anyone)
    check_port(host, port)
    return pairs, output_folder(output)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
