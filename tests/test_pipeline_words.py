"""Words in whole pipelines: the text states that the denoiser is given say, at the columns found, what was asked for.

The text encoders echo: the first number of a state is the id of its token. So whatever a pipeline writes around a
prompt, cuts off, pads or rewrites, the states themselves are the judge.
"""

import html
import itertools
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    Flux2KleinPipeline,
    Flux2Pipeline,
    HunyuanDiTPipeline,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from tiny_models import MODELS, flux2_of
from tiny_pipes import PIPES, omnigen_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from diffguide import Guide
from diffguide.errors import PromptError
from diffguide.families.omnigen import OmniGen
from diffguide.families.qwen_image import QwenImage
from diffguide.families.unet import UNet
from diffguide.family import Encoding
from diffguide.method import Context, Method

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")

PROMPT = "A Red  circle &amp; a PURPLE triangle at night"
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "[SYSTEM]", "[INST]", "[IMG]"]
SPECIAL += ["<|vision_start|>", "<|vision_end|>", "[IMG_BREAK]", "[IMG_END]"]
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
MISTRAL = (
    "<s>{% for m in messages %}{{ '[SYSTEM]' if m.role == 'system' else '[INST]' }}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
)


def bpe(start: str = "", end: str = "", length: int = 10**6, **options: Any) -> Any:
    """A byte-level tokenizer that knows a few words, with the start and end tokens of its kind."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["a red circle and a purple triangle at night"] * 3, trainer)
    ids = [(token, inner.token_to_id(token)) for token in (start, end) if token]
    inner.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}".strip(), special_tokens=ids)
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=length, **(marks | options))


class Echo(nn.Module):
    """A text encoder whose states begin with the ids of their tokens."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, width: int, pooled: int = 0) -> None:
        super().__init__()
        self.width, self.pooled = width, pooled
        self.config = SimpleNamespace(hidden_size=width, projection_dim=pooled, use_attention_mask=False)

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        states = torch.zeros(*input_ids.shape, self.width)
        states[..., 0] = input_ids
        pooled = torch.zeros(len(input_ids), self.pooled)
        return Out(states, pooled)


class Out:
    def __init__(self, states: Tensor, pooled: Tensor) -> None:
        self.hidden_states, self.last_hidden_state, self.pooler_output = [states] * 40, states, pooled

    def __getitem__(self, _: int) -> Tensor:
        return self.pooler_output if self.pooler_output.numel() else self.last_hidden_state


T5 = {"end": "</s>"}
CLIP = {"start": "<s>", "end": "</s>", "length": 77}
BOS = {"start": "<s>"}

# name of the pipeline; encoders by attribute: tokenizer, width, pooled; arguments of the call
CASES: dict[str, tuple[dict[str, tuple[Any, ...]], dict[str, Any]]] = {
    "sd15": ({"": (CLIP, 8)}, {}),
    "sd2": ({"": (CLIP | {"pad_token": "!"}, 8)}, {}),
    "chroma": ({"": (T5, 32)}, {}),
    "pixart": ({"": (T5, 32)}, {"clean_caption": False}),
    "flux": ({"": (CLIP, 32, 32), "_2": (T5, 32)}, {}),
    "ltx": ({"": (T5, 16)}, {}),
    "cogvideox": ({"": (T5, 8)}, {}),
    "wan": ({"": (T5, 32)}, {}),
    "sana": ({"": (BOS, 8)}, {"complex_human_instruction": ["Make it nice:", "- User Prompt: "]}),
    "lumina2": ({"": (BOS, 32)}, {"system_prompt": "You draw red circles."}),
    "hunyuan_video": (
        {"": (BOS, 16), "_2": (CLIP, 8, 8)},
        {"prompt_template": {"template": "<|im_start|>Tell of a red circle:{}<|im_end|>", "crop_start": 9}},
    ),
    "qwen_image": ({"": ({}, 16)}, {}),
    "z_image": ({"": ({"chat_template": CHAT}, 16)}, {}),
}
KEPT = ("height", "width", "num_frames", "guidance_scale", "true_cfg_scale", "use_resolution_binning")


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline with echoing encoders, and arguments for its call without the prompt."""
    if name in BUILT:
        return BUILT[name]()
    pipe, given = PIPES[name]()
    parts, more = CASES[name]
    for suffix, (options, *widths) in parts.items():
        pipe.register_modules(**{f"tokenizer{suffix}": bpe(**options), f"text_encoder{suffix}": Echo(*widths)})
    if name == "qwen_image":
        pipe.prompt_template_encode = "<|im_start|>Describe a red circle<|im_end|>{}<|im_end|>\n"
        pipe.prompt_template_encode_start_idx = 5
    return pipe, {k: v for k, v in given.items() if k in KEPT} | more


def sd3() -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["sd3"]()
    clip, parts = bpe(**CLIP), {}
    for suffix in ("", "_2"):
        parts |= {f"tokenizer{suffix}": clip, f"text_encoder{suffix}": Echo(8, 8)}
    parts |= {"tokenizer_3": bpe(**T5), "text_encoder_3": Echo(16)}
    pipe = StableDiffusion3Pipeline(transformer=pipe.transformer, scheduler=pipe.scheduler, vae=pipe.vae, **parts)
    return pipe, {k: v for k, v in given.items() if k in KEPT}


def hunyuan_dit() -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["hunyuan_dit"]()
    parts = {k: v for k, v in pipe.components.items() if "tokenizer" not in k and "encoder" not in k}
    parts |= {"text_encoder": Echo(32), "tokenizer": bpe(**CLIP), "text_encoder_2": Echo(32), "tokenizer_2": bpe(**T5)}
    pipe = HunyuanDiTPipeline(**parts, requires_safety_checker=False)
    return pipe, {k: v for k, v in given.items() if k in KEPT}


class Processor:
    """As Pixtral's processor, which needs torchvision, does with text alone."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.apply_chat_template = tokenizer, tokenizer.apply_chat_template


def flux2(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["flux2"]()
    processor = Processor(bpe(chat_template=MISTRAL, **options))
    parts = {"tokenizer": processor, "text_encoder": Echo(8), "transformer": flux2_of(joint_attention_dim=24)}
    pipe = Flux2Pipeline(**(pipe.components | parts))
    pipe.system_message = "You draw a red circle."
    return pipe, {k: v for k, v in given.items() if k in KEPT}


def flux2_klein(**options: Any) -> tuple[Any, dict[str, Any]]:
    pipe, given = PIPES["flux2_klein"]()
    model = flux2_of(joint_attention_dim=24, guidance_embeds=False)
    parts = {"tokenizer": bpe(chat_template=CHAT, **options), "text_encoder": Echo(8), "transformer": model}
    return Flux2KleinPipeline(**(pipe.components | parts)), {k: v for k, v in given.items() if k in KEPT}


BUILT = {
    "sdxl": lambda: sdxl(),
    "sd3": sd3,
    "hunyuan_dit": hunyuan_dit,
    "flux2": lambda: flux2(start="<s>", padding_side="left"),
    "flux2_padded_right": lambda: flux2(start="<s>"),
    "flux2_klein": flux2_klein,
    "flux2_klein_padded_left": lambda: flux2_klein(padding_side="left"),
    "omnigen": lambda: (omnigen_of(bpe(**BOS)), {"height": 64, "width": 96}),
}


def sdxl() -> tuple[Any, dict[str, Any]]:
    pipe = tiny.sdxl()
    for suffix, widths in (("", (8,)), ("_2", (8, 32))):
        pipe.register_modules(**{f"tokenizer{suffix}": bpe(**CLIP), f"text_encoder{suffix}": Echo(*widths)})
    return pipe, {"height": 32, "width": 32, "guidance_scale": 5.0}


class SeenError(Exception):
    """Enough was seen."""


@dataclass(frozen=True)
class Ask(Method):
    """Looks up words when a run begins."""

    def prepare(self, context: Context) -> None:
        asked.append(context)


asked: list[Context] = []


def states(pipe: Any, given: dict[str, Any], prompt: str) -> tuple[Any, Context]:
    """Ids of the tokens whose states the denoiser is given for the prompt, and who finds words among them."""
    asked.clear()
    guide = Guide(pipe, Ask())
    seen: list[list[int]] = []

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert guide._run is not None
        row = guide._run.rows["cond"].start
        if kwargs.get("input_ids") is not None:
            seen.append(kwargs["input_ids"][row].tolist())
        else:
            found = kwargs["encoder_hidden_states"][row] if "encoder_hidden_states" in kwargs else args[2][row]
            if "encoder_hidden_states_t5" in kwargs:
                found = torch.cat([found, kwargs["encoder_hidden_states_t5"][row]])
            seen.append(found[:, 0].long().tolist())
        raise SeenError

    pipe.set_progress_bar_config(disable=True)
    with guide:
        hook = guide.model.register_forward_pre_hook(look, with_kwargs=True)
        with pytest.raises(SeenError):
            pipe(prompt=prompt, num_inference_steps=2, output_type="latent", **given)
        hook.remove()
    return seen[0], asked[0]


def tokenizer_of(pipe: Any) -> Any:
    return getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)


def said(pipe: Any, ids: list[int], columns: list[int]) -> str:
    """What the states at these columns stand for, without what a pipeline may rewrite: capitals, spaces, entities.

    Each of several encoders with columns of their own says its part.
    """
    first = 77 if len(ids) > 77 and hasattr(pipe, "tokenizer_2") else len(ids)
    parts = [[c for c in columns if c < first], [c for c in columns if c >= first]]
    return " ".join(plain(tokenizer_of(pipe).decode([ids[c] for c in part])) for part in parts if part)


def plain(text: str) -> str:
    return " ".join(html.unescape(text).lower().split())


@pytest.mark.parametrize("name", [*CASES, *BUILT])
def test_words_are_where_they_are_looked_up(name: str) -> None:
    pipe, given = build(name)
    ids, context = states(pipe, given, PROMPT)
    times = 2 if name in ("sd3", "hunyuan_dit") else 1  # once for each encoder with columns of its own
    for phrase in ("purple triangle", "red circle", "night"):
        assert said(pipe, ids, context.find(0, phrase)) == plain(" ".join([phrase] * times))
    whole = said(pipe, ids, context.content(0))
    assert whole.replace(" ", "") == plain(PROMPT).replace(" ", "") * times


LONG = "red circle, " * 40 + "purple triangle"
SHORT = {"max_sequence_length": 40}
FIXED = ("sd15", "sdxl", "hunyuan_dit", "omnigen")  # these have no such argument
LIMITED = [name for name in (*CASES, *BUILT) if name != "omnigen"]  # which cuts nothing


def found(context: Context, k: int) -> list[int]:
    """Columns of the k-th red circle; none if it is said to be cut off."""
    try:
        return context.find(0, "red circle", k)
    except PromptError as error:
        if "shorten the prompt" in str(error):
            return []
        raise


def circles(text: str) -> int:
    """How many red circles of the prompt are whole, without those of the templates."""
    for foreign in ("draw a red circle", "a red circle:", "a red circle<", "draw red circles"):
        text = text.replace(foreign, "")
    return text.count("red circle,") + text.removesuffix("</s>").endswith("red circle")


@pytest.mark.parametrize("name", LIMITED)
def test_a_phrase_is_found_as_often_as_it_is_whole_in_the_states_and_the_rest_is_told(name: str) -> None:
    """Every occurrence up to the cut is found and none behind it, to the token; also where an end token is kept."""
    pipe, given = build(name)
    ids, context = states(pipe, given | ({} if name in FIXED else SHORT), LONG)
    missing = []
    for k in range(40):
        columns = found(context, k)
        if columns:
            assert set(said(pipe, ids, columns).split()) == {"red", "circle"}
        else:
            missing.append(k)
    parts = (ids[:77], ids[77:]) if name in ("sd3", "hunyuan_dit") else (ids,)  # one holds more than the other
    whole = max(circles(plain(tokenizer_of(pipe).decode(part))) for part in parts)
    assert 0 < whole < 40 or name == "hunyuan_dit"
    assert missing == list(range(whole, 40))
    if missing:
        with pytest.raises(PromptError, match="shorten the prompt"):
            context.find(0, "purple triangle")


def test_a_prompt_in_a_list_is_looked_up_as_it_came() -> None:
    """Z-Image writes its template into the list that it is given."""
    pipe, given = build("z_image")
    ids, context = states(pipe, given, [PROMPT])  # type: ignore[arg-type]
    assert context.prompts == [PROMPT]
    assert said(pipe, ids, context.find(0, "purple triangle")) == "purple triangle"


def test_a_column_of_xl_is_the_same_word_in_both_encoders() -> None:
    pipe, _ = build("sdxl")
    made = pipe.encode_prompt(PROMPT)[0][0].long()
    columns = UNet().columns(pipe, PROMPT, "purple triangle", None, Encoding(77, {"prompt": PROMPT}))
    for channel in (0, 8):  # where the states of the first encoder and of the second begin
        assert said(pipe, made[:, channel].tolist(), columns) == "purple triangle"


def test_words_of_kolors_are_refused_by_name() -> None:
    class KolorsPipeline:
        tokenizer = object()

    with pytest.raises(PromptError, match=r"Kolors' ChatGLM tokenizer .* use Stable Diffusion XL"):
        UNet().columns(KolorsPipeline(), PROMPT, "night", None)


def test_a_second_prompt_in_the_same_columns_is_refused() -> None:
    for name in ("sdxl", "sd3"):
        pipe, given = build(name)
        _, context = states(pipe, given | {"prompt_2": "a blue square"}, PROMPT)
        with pytest.raises(PromptError, match="prompt_2 puts other words into the same columns"):
            context.find(0, "night")
        ids, context = states(pipe, given | {"prompt_2": PROMPT}, PROMPT)
        assert said(pipe, ids, context.find(0, "night")).split()[0] == "night"


def test_a_chat_template_that_rewrites_the_prompt_is_refused() -> None:
    pipe, given = flux2_klein()
    pipe.tokenizer.chat_template = CHAT.replace("m.content", "m.content | upper")
    _, context = states(pipe, given, PROMPT)
    with pytest.raises(PromptError, match="chat template rewrites the prompt"):
        context.find(0, "night")


class Expand:
    """As Qwen's processor does: a token of a picture becomes as many as the picture has."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any, **_: Any) -> Any:
        sizes = itertools.cycle([p.width * p.height // 256 for p in (images if isinstance(images, list) else [images])])
        parts = text[0].split("<|image_pad|>")
        whole = parts[0] + "".join("<|image_pad|>" * next(sizes) + part for part in parts[1:])
        return self.tokenizer([whole], return_tensors="pt")


@pytest.mark.parametrize(("cls", "pictures"), [(QwenImageEditPipeline, 1), (QwenImageEditPlusPipeline, 2)])
def test_words_behind_pictures_to_edit(cls: Any, pictures: int) -> None:
    pipe, _ = build("qwen_image")
    plus = "Plus" in cls.__name__
    parts = pipe.components | {"processor": Expand(pipe.tokenizer)}
    pipe = cls(**parts)
    vision = "" if plus else "<|vision_start|><|image_pad|><|vision_end|>"
    pipe.prompt_template_encode = "<|im_start|>Change a red circle<|im_end|>" + vision + "{}<|im_end|>\n"
    pipe.prompt_template_encode_start_idx = 5
    given: dict[str, Any] = {"prompt": PROMPT, "image": [Image.new("RGB", (64, 32 * (i + 1))) for i in range(pictures)]}
    made, _ = pipe.encode_prompt(**given)
    ids = made[0, :, 0].long().tolist()
    encoding = Encoding(len(ids), given)
    family = QwenImage()
    assert ids.count(pipe.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == sum(8 * (i + 1) for i in range(pictures))
    for phrase in ("purple triangle", "red circle"):
        assert said(pipe, ids, family.columns(pipe, PROMPT, phrase, None, encoding)) == phrase
    assert said(pipe, ids, family.content(pipe, PROMPT, encoding)) == plain(PROMPT)
    with pytest.raises(PromptError, match="draw one prompt at a time"):
        family.columns(pipe, PROMPT, "night", None, replace(encoding, given=given | {"prompt": [PROMPT, PROMPT]}))
    with pytest.raises(PromptError, match="its words cannot be told among them"):
        family.columns(pipe, PROMPT, "night", None, replace(encoding, states=9))


def test_words_around_pictures_of_omnigen() -> None:
    pipe, _ = build("omnigen")
    prompt = "a red circle <img><|image_1|></img> by a purple triangle <img><|image_2|></img> at night"
    pictures = [Image.new("RGB", (32, 16)), Image.new("RGB", (32, 64))]
    made = pipe.multimodal_processor([prompt], [pictures], height=64, width=96)
    ids = made["input_ids"][0].tolist()
    assert [b - a for a, b in made["input_image_sizes"][0]] == [2, 8]
    encoding = Encoding(len(ids), {"prompt": [prompt], "input_images": [pictures]})
    family = OmniGen()
    for phrase in ("red circle", "purple triangle", "at night"):
        assert said(pipe, ids, family.columns(pipe, prompt, phrase, None, encoding)) == phrase
    text = prompt.replace("<|image_1|>", "").replace("<|image_2|>", "")
    assert said(pipe, ids, family.content(pipe, prompt, encoding)) == text
    with pytest.raises(PromptError, match="can be told in a run alone"):
        family.columns(pipe, prompt, "night", None, Encoding())


def test_the_small_models_of_these_tests_are_listed() -> None:
    """So that a new pipeline is asked for its words too."""
    without = {"animatediff", "sd3_skipping_layers", "flux_with_true_guidance", "wan_with_two_denoisers"}
    without.add("skyreels")  # as Wan, but for ftfy, which it cannot do without
    assert PIPES.keys() - CASES.keys() - BUILT.keys() == without | {"z_image_normalised"}
    assert MODELS
