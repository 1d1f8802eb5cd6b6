"""Where attention happens (`Site`) and one evaluation of it on its way through (`Call`)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Literal

from torch import Tensor, nn

from diffguide import kernels

Kind = Literal["self", "cross", "joint", "temporal"]
Branch = Literal["cond", "uncond", "weak", "every"]
Grid = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of a denoiser.

    Attributes:
        name: dotted path of the module in the denoiser.
        kind: what image tokens attend to: each other, words, both at once, or other frames.
        block: `"down"`, `"mid"` or `"up"` in U-Nets; the first, second and last third of a transformer's blocks.
        level: how often the latent grid was halved before this module.
        module: the module, whose `processor` does the work.
        calls: how many attention calls the processor makes; 0 where that depends on its settings.
        call: which of them is steered.
        apart: whether every frame of a video is a row of its own.
        number: its place among the modules in which image tokens attend to each other, in running order; -1 elsewhere.
    """

    name: str
    kind: Kind
    block: str
    level: int
    module: nn.Module = field(repr=False)
    calls: int = 1
    call: int = 0
    apart: bool = False
    number: int = -1

    @property
    def heads(self) -> int:
        """How many heads attend here."""
        return int(self.module.heads)  # type: ignore[arg-type]


def in_layers(site: Site, layers: str) -> bool:
    """Whether a site is in one of the layers, by commas.

    `"down"`, `"mid"`, `"up"`, `"all"`, numbers among the modules where image tokens attend to each other (`"L7"`), or
    patterns of names.
    """
    wanted = [part.strip() for part in layers.split(",")]
    return any(w in ("all", site.block, f"L{site.number}") or fnmatch(site.name, w) for w in wanted)


ORDER = ("down", "mid", "up")  # in which a denoiser runs


def numbered(sites: list[Site]) -> list[Site]:
    """The same sites, those where image tokens attend to each other with their numbers."""
    layers = sorted((s for s in sites if s.kind in ("self", "joint")), key=lambda s: ORDER.index(s.block))
    places = {site: number for number, site in enumerate(layers)}
    return [replace(site, number=places.get(site, -1)) for site in sites]


@dataclass(frozen=True)
class Call:
    """One evaluation of attention.

    Attributes:
        site: where.
        q: queries [B, H, N, D], after norms, rotary embeddings and adapters.
        k: keys [B, H, M, D].
        v: values [B, H, M, D].
        mask: additive or boolean, broadcastable to [B, H, N, M], or None.
        scale: factor of the logits, or None for D ** -0.5.
        grid: height and width of the image tokens, in tokens; frames first for video; frames alone between frames.
        image: the image tokens among the queries (and the keys, where attention is joint).
        text: the words among the keys; empty where there are none.
        branch: whose rows these are; `"every"` when a batch holds several branches.
        rows: the rows of each branch in the batch.
        progress: 0 for pure noise, 1 for the image.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float | None
    grid: Grid
    image: slice
    text: slice
    branch: Branch
    rows: dict[str, slice]
    progress: float

    def proceed(self) -> Tensor:
        """Attention as the model would have done it, [B, H, N, D]."""
        return kernels.attend(self.q, self.k, self.v, mask=self.mask, scale=self.scale)

    def probabilities(
        self, columns: list[int] | None = None, *, head_mean: bool = True, kind: str | None = None
    ) -> Tensor:
        """How image tokens attend to these columns, [B, N, K] (or [B, H, N, K]), in float32.

        Where attention is joint, `kind` says to what: `"cross"` to words, counted from the first, or `"self"` to image
        tokens; every row is a share of the whole. Elsewhere there is only one answer.
        """
        mask = self.mask
        if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
            mask = mask[..., self.image, :]
        capture = self._capture(columns, head_mean, kind, slice(None))
        return kernels.observe(self.q[:, :, self.image], self.k, capture, mask=mask, scale=self.scale)

    def look(
        self, columns: list[int] | None = None, *, head_mean: bool = True, kind: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """What `proceed` and `probabilities` give, for less than both where the first stays the same bit for bit."""
        capture = self._capture(columns, head_mean, kind, self.image)
        if not kernels.keeps_output(self.q, self.k, self.v, capture, mask=self.mask, scale=self.scale):
            return self.proceed(), self.probabilities(columns, head_mean=head_mean, kind=kind)
        return kernels.attend(self.q, self.k, self.v, mask=self.mask, scale=self.scale, capture=capture)

    def _capture(self, columns: list[int] | None, head_mean: bool, kind: str | None, rows: slice) -> kernels.Capture:
        among = range(self.k.shape[2])
        if self.site.kind == "joint":
            among = among[self.text if kind == "cross" else self.image]
        chosen = among if columns is None else [among[c] for c in columns]
        return kernels.Capture(chosen, rows=rows, heads="mean" if head_mean else "none")

    def of(self, branch: str) -> "Call":
        """The part of this call that belongs to a branch."""
        rows = self.rows[branch]
        mask = self.mask[rows] if self.mask is not None and len(self.mask) == len(self.q) > 1 else self.mask
        return replace(
            self, q=self.q[rows], k=self.k[rows], v=self.v[rows], mask=mask, branch=branch, rows={branch: slice(None)}
        )

    def of_heads(self, heads: Sequence[int]) -> "Call":
        """The part of this call that some heads do."""
        own = list(heads)
        mask = self.mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
            mask = mask[:, own]
        return replace(self, q=self.q[:, own], k=self.k[:, own], v=self.v[:, own], mask=mask)


Proceed = Callable[[Call], Tensor]
