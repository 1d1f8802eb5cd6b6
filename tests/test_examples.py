"""The examples: each is read and compiled, those that need no trained model are run at toy size."""

import ast
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AuraFlowTransformer2DModel

from diffguide import passes, zoo
from diffguide.errors import ParamError
from diffguide.guide import Guide
from diffguide.maps import Watch

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


def test_a_family_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's AuraFlow: every image token's attention to words, to itself and to the learned tokens."""
    monkeypatch.setattr("diffguide.registry._registered", [])
    family = runpy.run_path(str(FOLDER / "own_family.py"))["AuraFlow"]()
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pos_embed_max_size=64,
    ).eval()
    args, kwargs = family.example(model, (8, 8))
    kwargs["hidden_states"] = torch.randn(1, 4, 8, 8)
    sites = family.sites(model)
    grids = {site: family.grid(site, (8, 8)) for site in sites}
    wishes = {(0, kind): (Watch(kind), sites) for kind in ("cross", "self")}
    words = family.words(args, kwargs)
    with torch.no_grad(), passes.looking(model, family, args, kwargs, wishes, grids, words=words) as sight:
        for cross, own in zip(sight.maps[0]["cross"], sight.maps[0]["self"], strict=True):
            assert cross.values.shape == (1, 16, 256) and own.values.shape == (1, 16, 16)
            share = cross.values.sum(-1) + own.values.sum(-1)
            assert (share < 1).all() and (share > 0.7).all()  # 8 learned tokens have the rest


@pytest.mark.slow
@pytest.mark.skipif("shapes-unet" not in zoo.names(), reason="shapes-unet has not been trained in this checkout")
@pytest.mark.parametrize("name", ["layout", "word_maps"])
def test_an_example_runs_on_the_embedded_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert list(tmp_path.iterdir()) and capsys.readouterr().out
