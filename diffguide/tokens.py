"""Words, not indices: where a phrase of the prompt lies among the tokens of a tokenizer.

A column is a position in `encoder_hidden_states`, a start token being column 0. Words become columns by overlap of
characters, so a word of several pieces keeps them all.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffguide.errors import PromptError

Span = tuple[int, int]  # characters of the prompt, end excluded


@dataclass(frozen=True)
class Template:
    """What a pipeline writes around a prompt before it is tokenised.

    Attributes:
        before: the text in front of the prompt.
        after: the text behind it.
        dropped: how many text states are cut off at the front.
        left: whether what fills a row up (padding, pictures) stands in front of all this.
        special: whether the tokenizer adds its own start and end tokens.
    """

    before: str = ""
    after: str = ""
    dropped: int = 0
    left: bool = False
    special: bool = True


PLAIN = Template()


@dataclass(frozen=True)
class Text:
    """A prompt as one tokenizer is given it.

    Attributes:
        tokenizer: the tokenizer.
        prompt: the prompt, as the pipeline has rewritten it.
        template: what is written around it.
        states: how many text states come of it at most, padding included; 0 if that is not known.
        first: the column of the first of them.
    """

    tokenizer: "Tokenizer"
    prompt: str
    template: Template = PLAIN
    states: int = 0
    first: int = 0

    def find(self, phrase: str, occurrence: int | None = None) -> list[int]:
        """The columns of a phrase; see the function of this name."""
        found = find(self.tokenizer, self.prompt, phrase, occurrence, self.template, self.states)
        return [self.first + column for column in found]

    def columns(self) -> list[int]:
        """The columns of all words of the prompt."""
        found = columns(self.tokenizer, self.prompt, self.template, self.states)
        return [self.first + column for column in found]


_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in enumerate(_WORDS, 1)}
ENDLESS = 10**6  # a tokenizer without a limit reports a huge one

# "to the left of", "in front of" and their like part one thing from the next
_JOINS = (
    r"to the (?:left|right) of|(?:left|right) of|(?:on|at) the (?:left|right|top|bottom)(?: side)? of|on top of"
    r"|in front of|next to|close to|and|with|on|onto|above|below|under|underneath|over|beside|behind|near|inside"
    r"|between|against|beneath|atop|holding|wearing"
)
# these open a part that tells of the scene, the time or the style rather than of a thing
_SCENES = r"in|at|as|during|by|from|through"
_CUT = re.compile(
    rf"[,;.:!?()\[\]\n]|(?<![\w'-])(?:{_JOINS})(?![\w'-])|(?<![\w'-])(?P<scene>{_SCENES})(?![\w'-])", re.I
)
_LEAD = re.compile(
    r"\s*(?:(?:a |an |the )?(?:photograph|photo|picture|image|painting|drawing|illustration|sketch) of\s+)?"
    rf"(?:(?:the|some|{'|'.join(NUMBERS)}|\d+)(?:\s+|$))*",
    re.I,
)
_LETTER = r"[\w\u0300-\u036f]"  # combining accents belong to the letter before them


class Tokenizer(Protocol):
    """What is asked of a tokenizer: a fast CLIP one of transformers."""

    model_max_length: int

    def __call__(self, text: str, **options: Any) -> Any: ...


def find(
    tokenizer: Tokenizer,
    prompt: str,
    phrase: str,
    occurrence: int | None = None,
    template: Template = PLAIN,
    states: int = 0,
) -> list[int]:
    """The columns of a phrase, all occurrences of it together or the one asked for, counted from 0; never empty.

    Case and amount of white space do not matter; words match whole, so "ring" is not in "string" nor "cat" in "cats".
    `states` says how many text states there are, where the pipeline has fewer than the tokenizer's length.
    Raises PromptError where the phrase is absent, has no such occurrence, or is cut off by either length.
    """
    spans = occurrences(prompt, phrase)
    if not spans:
        raise PromptError(f"phrase {phrase!r:.60} is not in the prompt {_quote(prompt)}{_nearest(prompt, phrase)}")
    if occurrence is not None:
        if not 0 <= occurrence < len(spans):
            last = f"the last is occurrence {len(spans) - 1}"
            raise PromptError(f"phrase {phrase!r:.60} has no occurrence {occurrence} in {_quote(prompt)}; {last}")
        spans = spans[occurrence : occurrence + 1]
    offsets, room = _encode(tokenizer, prompt, template, states)
    found = sorted({c for a, b in spans for c, (start, stop) in offsets.items() if start < b and a < stop})
    if not found:
        raise PromptError(f"phrase {phrase!r:.60} gives no token; name a word")
    if found[-1] > room:
        lies = f"tokens {found[0]} to {found[-1]}" if len(found) > 1 else f"token {found[0]}"
        whole = sum(_last(offsets, span) <= room for span in spans)
        fits = f" (occurrences below {whole} fit: name one)" if whole else ""
        raise PromptError(
            f"phrase {phrase!r:.60} lies at {lies}, but only the first {sum(c <= room for c in offsets)} of "
            f"{len(offsets)} fit{fits}; shorten the prompt, bring the phrase forward, or raise max_sequence_length"
        )
    return found


def _last(offsets: dict[int, Span], span: Span) -> int:
    return max((c for c, (start, stop) in offsets.items() if start < span[1] and span[0] < stop), default=0)


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """Where a phrase stands in a prompt as whole words, in characters, from left to right, not overlapping."""
    words = phrase.split()
    if not words:
        raise PromptError("an empty phrase is nowhere in a prompt; name a word")
    pattern = r"\s+".join(map(re.escape, words))
    start = rf"(?<!{_LETTER})" if re.match(_LETTER, words[0]) else ""
    stop = rf"(?!{_LETTER})" if re.match(_LETTER, words[-1][-1]) else ""
    return [match.span() for match in re.finditer(start + pattern + stop, prompt, re.IGNORECASE)]


def pieces(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """One readable string per column: what the prompt says there, and `[start]`, `[end]`, `[pad]` around it.

    Pieces of one character written in several bytes all show that character.
    """
    offsets, room = _encode(tokenizer, prompt)
    shown = [prompt[a:b].strip() for c, (a, b) in offsets.items() if c <= room]
    limit = tokenizer.model_max_length
    padding = limit - len(shown) - 2 if limit < ENDLESS else 0
    return ["[start]", *shown, "[end]", *["[pad]"] * padding]


def columns(tokenizer: Tokenizer, prompt: str, template: Template = PLAIN, states: int = 0) -> list[int]:
    """The columns that hold the prompt's own tokens: no start, end or padding, nothing that was cut off."""
    offsets, room = _encode(tokenizer, prompt, template, states)
    return [c for c in offsets if c <= room]


def eot(tokenizer: Tokenizer, prompt: str) -> int:
    """The column of the first end token, right behind the last token that fits."""
    return len(columns(tokenizer, prompt)) + 1


def _encode(
    tokenizer: Tokenizer, prompt: str, template: Template = PLAIN, states: int = 0
) -> tuple[dict[int, Span], int]:
    """Characters of each content column as if nothing were cut, and the last content column that fits."""
    text = template.before + prompt + template.after
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    try:
        coded = tokenizer(text, add_special_tokens=template.special, **options)
    except NotImplementedError:
        raise PromptError("this tokenizer gives no offsets; load the fast one (use_fast=True)") from None
    special: Sequence[int] = coded["special_tokens_mask"]
    offsets = {c: tuple(span) for c, span in enumerate(coded["offset_mapping"]) if not special[c]}
    if not offsets:
        return {}, len(special)
    first, last = min(offsets), max(offsets)
    if len(offsets) != last - first + 1:
        raise PromptError(f"expected the prompt in one piece between special tokens, got the mask {special!r:.80}")
    behind = len(special) - 1 - last  # end tokens, which stay when the prompt is cut
    if template.left and states:
        shift = states - len(special)
        if shift < -template.dropped:
            raise PromptError(
                f"the prompt makes {len(special) - template.dropped} text states, but the denoiser is given {states}; "
                "its words cannot be told among them"
            )
        room = last
    else:
        shift = -template.dropped
        limits = [n for n in (states and states + template.dropped, _limit(tokenizer, template)) if n]
        room = min(last, *(n - behind - 1 for n in limits)) if limits else last
    if template.before or template.after:
        start, stop = len(template.before), len(template.before) + len(prompt)
        offsets = {c: (a - start, b - start) for c, (a, b) in offsets.items() if a < stop and start < b}
    return {c + shift: span for c, span in offsets.items()}, room + shift


def _limit(tokenizer: Tokenizer, template: Template) -> int:
    """A pipeline that writes a template says itself where to cut."""
    return tokenizer.model_max_length if template == PLAIN else 0


def _quote(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 200 else prompt[:197] + "...")


def _nearest(prompt: str, phrase: str) -> str:
    """Runs of as many words as the phrase has that look like it, as the end of a message."""
    words = re.findall(rf"{_LETTER}+", prompt.lower())[:1000]
    length = len(phrase.split())
    runs = list(dict.fromkeys(" ".join(words[i : i + length]) for i in range(len(words) - length + 1)))
    near = difflib.get_close_matches(" ".join(phrase.lower().split())[:300], runs, n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, near))}" if near else "; write it as it stands there"


def number_before(prompt: str, span: Span) -> int | None:
    """The number that counts the phrase at `span`: its own first word, else the word right before it, else None.

    Numbers are one to ten, "a" and "an" (1), and up to three digits.
    """
    start, stop = span
    for text in (re.match(r"[\w.,]+", prompt[start:stop]), re.search(r"[\w.,]+(?=\s+$)", prompt[:start])):
        word = text.group().lower() if text else ""
        if word in NUMBERS or re.fullmatch(r"[0-9]{1,3}", word):
            return NUMBERS.get(word) or int(word)
    return None


def find_groups(prompt: str) -> list[str]:
    """The things a prompt names, as they stand in it, without article or number: "red circle", "blue square".

    A rule of thumb, not a parser. The prompt is cut at punctuation and at words that join things ("and", "on", "to the
    left of"); parts after "in", "at", "as" and the like, and parts ending in "background", are the scene and left out.
    """
    groups: dict[str, str] = {}
    start, scene = 0, False
    for cut in [*_CUT.finditer(prompt), None]:
        part = prompt[start : cut.start() if cut else len(prompt)]
        group = _LEAD.sub("", part, count=1).strip()
        if group and not scene and not re.search(r"\bbackground$", group, re.IGNORECASE):
            groups.setdefault(group.lower(), group)
        if cut:
            start, scene = cut.end(), cut["scene"] is not None
    return list(groups.values())
