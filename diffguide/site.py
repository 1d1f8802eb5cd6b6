"""Where attention happens (`Site`) and one evaluation of it on its way through (`Call`)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from diffguide import kernels

Kind = Literal["self", "cross", "joint"]
Branch = Literal["cond", "uncond", "weak", "every"]
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Site:
    """One attention module of a denoiser.

    Attributes:
        name: dotted path of the module in the denoiser.
        kind: what image tokens attend to.
        block: `"down"`, `"mid"` or `"up"` in U-Nets.
        level: how often the latent grid was halved before this module.
        module: the module, whose `processor` does the work.
    """

    name: str
    kind: Kind
    block: str
    level: int
    module: nn.Module = field(repr=False)


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
        grid: height and width of the image tokens, in tokens.
        image: the image tokens among the queries.
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
    branch: Branch
    rows: dict[str, slice]
    progress: float

    def proceed(self) -> Tensor:
        """Attention as the model would have done it, [B, H, N, D]."""
        return kernels.attention(self.q, self.k, self.v, mask=self.mask, scale=self.scale)

    def probabilities(self, columns: list[int] | None = None, *, head_mean: bool = True) -> Tensor:
        """The map [B, N, K] (or [B, H, N, K]) of these key columns, in float32."""
        return kernels.probabilities(
            self.q, self.k, mask=self.mask, scale=self.scale, columns=columns, head_mean=head_mean
        )

    def of(self, branch: str) -> "Call":
        """The part of this call that belongs to a branch."""
        rows = self.rows[branch]
        mask = self.mask[rows] if self.mask is not None and len(self.mask) == len(self.q) > 1 else self.mask
        return replace(
            self, q=self.q[rows], k=self.k[rows], v=self.v[rows], mask=mask, branch=branch, rows={branch: slice(None)}
        )


Proceed = Callable[[Call], Tensor]
