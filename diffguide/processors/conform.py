"""CONFORM. T. H. S. Meral et al., CVPR 2024, arXiv 2312.06059; formulas as in the authors' code."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffguide.concepts import Carried, Repeated, find_concepts, over_words
from diffguide.maps import Maps
from diffguide.method import Context
from diffguide.params import Window, param
from diffguide.targets import smooth


@dataclass(frozen=True)
class Conform(Repeated):
    r"""Tokens of one group (an object with its attributes) attract, tokens of different groups repel.

    InfoNCE over the smoothed cross-attention maps $e$ of all tokens of all groups, now and in the step before, with
    $s_{ab} = \cos(e_a, e_b) / \tau$: the mean over ordered pairs $a \neq p$ of one group of
    $-\log \frac{\exp s_{ap}}{\exp s_{ap} + \sum_{b \notin g(a)} \exp s_{ab}}$.
    """

    words: tuple[str, ...] = param((), "the groups, phrases of the prompt; none: its noun phrases")
    temperature: float = param(0.5, "tau: lower judges near maps more sharply", low=0.01, high=10.0)
    previous: bool = param(True, "compare with the maps of the step before too")
    form: str = param("ntxent", "InfoNCE, or margins on single pairs", choices=("ntxent", "contrastive"))
    softmax: bool = param(False, "softmax over words first, of 100 times the map")
    target: float = param(0.0, "loss at which repetition ends early; 0: never", low=0.0, high=10.0)
    window: Window = param((0.0, 0.5), "part of the run in which latents move", low=0.0, high=1.0, kw_only=True)

    paper = "arXiv 2312.06059"

    def prepare(self, context: Context) -> None:
        context.memory["groups"] = find_concepts(context, "Conform.words", self.words, least=2)
        context.memory["before"] = Carried()

    def loss(self, maps: Maps, context: Context) -> Tensor:  # -> [B]
        A, grid = maps.mean("cross", self.side)  # [B, N, T]
        losses = []
        for row, b in enumerate(context.pictures):
            groups = context.memory["groups"][b]
            columns = [c for group in groups for c in group]
            labels = torch.tensor([k for k, group in enumerate(groups) for _ in group], device=A.device)
            shares = over_words(A[row], -1) if self.softmax else A[row, :, 1:-1]
            e = smooth(shares[:, [c - 1 for c in columns]].T.unflatten(1, grid)).flatten(1)  # [n, N]
            before = context.memory["before"](b, context.step, e.detach())
            if before is not None and self.previous:
                e, labels = torch.cat([e, before]), labels.repeat(2)
            losses.append(ntxent(e, labels, self.temperature) if self.form == "ntxent" else contrastive(e, labels))
        return torch.stack(losses)

    def again(self, history: Tensor, context: Context) -> Tensor:
        """A loss of zero means that there is no pair to attract: nothing moves then."""
        return history[-1] > (self.target if self.most(context) > 1 else 0)


def cosines(e: Tensor) -> Tensor:
    e = e / (e.norm(dim=1, keepdim=True) + 1e-8)
    return e @ e.T


def pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs [n, n] are of one group (not a vector with itself), and which are of two."""
    same = labels[:, None] == labels[None]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def ntxent(e: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """InfoNCE of vectors [n, d] with group numbers [n]; 0 where no pair is of one group or none of two."""
    s = cosines(e) / temperature
    same, other = pairs(labels)
    if not same.any() or not other.any():
        return e.sum() * 0
    repel = s.masked_fill(~other, -torch.inf).logsumexp(1, keepdim=True)
    return (torch.logaddexp(s, repel.expand_as(s)) - s)[same].mean()


def contrastive(e: Tensor, labels: Tensor) -> Tensor:
    """1 - cos within a group, cos between groups: each the mean over pairs where it is above 0."""
    s = cosines(e)
    same, other = pairs(labels)
    terms = [F.relu(1 - s)[same], F.relu(s)[other]]
    return sum((t[t > 0].mean() for t in terms if (t > 0).any()), e.sum() * 0)
