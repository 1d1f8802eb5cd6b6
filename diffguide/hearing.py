"""What a pipeline is told in words: its functions are listened to while a guide is attached."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from diffguide.family import Family
from diffguide.method import Method
from diffguide.second_prompt import SecondPrompt, asking


class Hearing:
    """The words of a call of the pipeline, from when it encodes them until its first denoiser call.

    Args:
        pipe: the pipeline.
        family: of its denoiser.
        told: prompts that embeddings were made from, in place of what is heard.
        methods: one of them may have a second prompt, which is encoded as the first is.
    """

    def __init__(self, pipe: Any, family: Family, told: list[str] | None, methods: list[Method]) -> None:
        self.pipe, self.family, self.told, self.methods = pipe, family, told, methods
        self.encoded: dict[str, Any] | None = None
        self.second: SecondPrompt | None = None

    def listen(self, undo: contextlib.ExitStack) -> None:
        """Put ears on the pipeline's functions; `undo` takes them off."""
        self._wrap(self.family.encoder, undo, self._hear, self._hear_states)
        self._wrap("check_inputs", undo, self._forget)  # last, so that it comes first

    def take(self) -> tuple[list[str] | None, dict[str, Any], SecondPrompt | None]:
        """Prompts, arguments of the function that encoded them, and the second prompt; forgets them."""
        found = self.told or self._prompts(), self.encoded or {}, self.second
        self.encoded = self.second = None
        return found

    def _wrap(
        self,
        name: str,
        undo: contextlib.ExitStack,
        before: Callable[[dict[str, Any]], None],
        after: Callable[..., None] | None = None,
    ) -> None:
        """Tell `before` the arguments of a function, by name, and `after` the function, them and what it gave."""
        plain = getattr(self.pipe, name, None)
        if plain is None:
            return

        @functools.wraps(plain)
        def listening(*args: Any, **kwargs: Any) -> Any:
            given = dict(inspect.signature(plain).bind(*args, **kwargs).arguments)
            before(given)
            out = plain(*args, **kwargs)
            if after is not None:
                after(plain, given, out)
            return out

        own = vars(self.pipe).get(name)
        vars(self.pipe)[name] = listening
        undo.callback(lambda: vars(self.pipe).pop(name) if own is None else vars(self.pipe).update({name: own}))

    def _forget(self, _: dict[str, Any]) -> None:
        """A call of the pipeline begins."""
        self.encoded = self.second = None

    def _hear(self, given: dict[str, Any]) -> None:
        """The first text that a call encodes is the prompt; a second one is what to avoid.

        Lists are copied: a pipeline may write its template into the one it was given.
        """
        if self.encoded is None:
            self.encoded = {name: list(v) if isinstance(v, list) else v for name, v in given.items()}

    def _hear_states(self, encode: Callable[..., Any], given: dict[str, Any], out: Any) -> None:
        """The prompt's states are known: have a second prompt encoded likewise."""
        method = asking(self.methods)
        if method is not None and self.second is None and isinstance(method.second_prompt, str):
            self.second = SecondPrompt.encoded(encode, given, out, method.second_prompt, self.family)

    def _prompts(self) -> list[str] | None:
        """What the pipeline encoded, if it did."""
        for name in self.family.prompts:
            if prompt := (self.encoded or {}).get(name):
                return [prompt] if isinstance(prompt, str) else prompt
        return None
