"""What this machine has: versions, devices, attention backends, extras, embedded models."""

import argparse
import os
from typing import Any

from diffguide import __version__, versions
from diffguide.cli.terminal import print_json

# what each extra of the package adds: module, and what does not work without it
EXTRAS = {
    "app": ("gradio", "the editor"),
    "metrics": ("open_clip", "CLIP scores"),
    "ray": ("ray", "sweeps over several machines"),
    "xformers": ("xformers", "xformers attention"),
    "natten": ("natten", "neighborhood attention kernels"),
    "mcp": ("mcp", "the editor as a tool server"),
    "dev": ("pytest", "tests and lint"),
}
LIBRARIES = tuple(versions.NEEDED)


def doctor(options: argparse.Namespace) -> int:
    """Look at the machine; returns 1 if a library that nothing works without is missing or of a wrong version."""
    found = examine()
    if options.json:
        print_json(found)
    else:
        print("versions: " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in found["versions"].items()))
        for text in found["strange"]:
            print(f"version: {text}")
        for device in found["devices"]:
            print(f"device {device['name']}: {device['about']}; dtypes {', '.join(device['dtypes'])}")
        print("attention: " + ", ".join(found["attention"]))
        for extra in found["extras"]:
            state = (
                "there"
                if extra["there"]
                else f"not installed, needed for {extra['for']}: pip install 'diffguide[{extra['name']}]'"
            )
            print(f"extra {extra['name']}: {state}")
        for model, folder in found["models"].items():
            print(f"model {model}: {folder or f'not trained: diffguide zoo train {model} --work FOLDER'}")
    return int(bool(found["strange"]) or any(v is None for v in found["versions"].values()))


def examine() -> dict[str, Any]:
    """Versions, devices, attention backends, extras and embedded models, as plain JSON values."""
    import importlib.util
    import platform

    from diffguide import zoo

    here: dict[str, str | None] = {"diffguide": __version__, "python": platform.python_version()}
    here |= {name: versions.installed(name) for name in LIBRARIES}
    there = {name: importlib.util.find_spec(module) is not None for name, (module, _) in EXTRAS.items()}
    return {
        "versions": here,
        "strange": [text for name in LIBRARIES if (text := versions.strange(name))],
        "devices": _devices() if here["torch"] else [],
        "attention": _attention() if here["torch"] else [],
        "extras": [{"name": name, "there": there[name], "for": use} for name, (_, use) in EXTRAS.items()],
        "models": {name: str(zoo.path(name)) if name in zoo.names() else None for name in zoo.MODELS},
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    rows = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used")]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        kind = f"compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{number}", f"{about.name}, {kind}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU"))
    return [{"name": name, "about": about, "dtypes": _dtypes(name)} for name, about in rows]


def _dtypes(device: str) -> list[str]:
    """The dtypes in which a convolution and attention, which everything here is made of, run on a device."""
    import torch
    import torch.nn.functional as F

    works = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        try:
            x = torch.zeros(1, 1, 8, 8, device=device, dtype=dtype)
            F.scaled_dot_product_attention(F.conv2d(x, x[..., :3, :3], padding=1), x, x)
            works.append(str(dtype).removeprefix("torch."))
        except RuntimeError:
            continue
    return works


def _attention() -> list[str]:
    """Torch's own routes of attention, and packages that diffusers can use where nothing is steered."""
    import importlib.util

    import torch

    routes = {
        "math": torch.backends.cuda.math_sdp_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "cudnn": torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled(),
    }
    names = [f"torch {name}" for name, on in routes.items() if on]
    return names + [m for m in ("flash_attn", "sageattention", "xformers") if importlib.util.find_spec(m) is not None]
