"""The settings of a training run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What a training run is made of."""

    seed: int = 0
    pictures: int = 40_000
    vae_steps: int = 1_800
    vae_batch: int = 8
    vae_rate: float = 2e-3
    steps: int = 3_000
    batch: int = 48
    matrix_rate: float = 1.5e-3  # of Muon, for what is a matrix inside the networks
    rate: float = 1e-3  # of AdamW, for everything else
    warmup: int = 100
    fall: float = 0.3  # the last part of the steps, over which the rate falls to zero
    ema: float = 0.998
    unconditional: float = 0.10  # share of empty captions, for classifier-free guidance
    decoder_steps: int = 3_000
    decoder_rate: float = 1e-3
    keep_every: int = 250
    sheet_every: int = 500
