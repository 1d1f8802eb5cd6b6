"""A step of a guided run with the door against the earlier way: the map by itself, from all of its logits."""

from typing import Any

import torch
from torch import nn

from diffguide.bench import thrift
from diffguide.bench.models import load
from diffguide.bench.statistics import quartiles
from diffguide.kernels import prefer
from diffguide.method import Method
from diffguide.processors import named

GUIDED = ("shapes_unet_guided", "sd15_blocks_guided")
METHODS: dict[str, dict[str, Any]] = {
    "backward-guidance": {"layout": thrift.LAYOUT},
    "bacon": {"layout": thrift.LAYOUT},
    "capture-maps": {"words": tuple(thrift.COLUMNS)},
}
BEFORE = "recompute"


def guided_step(name: str, device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """A row for each method: seconds with the door to those before, and how far its results are apart."""
    model = _model(name, device, dtype)
    rows = []
    for label, settings in METHODS.items():
        method: Method = named(label)(**settings)
        step = thrift.Pass.prepare(model, method, thrift.side(model))
        times: dict[str, list[float]] = {BEFORE: [], "auto": []}
        apart: list[float] = []
        for i in range(rounds + 1):
            found = {}
            for backend in (BEFORE, "auto") if i % 2 else ("auto", BEFORE):
                with prefer(backend):
                    seconds, found[backend] = step.run() if method.asks("loss") else step.observe()
                if i:  # the first is to warm up
                    times[backend].append(seconds)
            difference = (found["auto"] - found[BEFORE]).abs().max() / found[BEFORE].abs().max()
            apart.append(float(difference))
        ratios = [a / b for a, b in zip(times["auto"], times[BEFORE], strict=True)]
        row = {"method": label, "case": name, "n": rounds, "seconds_ratio": quartiles(ratios)}
        rows.append({**row, "seconds": quartiles(times["auto"]), "error": quartiles(apart)})
    return rows


def _model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if name == "sd15_blocks_guided":
        return thrift.sd15_shaped().to(device=device, dtype=dtype)  # type: ignore[call-overload]
    pipe, _ = load("shapes-unet", str(device), str(dtype).removeprefix("torch."))
    return pipe.unet
