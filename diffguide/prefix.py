"""A weak pass begins where it first differs: what modules before that gave in the pipeline's own call serves again.

Both passes have the same latents and words in the conditional rows, so up to the first perturbed attention they are
one and the same.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffguide.family import bare, cut_rows
from diffguide.site import Site


class Prefix:
    """Outputs of blocks and of their parts, the conditional rows alone, as the pipeline's own call makes them.

    Args:
        model: the denoiser.
        sites: all its attention modules.
        changed: for each weak pass, by number, the modules that it changes, by name.
    """

    def __init__(
        self, model: nn.Module, sites: Collection[Site], changed: Mapping[int, Mapping[str, nn.Module]]
    ) -> None:
        names = {name for some in changed.values() for name in some}
        self.parts = parts(bare(model), {site.name for site in sites}, names)
        self.ends = {n: set(some.values()) for n, some in changed.items()}
        self.outputs: dict[nn.Module, Any] = {}
        self.before: dict[int, list[nn.Module]] = {}  # parts that had ended when the first changed module began
        self.usable = True

    @contextlib.contextmanager
    def recorded(self, index: Tensor, rows: int) -> Iterator[None]:
        """Keep what parts give in the rows `index` of a call of so many rows, while a weak pass has use for it."""

        def begins(module: nn.Module, *_: Any) -> None:
            for number, ends in self.ends.items():
                if module in ends and number not in self.before:
                    self.before[number] = list(self.outputs)

        def ended(part: nn.Module, _: Any, out: Any) -> None:
            if part in self.outputs:  # run twice: which of the two is meant, nobody knows
                self.usable = False
            elif len(self.before) < len(self.ends):
                self.outputs[part] = own(cut_rows(out, index, rows), out)

        handles = [m.register_forward_pre_hook(begins) for m in set().union(*self.ends.values())]
        handles += [m.register_forward_hook(ended) for m in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def replayed(self, number: int) -> Iterator[None]:
        """The parts before the first perturbed module of this weak pass give what they gave."""
        kept = self.before.get(number, []) if self.usable else []
        plain = {part: vars(part).get("forward") for part in kept}
        try:
            for part in kept:
                part.forward = lambda *_, out=self.outputs[part], **__: out  # type: ignore[method-assign]
            yield
        finally:
            for part, forward in plain.items():
                if forward is None:
                    vars(part).pop("forward", None)
                else:
                    part.forward = forward  # type: ignore[method-assign]


def parts(model: nn.Module, sites: Collection[str], changed: Collection[str]) -> list[nn.Module]:
    """What may be taken as a whole: the blocks of a denoiser, and of those with a changed module the parts in lists."""
    found: list[nn.Module] = []

    def has(path: str, names: Collection[str]) -> bool:
        return any(name.startswith(f"{path}.") for name in names)

    def descend(module: nn.Module, path: str, top: bool) -> None:
        for name, child in module.named_children():
            here = f"{path}{name}"
            listed = isinstance(child, nn.ModuleList) and (not top or has(here, sites))
            for own_path, part in (
                [(f"{here}.{n}", part) for n, part in child.named_children()] if listed else [(here, child)]
            ):
                if (listed or has(own_path, sites)) and own_path not in sites:
                    found.append(part)
                if has(own_path, changed):
                    descend(part, f"{own_path}.", False)

    descend(model, "", True)
    return found


def own(value: Any, of: Any) -> Any:
    """Tensors of one's own: what comes after a block may write into its output."""
    if isinstance(value, Tensor):
        return value.clone() if value is of else value
    if isinstance(value, list | tuple):
        return type(value)(own(v, o) for v, o in zip(value, of, strict=True))
    if isinstance(value, dict):
        return {k: own(v, of[k]) for k, v in value.items()}
    return value
