"""The command line: help at once, one line for every mistake, whole files or none, pictures that can be drawn again."""

import json
import os
import resource
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

import diffguide
from diffguide import cli
from diffguide.cli import machine
from diffguide.errors import SteeringError
from diffguide.layout import Layout
from diffguide.planning import plan
from diffguide.recipe import Recipe

PROMPT = "a red circle and a blue square"
COMMANDS = (
    "generate",
    "maps",
    "run",
    "methods",
    "families",
    "zoo",
    "zoo list",
    "zoo train",
    "zoo card",
    "bench",
    "doctor",
    "demo",
)
REGIONS = [
    {"phrase": "red circle", "box": [0.1, 0.1, 0.5, 0.5]},
    {"phrase": "blue square", "box": [0.5, 0.5, 0.9, 0.9]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def loaded(model):
    from diffguide.pipelines.source import load

    return load(model, device="cpu")


@pytest.fixture
def here(tmp_path, monkeypatch, loaded, model):
    """An empty working folder with layout.json; the tiny model is loaded once for all tests."""
    from diffguide.pipelines import demo, run, source

    def once(name, dtype="float32", device=None):
        source.usable(device)
        return loaded if str(name) == model else source.load(name, dtype, device)

    monkeypatch.setattr(run, "load", once)
    monkeypatch.setattr(demo, "load", once)
    monkeypatch.chdir(tmp_path)
    Path("layout.json").write_text(json.dumps({"version": 1, "regions": REGIONS}))
    return tmp_path


def draws(model, *options):
    return ["generate", PROMPT, "--model", model, "--steps", "2", "--device", "cpu", *options]


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def error(capsys) -> str:
    """The one line of error on stderr."""
    out, err = capsys.readouterr()
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffguide: error: "), err
    assert not out
    return lines[0]


def fresh(program: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(diffguide.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)


def test_help_imports_no_torch_and_takes_no_time():
    lines = [[*command.split(), "--help"] for command in ("", *COMMANDS)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ran = fresh(
        f"import sys; from diffguide.cli import main\ncodes = [main(line) for line in {lines!r}]\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'pydantic', 'PIL'} & set(sys.modules)\n"
        "assert not any(codes) and not heavy, (codes, heavy)"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ran.stdout.count("usage: diffguide") == len(lines)
    # of the processor, whoever else is busy, for all of them in one process
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_importing_the_package_is_cheap_and_its_names_are_real():
    fresh(
        "import sys, diffguide as dg; dir(dg); dg.zoo.names(); assert 'torch' not in sys.modules and 'Bacon' in dir(dg)"
    )
    fresh(
        "from diffguide import *; assert {Guide, Layout, Region, Recipe, Bacon, PAG, param, pipelines, zoo, ParamError}"
    )
    for name in diffguide.__getattr__("__all__"):
        assert getattr(diffguide, name) is not None
    from diffguide.processors import methods

    assert {cls.__name__ for cls in methods().values()} <= set(dir(diffguide))
    with pytest.raises(AttributeError, match="no attribute 'Bakon'"):
        _ = diffguide.Bakon


def test_a_picture_is_redrawn_from_itself_bit_identically(here, model, capsys):
    line = draws(
        model, "--layout", "layout.json", "--set", "bacon.first_iterations=2", "--num-images", "2", "--seed", "4"
    )
    assert cli.main([*line, "--out", "out/x.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [p["path"] for p in told["pictures"]] == [str(Path("out/x-4.png")), str(Path("out/x-5.png"))]
    assert [p["seed"] for p in told["pictures"]] == [4, 5] and told["pictures"][0]["report"]["backwards"] == 2
    assert told["recipe"]["methods"] == [{"name": "bacon", "params": {"first_iterations": 2}}]
    assert cli.main(["run", "out/x-5.png", "--out", "again.png"]) == 0
    assert capsys.readouterr().out == "again.png\n"
    first, second, again = (pixels(f) for f in ("out/x-4.png", "out/x-5.png", "again.png"))
    assert np.array_equal(second, again) and not np.array_equal(first, second)
    assert Recipe.load("again.png") == Recipe.load("out/x-5.png")
    Path("recipe.json").write_text(json.dumps(told["recipe"]))
    assert cli.main(["run", "recipe.json", "--out", "all"]) == 0
    assert sorted(p.name for p in Path("all").iterdir()) == ["4.png", "5.png"]
    assert np.array_equal(second, pixels("all/5.png"))


def test_maps_are_written_as_pictures_and_arrays(here, model, capsys):
    options = ["--model", model, "--steps", "2", "--device", "cpu"]
    assert cli.main(["maps", PROMPT, *options, "--words", "red circle, blue", "--out", "seen", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["pictures"]
    assert sorted(p.name for p in Path("seen").iterdir()) == ["blue.png", "maps.npz", "picture.png", "red-circle.png"]
    assert [Path(p).name for p in told["maps"]] == ["red-circle.png", "blue.png", "maps.npz"]
    with np.load("seen/maps.npz") as arrays:
        assert list(arrays["words"]) == ["red circle", "blue"] and arrays["maps"].shape == (2, 16, 16)
    assert pixels("seen/blue.png").shape == (384, 384, 3)
    assert cli.main(draws(model, "--maps", "more", "--out", "p.png")) == 0
    assert {"circle.png", "square.png", "maps.npz"} <= {p.name for p in Path("more").iterdir()}
    assert np.array_equal(pixels("p.png"), pixels("seen/picture.png"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "bacom"], "no method is called 'bacom'"),
        (["--method", "pag", "--set", "pag.sale=1"], "no parameter 'sale'"),
        (["--method", "pag", "--set", "pag.scale=21"], "outside [0, 20]"),
        (["--method", "pag", "--set", "pag.scale=much"], "not a number"),
        (["--set", "pag.scale=1"], "add --method pag"),
        (["--method", "pag,pag"], "more than once"),
        (["--method", "bacon"], "--layout"),
        (["--layout", "nowhere.json"], "nowhere.json"),
        (["--layout", "layout.json", "--plan"], "not allowed with argument --layout"),
        (["--plan", "some"], "--plan"),
        (["--layout", "folder"], "folder"),
        (["--layout", "broken.json"], "not JSON"),
        (["--layout", "outside.json"], "outside [0, 1]"),
        (["--layout", "inverted.json"], "not below x1"),
        (["--layout", "other.json"], "green star"),
        (["--scheduler", "ddmi"], "no scheduler is called 'ddmi'"),
        (["--steps", "0"], "steps"),
        (["--steps", "some"], "--steps"),
        (["--seed", "-1"], "seed"),
        (["--width", "33"], "width"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "quantum"], "device = 'quantum'"),
        (["--model", "folder"], "no model_index.json"),
        (["--model", "layout.json"], "is a file"),
        (["--model", "nowhere"], "no model is called 'nowhere'"),
        (["--out", "layout.json/x.png"], "cannot write layout.json/x.png"),
        (["--out", "x.jpg"], "only a .png"),
        (["--maps", "layout.json"], "cannot write layout.json"),
        (["--unknown"], "--unknown"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(here, model, capsys, options, said):
    Path("folder").mkdir()
    Path("broken.json").write_text("{")
    for name, phrase, box in (
        ("outside", "red circle", [0.1, 0.1, 1.5, 0.5]),
        ("inverted", "red circle", [0.5, 0.1, 0.1, 0.5]),
        ("other", "green star", [0.1, 0.1, 0.5, 0.5]),
    ):
        Path(f"{name}.json").write_text(json.dumps({"version": 1, "regions": [{"phrase": phrase, "box": box}]}))
    before = set(here.rglob("*"))
    assert cli.main(draws(model, *options)) == 2
    assert said in error(capsys)
    assert set(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["run", "nowhere.png"], "nowhere.png"),
        (["run", "plain.png"], "carries no recipe"),
        (["run", "layout.json"], "this is a layout, not a recipe"),
        (["methods", "bacom"], "no method is called 'bacom'"),
        (["zoo", "card", "big-unet"], "no embedded model is called 'big-unet'"),
        (["zoo", "train", "big-unet", "--work", "w"], "no embedded model is called 'big-unet'"),
        (["zoo", "train", "shapes-unet", "--work", "w", "--steps", "0"], "--steps = 0"),
        (["zoo", "train", "shapes-unet", "--work", "layout.json"], "cannot write"),
        (["bench", "layout", "--limit", "0"], "--limit = 0"),
        (["demo", "--out", "demo.gif"], "only a .png"),
        (["heads"], "COMMAND"),
        (["heads", "show", "nobody"], "no preset of heads is called 'nobody'"),
        (["heads", "use", "nobody", "a cat"], "no preset of heads is called 'nobody'"),
        (["heads", "search", "--objective", "beauty"], "no objective is called 'beauty'"),
        (["heads", "search", "--model", "some/model"], "give prompts to judge heads by"),
        (["heads", "search", "--keep", "0"], "keep = 0"),
        (["heads", "search", "--pictures", "0"], "--pictures 0: give 1 or more"),
        (["heads", "search", "--pictures", "9", "--prompt", "a fox"], "--pictures is of the embedded world's prompts"),
        (["heads", "search", "--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_other_commands_tell_mistakes_likewise(here, capsys, line, said):
    Image.new("RGB", (8, 8)).save("plain.png")
    assert cli.main(line) == 2
    assert said in error(capsys)


def test_a_recipe_is_not_written_over(here, model, capsys):
    assert cli.main(draws(model, "--out", "x.png")) == 0
    kept = Path("x.png").read_bytes()
    capsys.readouterr()
    assert cli.main(["run", "x.png", "--out", "./x.png"]) == 2
    assert "is the recipe itself" in error(capsys) and Path("x.png").read_bytes() == kept


@pytest.mark.parametrize(("fault", "code"), [(SteeringError("lost the way"), 2), (KeyboardInterrupt(), 130)])
def test_a_run_that_fails_midway_leaves_whole_files_only(here, model, capsys, monkeypatch, loaded, fault, code):
    calls = []
    plain = type(loaded).__call__

    def failing(self, prompt=None, height=None, width=None, num_inference_steps=2, guidance_scale=1.0, generator=None):
        calls.append(prompt)
        if len(calls) == 2:
            raise fault
        return plain(self, prompt, num_inference_steps=num_inference_steps, generator=generator)

    monkeypatch.setattr(type(loaded), "__call__", failing)
    before = {p.name for p in here.iterdir()}
    assert cli.main(draws(model, "--num-images", "3", "--out", "x.png")) == code
    assert {p.name for p in here.iterdir()} - before == {"x-0.png"}
    assert pixels("x-0.png").shape == (32, 32, 3)
    err = capsys.readouterr().err
    assert err.count("diffguide: error: lost the way") == (code == 2) and "Traceback" not in err


def test_a_layout_is_planned_from_the_prompt(here, model, capsys):
    assert cli.main(["plan", "three red cats above a dog", "--out", "p.json"]) == 0
    assert capsys.readouterr().err.strip() == "planned: 3 x 'red cats', 1 x 'dog'"
    assert cli.main(["plan", "three red cats above a dog", "--seed", "1"]) == 0
    assert (
        Layout.from_json(capsys.readouterr().out) == plan("three red cats above a dog", seed=1) != Layout.load("p.json")
    )
    assert cli.main(["plan", "in the park"]) == 2 and "no noun phrase found" in error(capsys)
    prompt = "a red circle and a blue square"
    assert cli.main(["generate", prompt, "--plan", "3", "--model", model, "--steps", "2", "--out", "g.png"]) == 0
    recipe = Recipe.load("g.png")
    assert recipe.layout == plan(prompt, seed=3) and [m.name for m in recipe.methods] == ["bacon"]


def test_what_holds_no_preset_is_told(here, capsys):
    (here / "empty").mkdir()
    (here / "bad.json").write_text("{bad")
    for name, text in (("empty", "empty holds no preset.json: `diffguide heads search"), ("bad.json", "is no preset")):
        assert cli.main(["heads", "show", name]) == 2 and text in error(capsys)


def test_heads_are_searched_shown_and_used(here, model, capsys):
    line = ["heads", "search", "--model", model, "--layers", "mid", "--keep", "1", "--steps", "1", "--out", "found"]
    assert cli.main([*line, "--prompt", "a red circle", "--objective", "contrast"]) == 0
    heads, *files = capsys.readouterr().out.split()
    assert heads in ("L2H0", "L2H1") and files == ["found/preset.json", "found/heads.png", "found/report.md"]
    assert cli.main([*line, "--prompt", "a red circle", "--objective", "contrast", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["heads"] == heads and set(told["rounds"][0]) == {"L2H0", "L2H1"}
    assert cli.main([*line, "--prompt", "a red circle", "--objective", "brightness"]) == 2
    assert "has a search with other objective ('contrast' there, 'brightness' here); name another" in error(capsys)
    assert cli.main(["heads", "show", "found"]) == 0 and f"; {heads}; for " in capsys.readouterr().out
    assert cli.main(["heads", "show"]) == 0 and "sd3-medium-dark: darker; L1H10" in capsys.readouterr().out
    assert cli.main(["heads", "show", "sd3-medium-dark", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["presets"][0]["heads"] == "L1H10"
    used = ["heads", "use", "found", "a red circle", "--steps", "1", "--out", "u.png", "--set", "soft-pag.blend=0.25"]
    assert cli.main(used) == 0
    (spec,) = Recipe.load("u.png").methods
    assert spec.name == "soft-pag" and spec.params["heads"] == heads and spec.params["blend"] == 0.25
    assert cli.main(["heads", "show", "@sd3-medium-dark"]) == 0 and "L1H10" in capsys.readouterr().out


def test_a_search_that_finds_nothing_says_so(here, model, capsys):
    line = ["heads", "search", "--model", model, "--layers", "mid", "--keep", "1", "--steps", "1", "--out", "found"]
    assert cli.main([*line, "--blend", "0", "--prompt", "a red circle", "--objective", "contrast"]) == 0
    assert "note: nothing tried is above the plain pictures" in capsys.readouterr().err


def test_a_preset_of_another_model_is_told(here, model, capsys):
    heads = "soft-pag.heads=L0H0,@sd3-medium-dark"
    assert cli.main(draws(model, "--method", "soft-pag", "--set", heads, "--out", "x.png")) == 2
    note, refusal = capsys.readouterr().err.strip().splitlines()[:2]
    assert note.startswith("note: @sd3-medium-dark was found for stabilityai/") and note.endswith(f" on {model}")
    assert "L1H10 is not there" in refusal


def test_an_unused_layout_is_told(here, model, capsys):
    assert cli.main(draws(model, "--layout", "layout.json", "--method", "none", "--out", "x.png")) == 0
    assert "nothing uses the layout" in capsys.readouterr().err
    assert Recipe.load("x.png").layout is not None and not Recipe.load("x.png").methods


def test_a_method_that_changes_nothing_is_told(here, model, capsys):
    assert cli.main(draws(model, "--method", "nag", "--out", "x.png")) == 0
    assert "note: nag changes nothing at these settings; diffguide methods nag" in capsys.readouterr().err


def test_every_knob_is_in_the_table(capsys):
    from diffguide.processors import methods

    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    for name, cls in methods().items():
        section = shown.partition(f"{name}: ")[2].partition("\n\n")[0]
        assert all(f"  {knob.name} " in section and knob.help in section for knob in cls.params())
    assert cli.main(["methods", "pag", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["methods"]] == ["pag"]


def test_the_doctor_tells_what_is_there(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] and "float32" in found["devices"][0]["dtypes"]
    assert {e["name"] for e in found["extras"]} == set(machine.EXTRAS)
    monkeypatch.setattr(machine, "LIBRARIES", ("torch", "no-such-library"))
    monkeypatch.setattr(machine, "EXTRAS", {"app": ("no_such_module", "the editor")})
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "no-such-library MISSING" in shown and "pip install 'diffguide[app]'" in shown


def test_the_demo_draws_both_and_tells_the_verdict(here, model, capsys):
    assert (
        cli.main(["demo", "--out", "new/demo.png", "--model", model, "--steps", "2", "--device", "cpu", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert [v["title"] for v in told["verdicts"]] == ["unguided", "guided by bacon"]
    assert all(len(v["objects"]) == 3 for v in told["verdicts"])
    height, width, _ = pixels("new/demo.png").shape
    assert width > 2 * 384 and height > 384 + 5 * 20
    assert [m.name for m in Recipe.load("new/demo.png").methods] == ["bacon"]


def test_a_bench_gets_its_options(here, monkeypatch, capsys):
    seen = {}
    fake = types.ModuleType("diffguide.bench")
    fake.names = lambda: ["layout"]
    fake.run_bench = lambda name, **options: seen.update(options, name=name)
    monkeypatch.setitem(sys.modules, "diffguide.bench", fake)
    monkeypatch.setattr(diffguide, "bench", fake, raising=False)
    assert cli.main(["bench", "layout", "--methods", "none,bacon", "--limit", "3", "--json", "f.json"]) == 0
    assert seen["cases"] is None
    assert seen["name"] == "layout" and seen["methods"] == ["none", "bacon"] and seen["limit"] == 3
    assert seen["model"] == "shapes-unet" and seen["json"] == "f.json" and seen["seeds"] is None
    assert cli.main(["bench", "lay"]) == 2
    assert "no bench is called 'lay' (known: layout)" in error(capsys)


def test_a_setting_may_hold_commas():
    from diffguide.cli.looking import listed

    assert listed("none, bacon+sides=8,16+scale=50,pag") == ["none", "bacon+sides=8,16+scale=50", "pag"]
    assert listed("bacon+sides=8,16,pag+scale=2") == ["bacon+sides=8,16", "pag+scale=2"]
    assert listed("soft-pag+heads=L2H1,L3+blend=1,seg") == ["soft-pag+heads=L2H1,L3+blend=1", "seg"]


def test_training_is_asked_for_and_only_a_finished_model_is_exported(here, monkeypatch, capsys):
    from diffguide.zoo import train

    asked, exported, results = [], [], [None, here / "pipeline"]
    monkeypatch.setattr(train, "train", lambda *given, **more: asked.append((*given, more)) or results.pop(0))
    fake = types.ModuleType("diffguide.zoo.export")
    fake.export = lambda folder, **more: exported.append((folder, more["name"]))
    monkeypatch.setitem(sys.modules, "diffguide.zoo.export", fake)
    line = ["zoo", "train", "shapes-unet", "--work", "w", "--steps", "7", "--minutes", "1", "--seed", "3"]
    assert cli.main(line) == 0 and not exported
    assert "the same command carries on" in capsys.readouterr().err
    assert cli.main(line) == 0 and exported == [(Path("w"), "shapes-unet")]
    work, plan, device, name, more = asked[0]
    assert (work, plan.steps, plan.seed, device, name, more["workers"]) == (Path("w"), 7, 3, "cpu", "shapes-unet", 1)
