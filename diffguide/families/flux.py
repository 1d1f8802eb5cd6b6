"""FLUX.1, FLUX.2 and Chroma: text and packed image tokens in one stream, text first."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.errors import PromptError, SteeringError
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, calls_of, in_turn, third
from diffguide.site import Grid, Site


class Flux(Family):
    """`FluxTransformer2DModel`: double-stream blocks, then single-stream ones in which both run as one.

    A token packs 2x2 latent cells. Their place is told by `img_ids`; an edited or reference picture (Kontext) comes
    behind the picture, with another first id.
    """

    models: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    latent = ("hidden_states", 0)
    streams = ("encoder_hidden_states", "hidden_states")
    channels_at = 2
    text_first = True
    shared = ("img_ids", "txt_ids")
    prompts = ("prompt_2", "prompt")
    tokenizer = "tokenizer_2"

    def sites(self, model: nn.Module) -> list[Site]:
        """`attn` of the double blocks, then of the single ones; thirds count both."""
        model = bare(model)
        names = [
            f"{kind}.{number}.attn"
            for kind in ("transformer_blocks", "single_transformer_blocks")
            for number in range(len(getattr(model, kind)))
        ]
        modules = [model.get_submodule(name) for name in names]
        return [
            Site(name, "joint", third(i, len(names)), 1, module, calls_of(module))
            for i, (name, module) in enumerate(zip(names, modules, strict=True))
        ]

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        """True classifier-free guidance makes a second call."""
        return in_turn(batch)

    def places(self, kwargs: dict[str, Any]) -> Tensor:
        """The ids [N, 3 or 4] of the picture's own tokens."""
        ids = kwargs["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        return ids[ids[:, 0] == ids[0, 0]]

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid:
        rows, columns = (int(self.places(kwargs)[:, i].max()) + 1 for i in (1, 2))
        return 2 * rows, 2 * columns

    def latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return super().latents(model, args, kwargs)[:, : len(self.places(kwargs))]

    def with_latents(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> Arguments:
        x = self.argument(args, kwargs)
        own = torch.cat([z, x[:, : z.shape[1], z.shape[2] :]], 2)
        return self.with_argument(args, kwargs, torch.cat([own, x[:, z.shape[1] :]], 1))

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().timestep(args, kwargs) * 1000  # the pipeline divides it

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        h, w = size[0] // 2, size[1] // 2
        axes = len(config.axes_dims_rope)
        ids = zeros(h, w, axes)
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        kwargs = {
            "hidden_states": zeros(1, h * w, config.in_channels),
            "encoder_hidden_states": zeros(1, 512, config.joint_attention_dim),
            "timestep": zeros(1),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": zeros(512, axes),
        }
        if "pooled_projection_dim" in config:
            kwargs["pooled_projections"] = zeros(1, config.pooled_projection_dim)
        if getattr(config, "guidance_embeds", False):
            kwargs["guidance"] = zeros(1)
        return (), kwargs


class Chroma(Flux):
    """`ChromaTransformer2DModel`: FLUX's blocks without pooled text; padding is masked."""

    models = ("ChromaTransformer2DModel",)
    prompts = ("prompt",)
    tokenizer = "tokenizer"
    checkpoints = "diffusers leaves the attention mask out of Chroma's single blocks then"


MARK = "\u2603"  # in place of the prompt, to find where it goes


class Chat:
    """How a FLUX.2 pipeline writes and encodes a prompt: with a system message for Mistral, without one for Qwen."""

    def __init__(self, pipe: Any) -> None:
        self.processor = pipe.tokenizer
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.system: str | None = getattr(pipe, "system_message", None)

    def clean(self, prompt: str) -> str:
        return prompt if self.system is None else prompt.replace("[IMG]", "")

    def turns(self, prompt: str) -> list[dict[str, Any]]:
        if self.system is None:
            return [{"role": "user", "content": prompt}]
        said = (("system", self.system), ("user", prompt))
        return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]

    def write(self, prompt: str) -> str:
        options = {"add_generation_prompt": True, "enable_thinking": False} if self.system is None else {}
        return self.processor.apply_chat_template(self.turns(prompt), tokenize=False, **options)

    def encode(self, prompt: str, length: int) -> tuple[list[int], list[int]]:
        """Ids and mask of `length` tokens, as the pipeline makes them."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        if self.system is None:
            coded = self.tokenizer([self.write(prompt)], **options)
        else:
            coded = self.processor.apply_chat_template(
                [self.turns(prompt)], add_generation_prompt=False, tokenize=True, return_dict=True, **options
            )
        return coded["input_ids"][0], coded["attention_mask"][0]


class Flux2(Flux):
    """`Flux2Transformer2DModel`: pictures to start from come behind the picture, with another first id."""

    models = ("Flux2Transformer2DModel",)
    shared = ()  # ids come for each row
    prompts = ("prompt",)
    tokenizer = "tokenizer"

    def spans(self, site: Site, grid: Grid, words: int, queries: int, keys: int) -> tuple[slice, slice]:
        if keys != queries:
            raise SteeringError(
                f"{site.name}: keys of reference pictures come from a cache, which cannot be steered; use "
                "Flux2Pipeline, which has none"
            )
        return super().spans(site, grid, words, queries, keys)

    def refusals(self, pipe: Any) -> list[str]:
        if "KV" in type(pipe).__name__:
            return [f"{type(pipe).__name__} takes keys from a cache, which cannot be steered; use Flux2KleinPipeline"]
        return []

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        """A chat around the prompt, padded on a side that depends on the tokenizer: the tokens are compared."""
        chat, length = Chat(pipe), encoding.states or pipe.tokenizer_max_length
        words = chat.clean(prompt)
        before, _, after = chat.write(MARK).partition(MARK)
        special = not before.startswith(chat.tokenizer.bos_token or "\0")
        whole = chat.write(words)
        made, mask = chat.encode(words, length)
        ids = chat.tokenizer(whole, add_special_tokens=special)["input_ids"]
        kept = [i for i, real in zip(made, mask, strict=True) if real]
        if whole != before + words + after or kept != ids[:length]:
            raise PromptError("this chat template rewrites the prompt, so that its words cannot be told")
        template = tokens.Template(before, after, special=special)
        return [tokens.Text(chat.tokenizer, words, template, length, first=mask.index(1))]

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        h, w = size[0] // 2, size[1] // 2
        ids = zeros(1, h, w, len(config.axes_dims_rope))
        ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
        kwargs = {
            "hidden_states": zeros(1, h * w, config.in_channels),
            "encoder_hidden_states": zeros(1, 512, config.joint_attention_dim),
            "timestep": zeros(1),
            "img_ids": ids.flatten(1, 2),
            "txt_ids": zeros(1, 512, len(config.axes_dims_rope)),
        }
        return (), kwargs | ({"guidance": zeros(1)} if config.guidance_embeds else {})
