"""Benchmarks: what a method does to pictures whose truth is known, and what it costs.

`diffguide bench NAME` runs one; the result is a dict that can be written as JSON:
`{"bench", "model", "rows": [{"method", "n", METRIC: {"value", "low", "high"}, ...}], "versions", "settings", ...}`.
"""

import functools
import importlib
import json as jsonlib
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffguide.errors import OutputError, ParamError

_LIBRARIES = ("torch", "diffusers", "transformers", "numpy")


@functools.cache
def names() -> list[str]:
    """The benches there are: the files of this folder that can check the options of one."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("*.py")}
    return sorted(name for name, text in texts.items() if re.search(r"^def check\(\*, methods", text, re.MULTILINE))


def run_bench(
    name: str,
    *,
    model: Any = "shapes-unet",
    methods: Sequence[str] | None = None,
    limit: int | None = None,
    seeds: int | None = None,
    json: str | Path | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool = True,
    batch: int | None = None,
    steps: int | None = None,
    workers: int | None = None,
    guidance_scale: float | None = None,
    against: str | None = None,
    cases: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Run a bench and return its result.

    Args:
        name: one of `names()`.
        model: an embedded model, a folder, a hub id, or a pipeline.
        methods: names of methods, each perhaps with settings: `"bacon+scale=20+window=0:0.3"`; the bench's own
            choice if not given.
        limit: use only so many scenes (layout) or repeat so often (thrift).
        seeds: pictures for each scene, from seeds 0, 1, ... (layout).
        json: file for the result.
        out: folder for a report and a contact sheet.
        device: where to run, `"cpu"`, `"cuda"`; an accelerator if there is one.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        progress: show a bar on stderr, and the table on stdout at the end.
        batch: pictures drawn at once (layout).
        steps: denoising steps (layout).
        workers: processes of one thread that share the batches, on a CPU one a core (layout); `model` must be a name.
        guidance_scale: of classifier-free guidance (benches of pictures); 1 is none.
        against: the compared method that gains are told against (benches of pictures); the plain pipeline if not given.
        cases: which calls of attention (attention).

    Raises:
        ParamError: a bench, a method or a setting is unknown or out of range.
        ModelError: the model cannot be loaded.
        OutputError: `json` or `out` cannot be written.
    """
    if name not in names():
        raise ParamError(f"no bench is called {name!r} (known: {', '.join(names())})")
    for knob, value in (("limit", limit), ("seeds", seeds), ("batch", batch), ("steps", steps), ("workers", workers)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ParamError(f"{knob} = {value!r} is not a whole number of at least 1")
    if guidance_scale is not None and not 0 <= guidance_scale <= 100:
        raise ParamError(f"guidance_scale = {guidance_scale!r} is outside [0, 100]")
    target = _writable(json)
    folder = _folder(out)
    module = importlib.import_module(f"{__name__}.{name}")
    options = {
        "methods": methods,
        "against": against,
        "limit": limit,
        "seeds": seeds,
        "batch": batch,
        "steps": steps,
        "workers": workers,
        "guidance_scale": guidance_scale,
        "cases": cases,
    }
    unknown = [knob for knob, value in options.items() if value is not None and knob not in module.OPTIONS]
    if unknown:
        raise ParamError(f"the bench {name} has no {', '.join(unknown)} (it has: {', '.join(module.OPTIONS)})")
    given = {knob: value for knob, value in options.items() if value is not None}
    module.check(**given)
    if (workers or 1) > 1:
        if not isinstance(model, str | Path):
            raise ParamError(f"workers = {workers} load their own pipelines: give the model's name or folder")
        given["source"] = (model, device, dtype)

    from diffguide.bench.models import load
    from diffguide.bench.tables import as_markdown, as_text

    if getattr(module, "MODEL", True):
        pipe, label = load(model, device, dtype)
    else:  # it has models of its own
        pipe, label = None, "calls of its own"
        given |= {"device": device, "dtype": dtype}
    frame = {"bench": name, "model": label, "versions": _versions()}
    part = target.with_name(target.name + ".part.jsonl") if target else None
    found = module.run(pipe, frame, part=part, out=folder, progress=progress, **given)
    result = {"bench": name, "model": label, "rows": found.pop("rows"), "versions": frame["versions"], **found}
    if target:
        _write(target, jsonlib.dumps(result, indent=1) + "\n")
        if part:
            part.unlink(missing_ok=True)
    if folder:
        _write(folder / "report.md", as_markdown(result))
    if progress:
        sys.stdout.write(as_text(result))
    return result


def _versions() -> dict[str, str]:
    import importlib.metadata  # a fifth of what help takes, which needs no versions

    from diffguide import __version__

    installed = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    return {"diffguide": __version__, "python": platform.python_version(), **installed}


def _writable(path: str | Path | None) -> Path | None:
    """The file, known to be in a folder that exists: hours of drawing should not end in a misspelt path."""
    if path is None:
        return None
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise OutputError(f"cannot write {target}: name a file in a folder that exists")
    return target


def _folder(path: str | Path | None) -> Path | None:
    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise OutputError(f"cannot write {path}: {fault.strerror or fault}; name a folder that can be made") from None
    return Path(path)


def _write(path: Path, text: str) -> None:
    from diffguide.files import write_atomically

    write_atomically(path, lambda file: file.write(text.encode()))
