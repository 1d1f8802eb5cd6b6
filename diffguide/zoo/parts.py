"""What all embedded models share: the autoencoder and the text encoder, untrained."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

from diffguide.zoo.tokenizer import LENGTH
from diffguide.zoo.world import SIDE

TEXT_WIDTH = 128
LATENT_CHANNELS, LATENT_SIDE = 4, SIDE // 8


def build_vae() -> Any:
    """Autoencoder of factor 8 with 4 latent channels: 128x128 pixels to 16x16 latent cells."""
    widths: Any = (16, 32, 64, 64)
    down: Any = ("DownEncoderBlock2D",) * len(widths)
    up: Any = ("UpDecoderBlock2D",) * len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIDE,
        scaling_factor=1.0,  # the latents are brought to unit variance inside the model, see `standardise`
    )


def build_text_encoder(tokenizer: Any) -> Any:
    """A CLIP text model of 3 layers."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


@torch.no_grad()
def standardise(vae: Any, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold `(z - mean) / std` into the last encoder layer and its inverse into the first decoder layer.

    `mean` and `std` are [4], of the latents over the training set. Afterwards the latents have zero mean and unit
    variance, and the pipeline's scaling factor of 1 is right.
    """
    encode, decode = vae.quant_conv, vae.post_quant_conv
    n = len(mean)
    encode.weight[:n] /= std[:, None, None, None]
    encode.bias[:n] = (encode.bias[:n] - mean) / std
    encode.weight[n:] = 0  # the log-variances were never trained: the encoder is deterministic
    encode.bias[n:] = -30
    decode.bias += (decode.weight[:, :, 0, 0] * mean).sum(1)
    decode.weight *= std[None, :, None, None]
