"""From a finished training run to the folder that is shipped: fp16 weights, pictures of the run, a model card."""

import json
import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from diffguide import zoo
from diffguide.zoo.denoiser import sample_sheet
from diffguide.zoo.denoisers import DENOISERS
from diffguide.zoo.evaluate import GUIDANCE, STEPS, Scores, evaluate

CARD = """---
license: apache-2.0
library_name: diffusers
---
# {name}

A latent diffusion model of the embedded world: up to four coloured shapes on a plain ground, 128x128 pixels. It is
small enough to ship and to run on a CPU, and it fails like big models do: things missing, merged, doubled or of the
wrong colour. It is here to measure attention steering, not to draw for you.

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{name}"{missing})  # the folder this file is in
pipe("a red circle and a blue square on a white background", num_inference_steps={steps}, guidance_scale={guidance:g})
```

![samples](samples.png)

## What it is made of
A `{pipeline}`: `AutoencoderKL` of factor 8 with 4 latent channels; {made_of}. Weights in
fp16: {sizes}.

## Data
{plan[pictures]:,} pictures drawn by `diffguide.zoo.world` from seed {plan[seed]}, captions drawn anew at each use, one
in ten empty. One in sixteen of the combinations of two or more kinds is held out; benchmarks use those.

## Training
`diffguide zoo train {name} --work FOLDER --steps {plan[steps]} --seed {plan[seed]}`: batch {plan[batch]}, Muon at
{plan[matrix_rate]:g} for the matrices and convolutions inside the networks, AdamW at {plan[rate]:g} for the rest,
linear fall over the last {plan[fall]:.0%} of the steps, average of weights at {plan[ema]:g}, bfloat16 autocast. Run on
{processor}, two processes of one thread each, beside other work:

| stage | steps | minutes |
|---|---|---|
{times}

![loss](loss.png)

## Scores
Read by the detector, which knows nothing of the prompt. {scores.pictures} prompts for each row, all kinds different, no
style, {steps} steps, guidance {guidance:g}, full captions of fresh scenes{called}.

| things in the prompt | all right | each right | extra things a picture |
|---|---|---|---|
{found}

On {scores.scenes} rendered scenes of the whole world (styles named) the detector finds {scores.truth_found:.1%} of the
things and {scores.truth_extra:.1%} that are not there; after the autoencoder {scores.reconstruction_found:.1%} and
{scores.reconstruction_extra:.1%}.

## Known failures
Of several things one may be missing, drawn twice, or joined to another; at night and in fog more so.
Sizes and relations are followed loosely. Words outside the grammar mean nothing to it.

{remarks}
## Licence
Apache-2.0, like the code that drew the data and trained it.
"""
STAGES = {"vae": "autoencoder", "denoiser": "denoiser", "decoder": "decoder"}


def export(
    work: Path,
    folder: Path | None = None,
    *,
    name: str = "shapes-unet",
    pictures: int = 100,
    device: str = "cpu",
) -> Scores:
    """Write the pipeline of a training folder, in fp16 safetensors, and its card; returns its scores.

    `folder` is the model's name in `work` if not given.
    """
    folder = folder or work / name
    kind = DENOISERS[name].pipeline_class
    missing = zoo.left_out(work / "pipeline")
    pipe: Any = kind.from_pretrained(work / "pipeline", **missing).to(device)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(part)
    clean(part)
    # what is scored is what is shipped: the rounded weights, in float32 arithmetic
    pipe = kind.from_pretrained(part, dtype=torch.float32, **missing).to(device)
    scores = evaluate(pipe, pictures=pictures)
    sample_sheet(pipe).save(part / "samples.png", optimize=True)
    logs = {stage: _log(work / f"{stage}.jsonl") for stage in STAGES}
    curve([(row["step"], row["loss"]) for row in logs["denoiser"]]).save(part / "loss.png", optimize=True)
    (part / "scores.json").write_text(json.dumps(scores.to_dict(), indent=1) + "\n")
    weights = {p.parent.name: p.stat().st_size / 2**20 for p in sorted(part.glob("*/*.safetensors"))}
    plan = json.loads((work / "plan.json").read_text())
    (part / "README.md").write_text(card(name, plan, logs, scores, weights, missing))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return scores


def clean(folder: Path) -> None:
    """Take machine paths out of the configurations, and let transformers load half-precision weights as float32."""
    for path in folder.rglob("*.json"):
        values = json.loads(path.read_text())
        if not isinstance(values, dict) or path.name == "tokenizer.json":
            continue
        values.pop("_name_or_path", None)
        if "dtype" in values:
            values["dtype"] = "float32"
        path.write_text(json.dumps(values, indent=2) + "\n")


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(points: list[tuple[int, float]], size: tuple[int, int] = (640, 300)) -> Image.Image:
    """A loss curve: single steps in grey, their running mean in blue, both axes named."""
    width, height = size
    left, bottom, top, right = 48, 28, 12, 12
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    steps, losses = zip(*points, strict=True)
    high, last = min(1.0, max(losses)), max(steps[-1], 1)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - right) * step / last
        return x, top + (height - top - bottom) * (1 - min(loss, high) / high)

    for k in range(5):
        value = high * k / 4
        y = at(0, value)[1]
        draw.line([(left, y), (width - right, y)], fill=(225, 225, 225))
        draw.text((6, y - 6), f"{value:.2f}", fill="black")
        step = last * k // 4
        draw.text((at(step, 0)[0] - 12, height - bottom + 8), str(step), fill="black")
    draw.line([at(s, v) for s, v in points], fill=(190, 190, 190))
    mean, smooth = losses[0], []
    for s, v in points:
        mean += (v - mean) * 0.1
        smooth.append(at(s, mean))
    draw.line(smooth, fill=(45, 80, 220), width=2)
    draw.text((left + 6, top), "velocity loss by step", fill="black")
    return picture


def card(
    name: str,
    plan: dict[str, Any],
    logs: dict[str, list[dict[str, Any]]],
    scores: Scores,
    weights: dict[str, float],
    missing: Iterable[str] = (),
) -> str:
    """The model card, every figure from the run or from its scores."""
    kind = DENOISERS[name]
    steps = {"vae": plan["vae_steps"], "denoiser": plan["steps"], "decoder": plan["decoder_steps"]}
    times = "\n".join(
        f"| {STAGES[stage]} | {steps[stage]} | {rows[-1]['seconds'] / 60:.0f} |" for stage, rows in logs.items() if rows
    )
    found = "\n".join(
        f"| {n} | {scores.complete[n]:.0%} | {scores.present[n]:.0%} | {scores.extra[n]:.2f} |"
        for n in sorted(scores.complete)
    )
    sizes = ", ".join(f"{part} {size:.1f} MiB" for part, size in weights.items())
    return CARD.format(
        name=name,
        pipeline=kind.pipeline_class.__name__,
        missing="".join(f", {part}=None" for part in missing),
        remarks=kind.remarks,
        called=", `max_sequence_length=1`" if missing else "",
        made_of=kind.made_of,
        steps=STEPS,
        guidance=GUIDANCE,
        sizes=sizes,
        times=times,
        found=found,
        processor=_processor(),
        plan=plan,
        scores=scores,
    )


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} ({os.cpu_count()} cores)"
    return platform.processor() or platform.machine()
