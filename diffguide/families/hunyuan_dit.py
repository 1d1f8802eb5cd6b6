"""HunyuanDiT: separate self- and cross-attention; the words of BERT, then those of mT5."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffguide import tokens
from diffguide.family import Arguments, Batch, Encoding, Family, bare, blank, self_and_cross, together
from diffguide.site import Grid, Site

BERT = 77  # its text states


class HunyuanDiT(Family):
    """`HunyuanDiT2DModel`: 77 text states of BERT, then 256 of mT5; half of the predicted channels are variance."""

    models = ("HunyuanDiT2DModel",)
    latent = ("hidden_states", 0)
    kinds = ("self", "cross")
    shared = ("image_rotary_emb",)

    def sites(self, model: nn.Module) -> list[Site]:
        level = round(math.log2(bare(model).config.patch_size))  # type: ignore[union-attr]
        return self_and_cross(model, "blocks", level)

    def branches(self, pipe: Any, batch: Batch) -> dict[str, slice]:
        return together(pipe, batch)

    def channels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return bare(model).config.in_channels  # type: ignore[union-attr]

    def words(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return kwargs["encoder_hidden_states"].shape[1] + kwargs["encoder_hidden_states_t5"].shape[1]

    def texts(self, pipe: Any, prompt: str, encoding: Encoding) -> list[tokens.Text]:
        """In the part of BERT, and in that of mT5."""
        states = encoding.states and BERT, max(0, encoding.states - BERT)
        bert = replace(self._text(pipe, prompt, encoding), states=states[0])
        if getattr(pipe, "tokenizer_2", None) is None:
            return [bert]
        return [bert, tokens.Text(pipe.tokenizer_2, prompt, states=states[1], first=BERT)]

    def term(self, model: nn.Module, d: Tensor) -> Tensor:
        """The variance half stays."""
        half = d.shape[1] // 2
        return torch.cat([d[:, :half], torch.zeros_like(d[:, half:])], 1)

    def example_size(self, model: nn.Module) -> Grid:
        return 128, 128

    def example(self, model: nn.Module, size: Grid) -> Arguments:
        config: Any = bare(model).config
        zeros = blank(model)
        n = (size[0] // config.patch_size) * (size[1] // config.patch_size)
        return (zeros(1, config.in_channels, *size), zeros(1)), {
            "encoder_hidden_states": zeros(1, BERT, config.cross_attention_dim),
            "text_embedding_mask": zeros(1, BERT) + 1,
            "encoder_hidden_states_t5": zeros(1, 256, config.cross_attention_dim_t5),
            "text_embedding_mask_t5": zeros(1, 256) + 1,
            "image_meta_size": zeros(1, 6),
            "style": zeros(1).long(),
            "image_rotary_emb": (zeros(n, config.attention_head_dim),) * 2,
        }
