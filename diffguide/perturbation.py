"""What methods with a weak pass share, and what attention gives when its map is replaced by another.

The functions take a call and give what all its heads would have given, [B, H, N, D], without ever making a map of all
tokens by all tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffguide import kernels
from diffguide.errors import SteeringError
from diffguide.method import Method
from diffguide.params import param
from diffguide.site import Call, Site, in_layers

SCOPES = ("joint", "image_block", "image_block_renorm")
TARGETS = ("identity", "uniform", "mean_query", "argmax")
CLOSED = -1e4  # additive masks at or below this close a key
ROWS = 2**25  # logits at a time


@dataclass(frozen=True)
class Weakened(Method):
    """A method that moves away from a prediction whose attention among image tokens is weakened."""

    scale: float = param(3.0, "guidance strength s: 0 changes nothing, high values saturate", low=0.0, high=20.0)

    branch = "weak"
    kinds = ("self", "joint")
    neutral = {"scale": 0.0}

    def shift(self, pred: dict[str, Tensor]) -> Tensor:
        return self.scale * (pred["cond"] - pred["weak"])


@dataclass(frozen=True)
class WeakenedLayers(Weakened):
    """One that weakens whole layers."""

    layers: str = param("mid", 'where: "down", "mid", "up", "all", "L7" or patterns of module names', kw_only=True)

    def where(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if s.kind in self.kinds and in_layers(s, self.layers)]


def replaced(call: Call, o: Tensor, target: str, scope: str = "joint") -> Tensor:
    """The output of attention with its map replaced by `target`; `o` is the unperturbed one.

    With `"joint"` the rows of all tokens are replaced. The other two put the identity in place of the image part of
    the rows of image tokens, see `image_block` and `image_block_renorm`.
    """
    if scope == "joint":
        by = {"identity": identity, "uniform": uniform, "mean_query": mean_query, "argmax": argmax}
        return by[target](call)
    out = o.clone()
    block = image_block if scope == "image_block" else image_block_renorm
    out[:, :, call.image] = block(call).to(o.dtype)
    return out


def identity(call: Call) -> Tensor:
    """Every token sees itself alone."""
    if call.q.shape[2] != call.k.shape[2]:
        raise SteeringError(
            f"{call.site.name}: {call.q.shape[2]} tokens attend to {call.k.shape[2]} others, so that none can attend "
            "to itself; leave this layer out"
        )
    return call.v


def uniform(call: Call) -> Tensor:
    """Every token sees all tokens alike."""
    if call.mask is None:
        return call.v.mean(2, keepdim=True).expand(*call.q.shape[:3], -1)
    seen = opened(call.mask).to(call.v.dtype)
    mean = (seen @ call.v) / seen.sum(-1, keepdim=True).clamp_min(1)
    return mean.expand(*call.q.shape[:3], -1)


def mean_query(call: Call) -> Tensor:
    """Every token sees what the mean of all queries sees: blurred queries, with a blur as wide as can be."""
    rows = 1 if call.mask is None or call.mask.ndim < 2 or call.mask.shape[-2] == 1 else call.q.shape[2]
    q = call.q.mean(2, keepdim=True).expand(-1, -1, rows, -1)
    o = kernels.attend(q, call.k, call.v, mask=call.mask, scale=call.scale)
    return o.expand(*call.q.shape[:3], -1)


def argmax(call: Call) -> Tensor:
    """Every token sees the one that it attends to most."""
    B, H, N, _ = call.q.shape
    scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5
    some = max(1, ROWS // (B * H * call.k.shape[2]))
    picked = []
    for start in range(0, N, some):
        rows = slice(start, start + some)
        logits = biased((call.q[:, :, rows].float() * scale) @ call.k.float().mT, rows_of(call.mask, rows))
        best = logits.argmax(-1, keepdim=True).expand(-1, -1, -1, call.v.shape[-1])
        picked.append(call.v.gather(2, best))
    return torch.cat(picked, 2)


def image_block(call: Call) -> Tensor:
    """What image tokens get that see themselves and the words, but not each other: one softmax over these.

    As diffusers' SD3 PAG pipeline has it.
    """
    q, k, v = (x[:, :, call.image] for x in (call.q, call.k, call.v))
    if not range(call.k.shape[2])[call.text]:
        return v
    scale = call.scale if call.scale is not None else q.shape[-1] ** -0.5
    own = (q.float() * k.float()).sum(-1, keepdim=True) * scale
    others = (q.float() * scale) @ call.k[:, :, call.text].float().mT
    mask = rows_of(call.mask, call.image)
    others = biased(others, mask if mask is None else mask[..., call.text])
    A = torch.cat([own, others], -1).softmax(-1)
    return A[..., :1] * v.float() + A[..., 1:] @ call.v[:, :, call.text].float()


def image_block_renorm(call: Call) -> Tensor:
    """What image tokens get that see the words as much as ever, and of the image themselves with all the rest.

    Words as side values tell both how much goes to them and what comes back, without a map.
    """
    v = call.v[:, :, call.image]
    if not range(call.k.shape[2])[call.text]:
        return v
    words = torch.zeros_like(call.v)
    words[:, :, call.text] = call.v[:, :, call.text]
    G = torch.zeros(call.k.shape[2], 1, device=v.device)
    G[call.text] = 1
    q, mask = call.q[:, :, call.image], rows_of(call.mask, call.image)
    whole = kernels.Capture(weights=G, heads="none")
    seen, share = kernels.attend(q, call.k, words, mask=mask, scale=call.scale, capture=whole)
    return (1 - share) * v + seen


def opened(mask: Tensor) -> Tensor:
    """Which keys a mask leaves open."""
    return mask if mask.dtype == torch.bool else mask > CLOSED


def rows_of(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some queries."""
    return mask[..., rows, :] if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1 else mask


def biased(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.float()
