"""A knob of a method: its type, range and meaning, and how it is read from a command line."""

import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from diffguide.errors import ParamError

Window = tuple[float, float]


@dataclass(frozen=True)
class Param:
    """One knob: name, type, default, range and meaning."""

    name: str
    type: Any
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None

    @property
    def range(self) -> str:
        if self.choices:
            return ", ".join(map(str, self.choices))
        if self.low is None and self.high is None:
            return ""
        return f"[{'' if self.low is None else f'{self.low:g}'}, {'' if self.high is None else f'{self.high:g}'}]"

    def check(self, owner: str, value: Any) -> None:
        """Raise ParamError unless the value is of the type and in the range."""
        numbers: list[float] = [
            v
            for v in (value if isinstance(value, tuple) else (value,))
            if isinstance(v, int | float) and not isinstance(v, bool)
        ]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):  # a whole number may be too large to ask
                raise ParamError(f"{owner}.{self.name} = {value} is not finite: {self.help}")
            if not low <= number <= high:
                raise ParamError(f"{owner}.{self.name} = {value} is outside {self.range}: {self.help}")
        if self.choices and value not in self.choices:
            raise ParamError(f"{owner}.{self.name} = {value!r} is not one of {self.range}: {self.help}")
        if self.type is Window or self.name == "window":
            if not (isinstance(value, tuple) and len(value) == len(numbers) == 2 and value[0] <= value[1]):
                raise ParamError(f"{owner}.{self.name} = {value} is not a pair (start, stop) with start <= stop")
        elif not _is(value, self.type):
            raise ParamError(f"{owner}.{self.name} = {value!r} is not {_name(self.type)}: {self.help}")

    def parse(self, owner: str, text: str) -> Any:
        """The value written as `text` on a command line; lists are separated by commas, windows by a colon."""
        kinds = [a for a in typing.get_args(self.type) if a is not types.NoneType] or [self.type]
        if text.lower() == "none" and types.NoneType in typing.get_args(self.type):
            return None
        kind = (
            kinds[0]
            if isinstance(self.type, types.UnionType) or typing.get_origin(self.type) is typing.Union
            else self.type
        )
        try:
            if self.name == "window":
                start, stop = text.split(":")
                return float(start), float(stop)
            if typing.get_origin(kind) is tuple:
                item = typing.get_args(kind)[0]
                return tuple(item(part.strip()) for part in text.split(",") if part.strip())
            if kind is bool:
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
            return kind(text)
        except (ValueError, KeyError):
            raise ParamError(f"{owner}.{self.name} = {text!r} is not {_name(self.type)}: {self.help}") from None


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(_is(value, k) for k in typing.get_args(kind))
    origin = typing.get_origin(kind)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(v, typing.get_args(kind)[0]) for v in value)
    if origin is Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Any or origin is not None or not isinstance(kind, type):
        return True
    return isinstance(value, kind)


def _name(kind: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    if kind == Window:
        return "a pair start:stop such as 0:0.3, in Python (0.0, 0.3)"
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each of its items {_name(typing.get_args(kind)[0])}, even if it is one"
    return names.get(kind, str(kind).replace("typing.", ""))


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    **options: Any,
) -> Any:
    """A field of a method that becomes a flag, a slider, a table row and a range check."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices}, **options)
