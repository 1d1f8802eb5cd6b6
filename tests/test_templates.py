"""Words behind what a pipeline writes around the prompt."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffguide import tokens
from diffguide.errors import PromptError
from diffguide.families.hunyuan_video import HunyuanVideo
from diffguide.families.lumina2 import Lumina2
from diffguide.families.qwen_image import QwenImage
from diffguide.families.sana import Sana
from diffguide.families.z_image import ZImage
from diffguide.family import Encoding
from diffguide.zoo.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
PROMPT = "a red circle and a purple triangle"


def said(columns: list[int], text: str, dropped: int) -> str:
    """What the text states at these columns stand for."""
    ids = TOKENIZER(text).input_ids[dropped:]
    return TOKENIZER.decode([ids[c] for c in columns]).strip()


@given(
    st.sampled_from(["", "two ", "a big photo: "]), st.sampled_from(["", " at night", ", in fog"]), st.integers(0, 3)
)
def test_a_phrase_is_found_behind_any_template(before: str, after: str, dropped: int) -> None:
    dropped = min(dropped, len(TOKENIZER(before).input_ids) - 1)
    template = tokens.Template(before, after, dropped)
    for phrase in ("red circle", "purple triangle", "and"):
        columns = tokens.find(TOKENIZER, PROMPT, phrase, template=template)
        assert said(columns, before + PROMPT + after, dropped) == phrase
    every = tokens.columns(TOKENIZER, PROMPT, template)
    assert said(every, before + PROMPT + after, dropped) == PROMPT


class Chat:
    """The world's tokenizer with a chat template."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return TOKENIZER(*args, **options)

    model_max_length = TOKENIZER.model_max_length

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return f"a photo of {turns[0]['content']} at night"


class SanaPipeline:
    tokenizer = TOKENIZER

    def __call__(self, prompt: str, complex_human_instruction: tuple[str, ...] = ("two circles:", "")) -> None: ...


DEFAULT_PROMPT_TEMPLATE = {"template": "a photo of {} at night", "crop_start": 3}


class HunyuanVideoPipeline:
    tokenizer = TOKENIZER


@pytest.mark.parametrize(
    ("family", "pipe", "text", "dropped"),
    [
        (
            QwenImage(),
            SimpleNamespace(
                tokenizer=TOKENIZER, prompt_template_encode="a photo of {} at night", prompt_template_encode_start_idx=4
            ),
            f"a photo of {PROMPT} at night",
            4,
        ),
        (ZImage(), SimpleNamespace(tokenizer=Chat()), f"a photo of {PROMPT} at night", 0),
        (HunyuanVideo(), HunyuanVideoPipeline(), f"a photo of {PROMPT} at night", 3),
        (Sana(), SanaPipeline(), f"two circles:\n{PROMPT}", len(TOKENIZER.encode("two circles:\n")) - 2),
    ],
    ids=["qwen", "z-image", "hunyuan-video", "sana"],
)
def test_a_family_knows_its_template(family: Any, pipe: Any, text: str, dropped: int) -> None:
    columns = family.columns(pipe, PROMPT, "purple triangle", None)
    assert said(columns, text, dropped) == "purple triangle"
    assert said(family.content(pipe, PROMPT), text, dropped) == PROMPT


def test_a_template_of_the_call_goes_before_the_default() -> None:
    """What a run was told of its encoding counts: a system prompt, an instruction, a template of one's own."""
    own = {"template": "two circles: {}", "crop_start": 2}
    cases = [
        (HunyuanVideo(), HunyuanVideoPipeline(), {"prompt_template": own}, f"two circles: {PROMPT}", 2),
        (Sana(), SanaPipeline(), {"complex_human_instruction": None}, PROMPT, 0),
        (Lumina2(), SimpleNamespace(tokenizer=TOKENIZER, system_prompt="x"), {}, f"x <Prompt Start> {PROMPT}", 0),
        (
            Lumina2(),
            SimpleNamespace(tokenizer=TOKENIZER, system_prompt="x"),
            {"system_prompt": "a red star"},
            f"a red star <Prompt Start> {PROMPT}",
            0,
        ),
    ]
    for family, pipe, told, text, dropped in cases:
        columns = family.columns(pipe, PROMPT, "purple triangle", None, Encoding(given=told))
        assert said(columns, text, dropped) == "purple triangle"
    told = Encoding(given={"prompt_template": {"template": "{}"}})
    with pytest.raises(PromptError, match="does not say its crop_start"):
        HunyuanVideo().columns(HunyuanVideoPipeline(), PROMPT, "red", None, told)
