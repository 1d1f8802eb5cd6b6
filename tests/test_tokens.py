import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from diffguide.errors import PromptError
from diffguide.tokens import columns, eot, find, find_groups, number_before, occurrences, pieces

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 16
few = settings(max_examples=40)


def clip_tokenizer(*words: str, length: int = LENGTH, pad: str = END) -> CLIPTokenizer:
    """A CLIP tokenizer that knows `words` as one token each, and any other text in smaller pieces."""
    letters = sorted(ByteLevel.alphabet())
    vocab, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if tuple(parts[:2]) not in merges:
                merges.append(tuple(parts[:2]))
                vocab.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    index = {token: i for i, token in enumerate([*vocab, START, END])}
    return CLIPTokenizer(vocab=index, merges=merges, model_max_length=length, pad_token=pad)


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer("red", "blue", "circle", "square", "cat", "string", "and")


def text_at(tokenizer, prompt, found):
    """What the tokens at these columns spell, by the tokenizer's own ids."""
    ids = tokenizer(prompt, truncation=True, max_length=LENGTH, padding="max_length")["input_ids"]
    return tokenizer.decode([ids[c] for c in found]).strip()


def test_a_phrase_is_found_behind_the_start_token(tokenizer):
    assert find(tokenizer, "a red circle", "red circle") == [2, 3]
    assert find(tokenizer, "red", "red") == [1]


def test_a_word_keeps_all_its_pieces(tokenizer):
    found = find(tokenizer, "a red circles and a cat", "circles")
    assert found == [3, 4, 5]
    assert text_at(tokenizer, "a red circles and a cat", found) == "circles"


def test_case_and_white_space_do_not_matter(tokenizer):
    assert find(tokenizer, "A  RED\t Circle", " red\ncircle ") == [2, 3]


def test_punctuation_at_a_word_does_not_hide_it(tokenizer):
    assert find(tokenizer, "(cat) - cat's", "cat") == [2, 5]


def test_letters_outside_ascii_are_found_by_all_their_bytes(tokenizer):
    assert find(tokenizer, "red 猫 cat", "猫") == [2, 3, 4]
    assert find(tokenizer, "red 猫 cat", "cat") == [5]
    assert text_at(tokenizer, "red café cat", find(tokenizer, "red café cat", "CAFÉ")) == "café"


def test_every_occurrence_or_the_one_asked_for(tokenizer):
    prompt = "a red cat and a red cat"
    assert find(tokenizer, prompt, "red cat") == [2, 3, 6, 7]
    assert [find(tokenizer, prompt, "red cat", k) for k in (0, 1)] == [[2, 3], [6, 7]]
    for k in (2, -1):
        with pytest.raises(
            PromptError, match=f"no occurrence {k} in 'a red cat and a red cat'; the last is occurrence 1"
        ):
            find(tokenizer, prompt, "red cat", k)


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [("a string", "ring"), ("cats", "cat"), ("cat", "cats"), ("cafe\u0301", "cafe"), ("a_cat", "cat")],
)
def test_a_part_of_a_word_is_not_the_word(tokenizer, prompt, phrase):
    assert occurrences(prompt, phrase) == []
    with pytest.raises(PromptError, match="is not in the prompt"):
        find(tokenizer, prompt, phrase)


def test_an_absent_phrase_is_told_with_the_prompt_and_the_nearest_words(tokenizer):
    with pytest.raises(PromptError) as caught:
        find(tokenizer, "a red circle and a blue square", "red cirle")
    message = "phrase 'red cirle' is not in the prompt 'a red circle and a blue square'; nearest: 'red circle'"
    assert str(caught.value).startswith(message)
    with pytest.raises(PromptError, match=r"x\.\.\.'; write it as it stands there$"):
        find(tokenizer, "x" * 5000, "cat")
    for nothing in ("", " \n"):
        with pytest.raises(PromptError, match="empty phrase"):
            find(tokenizer, "a cat", nothing)


def test_a_phrase_that_was_cut_off_is_told(tokenizer):
    assert find(tokenizer, "red " * 13 + "cat", "cat") == [14]
    with pytest.raises(PromptError, match="'cat' lies at token 15, but only the first 14 of 15 fit; shorten"):
        find(tokenizer, "red " * 14 + "cat", "cat")
    with pytest.raises(
        PromptError, match="'red cat' lies at tokens 14 to 15, but only the first 14 of 15 fit; shorten"
    ):
        find(tokenizer, "red " * 14 + "cat", "red cat")
    twice = "cat" + " red" * 14 + " cat"
    with pytest.raises(PromptError, match=r"tokens 1 to 16, .* fit \(occurrences below 1 fit: name one\)"):
        find(tokenizer, twice, "cat")
    assert find(tokenizer, twice, "cat", 0) == [1]


def test_long_prompts_make_no_noise(tokenizer, capfd):
    columns(tokenizer, "red " * 40)
    assert capfd.readouterr() == ("", "")


WORDS = st.lists(st.sampled_from(["red", "blue", "circles", "cat", "a", "café", "Square", "7", "猫,"]), max_size=6)


@few
@given(WORDS)
def test_columns_are_what_the_tokenizer_keeps(words):
    tokenizer = clip_tokenizer("red", "cat")
    prompt = "  ".join(words)
    coded = tokenizer(prompt, truncation=True, max_length=LENGTH, padding="max_length", return_special_tokens_mask=True)
    kept = [c for c, special in enumerate(coded["special_tokens_mask"]) if not special]
    assert columns(tokenizer, prompt) == kept
    assert eot(tokenizer, prompt) == coded["input_ids"].index(tokenizer.eos_token_id)
    shown = pieces(tokenizer, prompt)
    assert len(shown) == LENGTH
    assert [c for c, piece in enumerate(shown) if piece not in ("[start]", "[end]", "[pad]")] == kept
    assert shown.index("[end]") == eot(tokenizer, prompt)


@few
@given(WORDS.filter(bool), st.data())
def test_words_cover_the_prompt_without_gap_or_overlap(words, data):
    tokenizer = clip_tokenizer("red", "cat", length=200)
    prompt = " ".join(words)
    start = data.draw(st.integers(0, len(words) - 1))
    stop = data.draw(st.integers(start + 1, len(words)))
    phrase, ends = words[start:stop], [1]
    for word in words:
        ends.append(ends[-1] + len(tokenizer.tokenize(word)))
    expected, k = [], 0
    while k < len(words):
        here = words[k : k + len(phrase)] == phrase
        expected += range(ends[k], ends[k + len(phrase)]) if here else []
        k += len(phrase) if here else 1
    assert find(tokenizer, prompt, " ".join(phrase)) == expected
    everything = {c for word in set(words) for c in find(tokenizer, prompt, word)}
    assert sorted(everything) == columns(tokenizer, prompt)


def test_pieces_say_what_stands_in_each_column(tokenizer):
    shown = pieces(tokenizer, "A red, café 猫")
    assert shown == ["[start]", "A", "red", ",", "ca", "f", "é", "é", "猫", "猫", "猫", "[end]", *["[pad]"] * 4]
    assert pieces(tokenizer, "") == ["[start]", "[end]", *["[pad]"] * 14]
    assert pieces(tokenizer, "red " * 20) == ["[start]", *["red"] * 14, "[end]"]


def test_the_padding_token_does_not_matter():
    other = clip_tokenizer("red", pad="!")
    assert eot(other, "a red!") == 4 and columns(other, "a red!") == [1, 2, 3]
    assert pieces(other, "red!")[:4] == ["[start]", "red", "!", "[end]"]


def test_a_tokenizer_without_a_limit_cuts_nothing():
    endless = clip_tokenizer("red", length=10**30)
    assert find(endless, "red " * 100, "red", 99) == [100]
    assert len(pieces(endless, "red " * 100)) == 102


@pytest.mark.parametrize(
    ("prompt", "phrase", "number"),
    [
        ("three cats", "cats", 3),
        ("Ten  cats", "cats", 10),
        ("12 cats", "cats", 12),
        ("three cats", "three cats", 3),
        ("two dogs and three cats", "three cats", 3),
        ("a cat", "cat", 1),
        ("an owl", "an owl", 1),
        ("the cat", "cat", None),
        ("cat", "cat", None),
        ("three red cats", "cats", None),
        ("someone cats", "cats", None),
        ("in 1920 cats", "cats", None),
        ("2.5 cats", "cats", None),
        ("two, cats", "cats", None),
    ],
)
def test_the_number_of_a_phrase(prompt, phrase, number):
    assert number_before(prompt, occurrences(prompt, phrase)[0]) == number


@pytest.mark.parametrize(
    ("prompt", "groups"),
    [
        ("a red circle and a blue square on a white background", ["red circle", "blue square"]),
        ("a green ring to the left of two pink hearts", ["green ring", "pink hearts"]),
        ("a big cyan star above the small cross, at night", ["big cyan star", "small cross"]),
        ("three red circles below an orange triangle, as a sketch", ["red circles", "orange triangle"]),
        ("a red fox and a grey owl in a moonlit forest", ["red fox", "grey owl"]),
        ("A photo of a cat, the Cat in front of 12 boxes", ["cat", "boxes"]),
        ("a hand-made cup-and-ball with sand", ["hand-made cup-and-ball", "sand"]),
        ("a cup of tea", ["cup of tea"]),
        ("on a white background", []),
        ("two, and the", []),
        ("", []),
    ],
)
def test_the_things_a_prompt_names(prompt, groups):
    assert find_groups(prompt) == groups


VOCABULARY = ["a", "the", "two", "red", "cat", "and", "on", "of", "in", ",", ".", "background", "left", "to", "photo"]


@few
@given(st.lists(st.sampled_from(VOCABULARY)).map(" ".join))
def test_groups_are_in_the_prompt_and_can_be_found(prompt):
    for group in find_groups(prompt):
        assert group in prompt and occurrences(prompt, group)
        assert group.split()[0] not in ("a", "the", "two")
