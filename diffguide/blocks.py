"""Transformer blocks of a denoiser, and one evaluation of a block on its way through."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from diffguide.family import Family, bare
from diffguide.site import Grid, Site


@dataclass(frozen=True)
class BlockCall:
    """One evaluation of a transformer block.

    Attributes:
        name: dotted path of the block in the denoiser.
        number: of its attention among image tokens, see `Site.number`.
        step: number of the denoising step, from 0.
        hidden: hidden states [B, N, C], those of the image among them.
        image: the image tokens among the N.
        proceed: the block's own work on other hidden states, in the form that the denoiser expects.
        skipped: what it was given, in the form of what it gives.
    """

    name: str
    number: int
    step: int
    hidden: Tensor
    image: slice
    proceed: Callable[[Tensor], Any]
    skipped: Callable[[], Any]


def blocks(sites: list[Site]) -> dict[str, list[Site]]:
    """The attention modules of each block, by the block's path, in running order."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(site.name.rpartition(".")[0], []).append(site)
    return found


@contextlib.contextmanager
def carried(
    model: nn.Module,
    family: Family,
    carry: Callable[[BlockCall], Any],
    chosen: list[Site],
    sites: list[Site],
    grids: dict[Site, Grid],
    *,
    words: int,
    step: int,
) -> Iterator[None]:
    """The blocks of the chosen sites are evaluated by `carry`; afterwards by themselves."""
    model = bare(model)
    all_of = blocks(sites)
    own = {path: model.get_submodule(path) for path in blocks(chosen)}
    plain = {path: vars(block).get("forward") for path, block in own.items()}
    try:
        for path, block in own.items():
            block.forward = _carried(  # type: ignore[method-assign]
                path, block.forward, type(block), all_of[path], family, grids, carry, words, step
            )
        yield
    finally:
        for path, forward in plain.items():
            if forward is None:
                vars(own[path]).pop("forward", None)
            else:
                own[path].forward = forward  # type: ignore[method-assign]


def _carried(
    path: str,
    plain: Callable[..., Any],
    kind: type[nn.Module],
    sites: list[Site],
    family: Family,
    grids: dict[Site, Grid],
    carry: Callable[[BlockCall], Any],
    words: int,
    step: int,
) -> Callable[..., Any]:
    site = max(sites, key=lambda s: s.number)
    signature = inspect.signature(kind.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(None, *args, **kwargs)
        first = list(signature.parameters)[1]
        hidden: Tensor = bound.arguments[first]
        text = bound.arguments.get("encoder_hidden_states") if site.kind == "joint" else None

        def proceed(states: Tensor) -> Any:
            bound.arguments[first] = states
            return plain(*bound.args[1:], **bound.kwargs)

        def skipped() -> Any:
            if text is None:
                return hidden
            return tuple(hidden if name == "hidden_states" else text for name in family.streams)

        before = 0 if text is None else text.shape[1]
        tokens = hidden.shape[1] + before
        image, _ = family.spans(site, grids[site], words, tokens, tokens)
        if family.text_first and before:
            image = slice(image.start - before, image.stop - before)
        return carry(BlockCall(path, site.number, step, hidden, image, proceed, skipped))

    return forward
