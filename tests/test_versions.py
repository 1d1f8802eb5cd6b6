"""A diffusers that this release does not know: a readable word, never a crash inside a model."""

import json
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffguide import PAG, Guide, cli, versions
from diffguide.errors import DiffguideError, FamilyError
from diffguide.registry import of_model, sites_of

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_bounds_are_those_of_the_package() -> None:
    wanted = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert [f"{name}{bounds}" for name, bounds in versions.NEEDED.items()] == wanted


def test_what_is_installed_here_is_within_the_bounds() -> None:
    assert not [text for name in versions.NEEDED if (text := versions.strange(name))]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Another version of diffusers, as far as can be asked."""
    versions.warn_once.cache_clear()
    real = versions.installed
    yield lambda found: monkeypatch.setattr(
        versions, "installed", lambda name: found if name == "diffusers" else real(name)
    )
    versions.warn_once.cache_clear()


@pytest.mark.parametrize("found", ["0.42.1", "0.42.9", "0.42.10.post1", "0.42.2.dev0"])
def test_a_version_within_the_bounds_is_silent(pretend: Any, found: str) -> None:
    pretend(found)
    assert versions.strange("diffusers") == ""


@pytest.mark.parametrize("found", ["0.42.0", "0.42", "0.9.1", "0.43.0", "0.43.0.dev0", "1.0", "1.0rc1"])
def test_a_version_outside_is_told_once_with_the_fix(pretend: Any, found: str) -> None:
    pretend(found)
    pipe = tiny.sd()
    with pytest.warns(UserWarning, match=rf"diffusers {found} is not >=0.42.1,<0.43.*pip install 'diffusers"):
        Guide(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Guide(pipe)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_versions_are_in_the_order_of_their_numbers(a: list[int], b: list[int]) -> None:
    wide = max(len(a), len(b))
    first, second = (x + [0] * (wide - len(x)) for x in (a, b))
    text, bound = (".".join(map(str, x)) for x in (a, b))
    assert versions._holds(text, f">={bound}") == (first >= second)
    assert versions._holds(text + "+cu130", f"<{bound}") == (first < second)


@pytest.mark.parametrize("found", ["0.41.0", "0.42.1"])
def test_a_renamed_attribute_is_told_and_nothing_is_left(pretend: Any, found: str) -> None:
    """As if diffusers had moved the blocks, or what makes a processor exchangeable."""
    pretend(found)
    fix = "needs: pip install 'diffusers>=0.42.1,<0.43'" if found == "0.41.0" else "should do: report this"
    renamed, closed, empty = tiny.sd3(), tiny.sd3(), tiny.sd()
    renamed.transformer.blocks = renamed.transformer.transformer_blocks
    del renamed.transformer.transformer_blocks
    closed.transformer.transformer_blocks[1].attn = torch.nn.Identity()
    for name, part in list(empty.unet.named_modules()):
        if name.endswith(("attn1", "attn2")):
            part.__dict__.pop("processor", None)
            part._modules.pop("processor", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pipe, what in (
            (renamed, "has no attribute 'transformer_blocks'"),
            (closed, "transformer_blocks.1.attn has no processor"),
            (empty, "has no attention modules"),
        ):
            with pytest.raises(FamilyError, match=f"is built otherwise than expected .*{what}") as error:
                Guide(pipe, PAG(layers="all")).attach()
            assert fix in str(error.value)
            assert issubclass(type(error.value), DiffguideError)
            model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
            assert not model._forward_hooks and not model._forward_pre_hooks
            with pytest.raises(FamilyError):
                Guide(pipe, PAG()).explain()
            with pytest.raises(FamilyError):
                sites_of(of_model(model), model)


def test_the_doctor_tells_of_it(pretend: Any, capsys: Any) -> None:
    pretend("0.40.0")
    assert cli.main(["doctor", "--json"]) == 1
    (told,) = json.loads(capsys.readouterr().out)["strange"]
    assert told.startswith("diffusers 0.40.0 is not >=0.42.1,<0.43")
    assert cli.main(["doctor"]) == 1
    assert f"version: {told}" in capsys.readouterr().out
