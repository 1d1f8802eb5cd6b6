"""Weights that are elsewhere, in another type or compiled: the gradient of a transformer stays what it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from probes import apart
from test_family_pipelines import Pull, call
from tiny_pipes import built
from torch import Tensor

from diffguide import Guide
from diffguide.errors import AttachError
from diffguide.processors import PAG

NAMES = ["sd3", "flux", "wan"]
names = pytest.mark.parametrize("name", NAMES)


def guided(pipe: Any, given: dict[str, Any]) -> Tensor:
    with Guide(pipe, Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")) as guide:
        out = call(pipe, given)
    assert guide.report.backwards == 2
    return out


def to_model(pipe: Any, model: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def one_by_one(pipe: Any, model: Any, folder: Path) -> None:
    """What `enable_sequential_cpu_offload` does to each part, with "cpu" for the accelerator.

    A pipeline without encoders asks its denoiser where to work, whose weights say "meta".
    """
    kind = type(pipe)
    pipe.__class__ = type(kind.__name__, (kind,), {"_execution_device": torch.device("cpu")})
    accelerate.cpu_offload(model, torch.device("cpu"))


def group(kind: str) -> Callable[[Any, Any, Path], None]:
    def offload(pipe: Any, model: Any, folder: Path) -> None:
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        device = torch.device("cpu")
        model.enable_group_offload(device, device, offload_type=kind, offload_to_disk_path=str(folder), **more)

    return offload


OFFLOADS = {"model": to_model, "sequential": one_by_one, "blocks": group("block_level"), "leaves": group("leaf_level")}


@names
@pytest.mark.parametrize("how", sorted(OFFLOADS))
def test_offloaded_weights_give_the_same_moves_and_weak_passes(name: str, how: str, tmp_path: Path) -> None:
    """A second generation, too. Weights that went to disk are garbage in the tensor that the backward looks at."""
    pipe, given, model = built(name)
    plain, wanted = call(pipe, given), guided(pipe, given)
    OFFLOADS[how](pipe, model, tmp_path)
    for _ in range(2):
        assert apart(guided(pipe, given), wanted) < 1e-5
    assert apart(call(pipe, given), plain) < 1e-6


@pytest.mark.parametrize("how", sorted(OFFLOADS))
def test_an_estimate_leaves_offloaded_weights_alone(how: str, tmp_path: Path) -> None:
    pipe, given, model = built("sd3")
    plain = call(pipe, given)
    OFFLOADS[how](pipe, model, tmp_path)
    plan = Guide(pipe, Pull(), PAG(layers="all")).explain(steps=4)
    assert not plan.refusals and plan.memory is None and "not estimated" in plan.lines[-1]
    assert apart(call(pipe, given), plain) < 1e-6


@pytest.mark.parametrize("name", ["sd15", *NAMES])
def test_weights_stored_in_eight_bits_give_the_gradient_of_their_values(name: str) -> None:
    """Layerwise casting against a model whose weights were rounded to the same values for good."""
    pipe, given, model = built(name)
    rounded, _, other = built(name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs.float())
    assert torch.equal(call(pipe, given), call(rounded, given))
    wanted = guided(rounded, given)
    assert Guide(pipe, Pull()).explain(steps=4).refusals == []
    assert apart(guided(pipe, given), wanted) < 1e-6
    assert torch.equal(call(pipe, given), call(rounded, given))


@names
def test_gradient_checkpointing_of_a_transformer_gives_the_same_gradient(name: str) -> None:
    pipe, given, model = built(name)
    wanted = guided(pipe, given)
    model.enable_gradient_checkpointing()
    assert apart(guided(pipe, given), wanted) < 1e-6


def test_checkpointing_does_not_go_with_weights_that_move(tmp_path: Path) -> None:
    """Refused when attaching, and in the next run where it was switched on later; without a gradient all is well."""
    for how in ("group offload", "layerwise casting"):
        pipe, given, model = built("flux")
        if how == "group offload":
            group("leaf_level")(pipe, model, tmp_path)
        else:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        fixes = r".*disable_gradient_checkpointing\(\) .* enable_model_cpu_offload\(\)"
        said = f"Pull needs gradients, which {how} and gradient checkpointing {fixes}"
        with Guide(pipe, Pull()):
            model.enable_gradient_checkpointing()
            with pytest.raises(AttachError, match=said):
                call(pipe, given)
        with pytest.raises(AttachError, match=said):
            Guide(pipe, Pull()).attach()
        with Guide(pipe, PAG(layers="all")):
            assert call(pipe, given).isfinite().all()


@names
@pytest.mark.parametrize("how", ["blocks", "wrapped", "in place"])
def test_compiled_transformers_are_steered_alike(name: str, how: str) -> None:
    pipe, given, model = built(name)
    wanted = guided(pipe, given)
    torch._dynamo.reset()
    if how == "wrapped":
        pipe.transformer = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:  # what compile_repeated_blocks does, of which SD3 has no list
        for block in model.modules():
            if type(block).__name__.endswith("TransformerBlock"):
                block.compile(backend="eager", fullgraph=True)
    assert apart(guided(pipe, given), wanted) < 1e-4


def test_repeated_blocks_are_compiled_and_steered() -> None:
    pipe, given, model = built("flux")
    wanted = guided(pipe, given)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with Guide(pipe, Pull(window=(0.0, 0.5)), PAG(scale=2.0, layers="all")) as guide:
        assert "gradient passes run without torch.compile" in guide.explain().notes
        assert apart(call(pipe, given), wanted) < 1e-4


def test_video_is_explained_with_its_frames() -> None:
    pipe, _, _ = built("wan")
    plan = Guide(pipe, Pull()).explain(steps=4, height=32, width=48)
    assert "latents 21x4x6" in plan.lines[0] and plan.memory
