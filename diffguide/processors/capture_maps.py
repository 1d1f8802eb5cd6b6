"""Word maps, to look at. The heat maps of R. Tang et al., ACL 2023, arXiv 2210.04885 (DAAM), at one grid."""

from dataclasses import dataclass

import numpy as np

from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method
from diffguide.params import param
from diffguide.targets import bare_phrase


@dataclass(frozen=True)
class CaptureMaps(Method):
    """Watches the model's own pass and changes nothing: where each word was looked at.

    `guide.maps[word]` is float32 [pictures, h, w]: the share of attention that image tokens gave the
    word, averaged over its tokens, heads, modules and steps.
    """

    words: tuple[str, ...] = param((), "words or phrases of the prompt; none: every word of it")
    side: int = param(16, "grid of the maps: the nearest the model has, in tokens", low=4, high=128)

    paper = "arXiv 2210.04885"
    mode = "maps"

    def prepare(self, context: Context) -> None:
        words = self.words or _words(context.prompts)
        context.memory["columns"] = {
            w: [_find(context, b, w, not self.words) for b in range(len(context.prompts))] for w in words
        }
        found = context.memory["columns"].values()
        context.memory["watched"] = tuple(sorted({c for rows in found for columns in rows for c in columns}))
        context.memory["count"] = 0

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"cross": Watch("cross", (self.side,), context.memory.get("watched"))}

    def observe(self, maps: Maps, context: Context) -> None:
        A, (h, w) = maps.mean("cross")  # [B, N, K]
        memory = context.memory
        place = {c: i for i, c in enumerate(memory["watched"])}
        old = memory.setdefault("maps", {})
        memory["count"] += 1
        for word, columns in memory["columns"].items():
            rows = enumerate(context.pictures)
            now = np.stack(
                [_mean(A[row].detach().cpu().numpy(), [place[c] for c in columns[b]]).reshape(h, w) for row, b in rows]
            )
            before = old.get(word, np.zeros_like(now))
            old[word] = before + (now - before) / memory["count"]


def _words(prompts: list[str | None]) -> tuple[str, ...]:
    """The words of all prompts, once each, in order."""
    return tuple(dict.fromkeys(w for p in prompts for w in (p or "").lower().replace(",", " ").split()))


def _find(context: Context, b: int, word: str, lenient: bool) -> list[int]:
    """Columns of a word in the prompt of a picture; none if a word taken from another prompt is not there."""
    if lenient and word not in _words([context.prompts[b]]):
        return []
    return context.find(b, bare_phrase(word), None)


def _mean(A: np.ndarray, columns: list[int]) -> np.ndarray:
    return A[:, columns].mean(1) if columns else np.zeros(len(A), np.float32)
