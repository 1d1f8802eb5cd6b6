"""A CLIP tokenizer whose byte-pair merges know the grammar of the embedded world, and spell everything else out."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffguide.zoo.world import VOCABULARY

LENGTH = 77
# words that stay several pieces, so that aligning words with tokens is exercised
SPLIT = {
    "triangle": ("tri", "angle"),
    "triangles": ("tri", "angles"),
    "purple": ("pur", "ple"),
    "background": ("back", "ground"),
}


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer: one token a word of the grammar, two for the words of `SPLIT`, bytes for unknown words."""
    alphabet = list(bytes_to_unicode().values())
    merges = learn_merges()
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def learn_merges() -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties in alphabetical order), until every unit is one symbol."""
    units: list[list[str]] = []
    for word in VOCABULARY:
        *starts, end = SPLIT.get(word, (word,))
        units += [list(start) for start in starts]
        units.append([*end[:-1], end[-1] + "</w>"])
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for unit in units for pair in pairwise(unit)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        units = [_merge(unit, best) for unit in units]
    return merges


def _merge(unit: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in unit:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged
