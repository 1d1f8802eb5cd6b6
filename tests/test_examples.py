"""The examples: each is read and compiled, those that need no trained model are run at toy size."""

import ast
import runpy
from pathlib import Path

import pytest
import tiny
import torch

from diffguide import zoo
from diffguide.errors import ParamError
from diffguide.guide import Guide

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_is_short_and_says_what_it_shows(path: Path) -> None:
    source = path.read_text()
    assert ast.get_docstring(ast.parse(source)) and source.count("\n") <= 42


def test_a_method_of_ones_own() -> None:
    method = runpy.run_path(str(FOLDER / "own_method.py"), run_name="example")["Temperature"]
    pipe = tiny.sd()
    plain = tiny.call(pipe)
    with Guide(pipe, method(tau=1.0)):
        assert torch.equal(tiny.call(pipe), plain)
    with Guide(pipe, method(tau=0.2)):
        assert not torch.equal(tiny.call(pipe), plain)
    with pytest.raises(ParamError, match=r"Temperature.tau = 0.01 is outside \[0.1, 10\]"):
        method(tau=0.01)


@pytest.mark.slow
@pytest.mark.skipif("shapes-unet" not in zoo.names(), reason="shapes-unet has not been trained in this checkout")
@pytest.mark.parametrize("name", ["layout", "word_maps"])
def test_an_example_runs_on_the_embedded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.iterdir()) and capsys.readouterr().out
