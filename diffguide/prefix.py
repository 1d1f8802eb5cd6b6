"""A weak pass begins where it first differs: what the blocks before that gave in the pipeline's own call serves again.

Both passes have the same latents and words in the conditional rows, so up to the first block with a perturbed module
they are one and the same.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from diffguide.family import bare, cut_rows
from diffguide.site import Site


class Prefix:
    """Outputs of blocks, the conditional rows alone, as the pipeline's own call makes them.

    Args:
        model: the denoiser.
        sites: all its attention modules.
        perturbed: for each weak pass, by number, the modules that it changes.
    """

    def __init__(self, model: nn.Module, sites: Collection[Site], perturbed: Mapping[int, Collection[Site]]) -> None:
        model = bare(model)
        self.blocks = blocks(model, sites)
        self.ends = {n: {block_of(model, site) for site in some} for n, some in perturbed.items()}
        self.outputs: dict[nn.Module, Any] = {}
        self.before: dict[int, list[nn.Module]] = {}  # blocks that had ended when the first perturbed one began
        self.usable = True

    @contextlib.contextmanager
    def recorded(self, index: Tensor, rows: int) -> Iterator[None]:
        """Keep what blocks give in the rows `index` of a call of so many rows, while a weak pass has use for it."""

        def begins(block: nn.Module, *_: Any) -> None:
            for number, ends in self.ends.items():
                if block in ends and number not in self.before:
                    self.before[number] = list(self.outputs)

        def ended(block: nn.Module, _: Any, out: Any) -> None:
            if block in self.outputs:  # run twice: which of the two is meant, nobody knows
                self.usable = False
            elif len(self.before) < len(self.ends):
                self.outputs[block] = own(cut_rows(out, index, rows), out)

        handles = [b.register_forward_pre_hook(begins) for b in self.blocks]
        handles += [b.register_forward_hook(ended) for b in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def replayed(self, number: int) -> Iterator[None]:
        """The blocks before the first perturbed one of this weak pass give what they gave."""
        kept = self.before.get(number, []) if self.usable else []
        plain = {block: vars(block).get("forward") for block in kept}
        try:
            for block in kept:
                block.forward = lambda *_, out=self.outputs[block], **__: out  # type: ignore[method-assign]
            yield
        finally:
            for block, forward in plain.items():
                if forward is None:
                    vars(block).pop("forward", None)
                else:
                    block.forward = forward  # type: ignore[method-assign]


def blocks(model: nn.Module, sites: Collection[Site]) -> list[nn.Module]:
    """The blocks of a denoiser: its children with attention modules, or their neighbours in the same list."""
    found: dict[nn.Module, None] = {}
    for site in sites:
        child = model.get_submodule(site.name.partition(".")[0])
        found |= dict.fromkeys(child if isinstance(child, nn.ModuleList) else [child])
    return list(found)


def block_of(model: nn.Module, site: Site) -> nn.Module:
    """The block that a site is in."""
    first, _, rest = site.name.partition(".")
    child = model.get_submodule(first)
    return child.get_submodule(rest.partition(".")[0]) if isinstance(child, nn.ModuleList) else child


def own(value: Any, of: Any) -> Any:
    """Tensors of one's own: what comes after a block may write into its output."""
    if isinstance(value, Tensor):
        return value.clone() if value is of else value
    if isinstance(value, list | tuple):
        return type(value)(own(v, o) for v, o in zip(value, of, strict=True))
    if isinstance(value, dict):
        return {k: own(v, of[k]) for k, v in value.items()}
    return value
