"""SoftPAG. D. Ahn et al., "Where and how to perturb", NeurIPS 2025, arXiv 2506.10978."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor

from diffguide.errors import ParamError
from diffguide.heads import load
from diffguide.params import param
from diffguide.perturbation import SCOPES, TARGETS, Weakened, replaced
from diffguide.site import Call, Proceed, Site

_UNIT = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+))?", re.IGNORECASE)

Unit = tuple[int, int]  # layer, head


@dataclass(frozen=True)
class SoftPAG(Weakened):
    r"""Away from a prediction in which some heads see less than they would: perturbation head by head, by degrees.

    $A'_{l,h} = (1 - u)\,A_{l,h} + u\,A^*$ for the chosen heads (equations 6 and 7), and
    $\hat\epsilon = \epsilon + w\,(\epsilon_{cond} - \epsilon_{weak})$ (equation 5), $\epsilon$ being the guided
    prediction or, without guidance, the conditional one. $A^*$ is the identity (as in PAG), uniform, the row of the
    mean query, or one at the largest weight.

    Heads are written as in the paper, `L11H15`; `L11` is the whole layer. Layers are counted over the attention modules
    where image tokens attend to each other, in running order. `mid`, `down`, `up`, `all` and patterns of module names
    are all heads there, with `:3` head 3 of each; `@NAME` is a preset,
    `@FILE.json` one of your own. In Python `heads` may be a list of (layer, head) pairs.
    """

    heads: str = param("mid", 'which: "L11H15,L13H17", "L7", "mid", "all", "@PRESET", module names, by commas')
    blend: float = param(0.5, "u: 0 changes nothing, 1 replaces the map", low=0.0, high=1.0)
    target: str = param("identity", "what the map is blended with", choices=TARGETS)
    scope: str = param("joint", "of joint attention: all tokens, or the image part of its rows", choices=SCOPES)

    neutral = {"scale": 0.0, "blend": 0.0, "heads": ""}
    paper = "arXiv 2506.10978"

    def __post_init__(self) -> None:
        text = self.heads if isinstance(self.heads, str) else written(self.heads)
        if "@" in text:  # what a name stands for is kept, so that a recipe needs no file
            parts = [part.strip() for part in text.split(",")]
            text = ",".join(load(part[1:]).heads if part.startswith("@") else part for part in parts)
        object.__setattr__(self, "heads", text)
        super().__post_init__()
        if self.scope != "joint" and self.target != "identity":
            raise ParamError(f"SoftPAG.scope = {self.scope!r} goes with target = 'identity' alone, not {self.target!r}")

    def where(self, sites: list[Site]) -> list[Site]:
        """Raises ParamError where a layer or head is named that the model has not."""
        layers = [s for s in sites if s.number >= 0]
        for part in self.parts if layers else ():
            if unit := _UNIT.fullmatch(part):
                if int(unit["layer"]) >= len(layers):
                    raise ParamError(f"SoftPAG.heads: {part} is not there, the last layer is L{len(layers) - 1}")
            elif not any(_is_at(s, part) for s in layers):
                raise ParamError(f"SoftPAG.heads: {part!r} matches no layer; use L3H2, L3, down, mid, up, all or names")
        return [s for s in layers if self.at(s)]

    def attend(self, call: Call, proceed: Proceed) -> Tensor:  # -> [B, H, N, D]
        o = proceed(call)
        if not (heads := self.at(call.site)):
            return o
        own = o[:, heads]
        weak = replaced(call.of_heads(heads), own, self.target, self.scope)
        out = o.clone()
        out[:, heads] = torch.lerp(own.float(), weak.float(), self.blend).to(o.dtype)
        return out

    @property
    def parts(self) -> list[str]:
        return [part.strip() for part in self.heads.split(",") if part.strip()]

    def at(self, site: Site) -> list[int]:
        """The chosen heads of a site; raises ParamError for one that it has not."""
        found: set[int] = set()
        for part in self.parts:
            if unit := _UNIT.fullmatch(part):
                if int(unit["layer"]) != site.number:
                    continue
                head = unit["head"]
            elif _is_at(site, part):
                head = part.rpartition(":")[2] if ":" in part else None
            else:
                continue
            if head is None:
                found |= set(range(site.heads))
            elif not head.isdecimal() or int(head) >= site.heads:
                raise ParamError(f"SoftPAG.heads: {part} is not there, the last head of this layer is {site.heads - 1}")
            else:
                found.add(int(head))
        return sorted(found)


def _is_at(site: Site, part: str) -> bool:
    name = part.partition(":")[0]
    return name in ("all", site.block) or fnmatch(site.name, name)


def written(heads: Iterable[Unit | str]) -> str:
    """Pairs of layer and head as a text: `[(11, 15)]` is "L11H15"; texts stay."""
    parts = []
    if not isinstance(heads, Iterable):
        raise ParamError(f"SoftPAG.heads: {heads!r:.60} is neither a text nor a list of pairs (layer, head)")
    for unit in heads:
        if isinstance(unit, str):
            parts.append(unit)
        elif isinstance(unit, tuple | list) and len(unit) == 2 and all(isinstance(n, int) and n >= 0 for n in unit):
            parts.append(f"L{unit[0]}H{unit[1]}")
        else:
            raise ParamError(f"SoftPAG.heads: {unit!r} is not a pair (layer, head) of whole numbers, nor a text")
    return ",".join(parts)
