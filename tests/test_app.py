"""The editor without a browser: what it draws with, what it tells, what it refuses, and how it stops."""

import json
import shlex
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffguide import cli, describe, zoo
from diffguide.errors import DiffguideError, LayoutError, ModelError, OutputError, ParamError, RecipeError
from diffguide.layout import Layout, Region
from diffguide.recipe import MethodSpec, Recipe, save_png

gr = pytest.importorskip("gradio", reason="the editor needs the extra app")

from diffguide.app import canvas, knobs, problems, results, run, safety, sweep  # noqa: E402
from diffguide.app.form import Form, fields_of, served  # noqa: E402

pytestmark = pytest.mark.skipif("shapes-unet" not in zoo.names(), reason="shapes-unet has not been trained here")
PROMPT = "a red circle and a blue square"
LAYOUT = Layout(Region("a red circle", box=(0.1, 0.1, 0.5, 0.5)), Region("a blue square", box=(0.5, 0.5, 0.9, 0.9)))
NASTY = "<img src=x onerror=alert(1)> ${alert(1)} {{alert}} '\"`"


@pytest.fixture(scope="module")
def runner():
    return run.Runner(["shapes-unet"], "cpu")


def recipe_of(**changes):
    given = {"model": "shapes-unet", "prompt": PROMPT, "steps": 4, "guidance_scale": 4.0, "device": "cpu", "seed": 3}
    return Recipe(**given | changes)


def form_of(recipe, **changes):
    return Form(**fields_of(recipe, (128, 128)) | {"methods": recipe.methods} | changes)


def pixels(image):
    return np.asarray(image.convert("RGB"))


# The layout.


def test_a_layout_goes_to_the_canvas_and_back_unchanged():
    mask = np.zeros((8, 8))
    mask[2:5, 3:7] = 1
    layout = Layout(
        Region("two owls", boxes=[(0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.4, 0.4)], weight=1.5, negative="blur"),
        Region("two owls", box=(0.6, 0.6, 0.9, 0.9), weight=1.5, negative="blur"),  # a region of its own, as given
        Region("a fox", mask=mask, occurrence=1),
        base="a forest",
        overlap="last",
    )
    value = json.loads(json.dumps(canvas.value_of(layout, (128, 128))))
    assert canvas.layout_of(canvas.drawing_of(value)) == layout
    assert canvas.layout_of(canvas.drawing_of(canvas.value_of(None, (8, 8)))) is None


def test_hand_drawn_boxes_of_one_phrase_are_its_instances():
    items = [{"id": f"n{n}", "phrase": "two owls ", "box": [0.1 * n, 0.1, 0.1 * n + 0.1, 0.3]} for n in (1, 4)]
    (region,) = canvas.layout_of(canvas.drawing_of({"items": items})).regions
    assert region == Region("two owls", boxes=[(0.1, 0.1, 0.2, 0.3), (0.4, 0.1, 0.5, 0.3)])


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ({"phrase": " "}, "region 1 has no phrase"),
        ({"box": [0.5, 0.5, 0.5, 0.9]}, "region 1, 'x', has no area"),
        ({"box": [0.5, 0.5, 0.9]}, "box"),
        ({"box": [0, 0, 7, 1]}, "box"),
        ({"box": [float("nan"), 0, 1, 1]}, "box"),
        ({"phrase": "x" * 301}, "phrase"),
        ({"color": "red;}"}, "color"),
        ({"id": "<b>"}, "id"),
        ({"mask": "file:///etc/passwd"}, "mask"),
        ({"mask": "png:AAAA"}, "mask"),
        ({"path": "x"}, "path: unknown field"),
    ],
)
def test_what_no_hand_draws_is_refused_by_name(item, fault):
    value = {"items": [{"id": "a", "phrase": "x", "box": [0, 0, 1, 1]} | item]}
    with pytest.raises(LayoutError, match=fault):
        canvas.layout_of(canvas.drawing_of(value))


def test_too_many_boxes_are_refused():
    item = {"phrase": "x", "box": [0, 0, 1, 1]}
    with pytest.raises(LayoutError, match="items"):
        canvas.drawing_of({"items": [item | {"id": f"n{n}"} for n in range(129)]})


# Methods and their knobs.


def test_every_method_is_offered_in_some_mode_with_all_its_knobs():
    rows = json.loads(json.dumps(describe.table()))
    assert {row["mode"] for row in rows} == set(knobs.modes()) and knobs.modes()[0] == "generate"
    for row in rows:
        for knob in row["params"]:
            assert knob["type"] in {
                "choice",
                "true/false",
                "start:stop",
                "number",
                "integer",
                "text",
                "text,...",
                "number,...",
                "integer,...",
            }, "the page has a control for each of these"


def test_a_method_of_a_new_mode_makes_the_mode(monkeypatch):
    class Edit(type(describe.make("pag"))):
        mode = "edit"

    there = {**describe.methods(), "my-edit": Edit}
    monkeypatch.setattr(describe, "methods", lambda: there)
    assert knobs.modes() == ["generate", "edit", "maps"] and knobs.only("maps") == "capture-maps"


def test_wrong_methods_are_told_by_name():
    with pytest.raises(ParamError, match="chosen twice"):
        knobs.specs_of({"methods": [{"name": "pag"}, {"name": "pag"}]})
    with pytest.raises(ParamError, match="expected a list"):
        knobs.specs_of({"methods": "pag"})
    with pytest.raises(ParamError, match="unknown field"):
        knobs.specs_of({"methods": [{"name": "pag", "code": "x"}]})
    with pytest.raises(ParamError, match=r"PAG.scale = 99 is outside \[0, 20\]"):
        form_of(recipe_of(), methods=knobs.specs_of({"methods": [{"name": "pag", "params": {"scale": 99}}]})).recipe(
            "cpu", "float32"
        )


def test_the_heat_map_is_that_of_the_search(tmp_path):
    lines = [
        {"round": -1, "unit": None, "scores": [1.0, 2.0], "seconds": 1},
        {"round": 0, "unit": [0, 1], "scores": [2.0, 3.0], "seconds": 1},
        {"round": 0, "unit": [1, 0], "scores": [None, 3.0], "seconds": 1},
        {"round": 1, "unit": [1, 1], "scores": [9.0, 9.0], "seconds": 1},
    ]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert knobs.heat_of(tmp_path) == {"plain": 1.5, "scores": {"L0H1": 2.5}, "model": ""}
    assert knobs.heat_of(tmp_path / "nothing") is None and knobs.heat_of(None) is None


# Problems.


def levels(found, level):
    return [note["text"] for note in found if note["level"] == level]


def test_a_sound_form_has_no_problems_and_tells_passes_and_memory(runner):
    found = problems.examine(form_of(recipe_of(layout=LAYOUT, methods=[MethodSpec(name="bacon")])), runner)
    assert levels(found, "fine") and not levels(found, "problem")
    assert any("1 of 4 steps" in text for text in levels(found, "fact"))
    assert any("MiB" in text for text in levels(found, "fact"))


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({"prompt": " "}, "problem", "the prompt is empty"),
        ({"prompt": "a red circle"}, "problem", "blue square"),
        ({"methods": []}, "warning", "the regions do nothing: no method is chosen"),
        ({"methods": [MethodSpec(name="pag")]}, "warning", "pag ignores regions"),
        ({"layout": None}, "problem", "bacon needs regions"),
        ({"methods": [MethodSpec(name="bacon", params={"layers": "L99"})]}, "problem", "L99"),
        ({"methods": [MethodSpec(name="auto-guidance")]}, "problem", "auto"),
        ({"width": 132}, "problem", "width"),
    ],
)
def test_a_problem_is_told_before_the_run(runner, changes, level, text):
    base = recipe_of(layout=LAYOUT, methods=[MethodSpec(name="bacon")])
    form = form_of(base.model_copy(update=changes))
    found = problems.examine(form, runner)
    assert any(text.lower() in told.lower() for told in levels(found, level)), found


def test_a_region_below_one_cell_and_one_without_a_phrase_are_told(runner):
    layout = Layout(
        Region("a red circle", box=(0.1, 0.1, 0.5, 0.5)), Region("a blue square", box=(0.5, 0.5, 0.52, 0.9))
    )
    found = problems.examine(form_of(recipe_of(layout=layout, methods=[MethodSpec(name="bacon")])), runner)
    assert any("a blue square is thinner than one cell of the 16 x 16 grid" in t for t in levels(found, "warning"))
    drawing = {"items": [{"id": "a", "phrase": "", "box": [0, 0, 1, 1]}]}
    assert (
        "region 1 has no phrase"
        in levels(problems.examine(form_of(recipe_of(), drawing=drawing), runner), "problem")[0]
    )


def test_a_busy_device_is_not_disturbed_by_questions(runner):
    with runner.lock:
        found = problems.examine(form_of(recipe_of()), runner)
    assert "the device is drawing" in levels(found, "fact")[0]


# Running.


def test_a_run_tells_its_steps_and_gives_the_picture_of_the_recipe(runner):
    recipe = recipe_of(layout=LAYOUT, methods=[MethodSpec(name="bacon")], num_images=2)
    messages = list(runner.draw(recipe))
    steps = [m.step for m in messages if isinstance(m, run.Progress) and m.text.startswith("picture 1 ")]
    assert sorted(set(steps)) == [1, 2, 3, 4]
    assert any(
        m.preview and m.preview.startswith("data:image/jpeg;base64,") for m in messages if isinstance(m, run.Progress)
    )
    drawn = [m for m in messages if isinstance(m, run.Drawn)]
    plain = run.drawing.run(recipe, runner.pipe("shapes-unet"), progress=False)
    assert all((pixels(a.picture.image) == pixels(b.image)).all() for a, b in zip(drawn, plain, strict=True))


def test_maps_over_time_have_the_mean_that_the_guide_keeps(runner):
    (drawn,) = [m for m in runner.draw(recipe_of()) if isinstance(m, run.Drawn)]
    assert list(drawn.maps) == ["a", "red", "circle", "and", "blue", "square"]
    for word, steps in drawn.maps.items():
        assert steps.shape == (4, 16, 16)
        np.testing.assert_allclose(steps.mean(0), drawn.picture.maps[word], atol=1e-6)  # float32 sums of four
    assert not np.allclose(drawn.maps["red"][0], drawn.maps["red"][3], atol=1e-3)


def test_who_leaves_stops_the_run_at_its_next_step_and_frees_the_device(runner):
    calls = []
    pipe = runner.pipe("shapes-unet")
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    before = set(map(id, pipe.unet.modules()))
    messages = runner.draw(recipe_of(steps=40))
    for message in messages:
        if message.step == 2:
            break
    messages.close()
    hook.remove()
    assert len(calls) <= 4 and not runner.workers  # it was in the third step, or at the end of it
    with runner.free() as free:
        assert free
    assert set(map(id, pipe.unet.modules())) == before
    (again,) = [m for m in runner.draw(recipe_of()) if isinstance(m, run.Drawn)]
    (plain,) = run.drawing.run(recipe_of(), pipe, progress=False)
    assert (pixels(again.picture.image) == pixels(plain.image)).all()


def test_jobs_wait_for_each_other_and_one_that_waits_can_leave(runner):
    first = runner.draw(recipe_of(steps=6))
    next(first)
    second = runner.draw(recipe_of(seed=5))
    assert next(second).text == "waiting for the device"
    second.close()
    assert sum(isinstance(m, run.Drawn) for m in first) == 1 and not runner.workers
    done: list[int] = []
    threads = [
        threading.Thread(
            target=lambda n=n: done.extend(n for m in runner.draw(recipe_of(seed=n)) if isinstance(m, run.Drawn))
        )
        for n in range(3)
    ]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(done) == [0, 1, 2]


def test_an_error_comes_to_the_one_who_asked(runner):
    with pytest.raises(DiffguideError, match="blue square"):
        list(runner.draw(recipe_of(prompt="a red circle", layout=LAYOUT, methods=[MethodSpec(name="bacon")])))
    assert not runner.workers and runner.lock.acquire(blocking=False)
    runner.lock.release()


def test_a_recipe_makes_the_editor_load_nothing(runner):
    for model in ("../../etc", "some/hub-model", NASTY):
        with pytest.raises(ModelError, match="this editor serves shapes-unet"):
            list(runner.draw(recipe_of(model=model)))


# What is taken home.


@pytest.fixture(scope="module")
def kept(runner, tmp_path_factory):
    """A picture with everything that code could get wrong: quotes, masks' JSON aside, lists, windows, a scheduler."""
    recipe = recipe_of(
        prompt="a red circle and a blue square, 'quoted' \"twice\" $HOME `x`",
        negative_prompt="-blurry 'x'",
        layout=Layout(*LAYOUT.regions, base="it's"),
        scheduler="euler",
        methods=[
            MethodSpec(name="bacon", params={"scale": 60.0, "sides": [16], "window": [0.0, 0.5]}),
            MethodSpec(name="soft-pag", params={"heads": "L0H1,L2", "target": "uniform"}),
        ],
    )
    (drawn,) = [m for m in runner.draw(recipe) if isinstance(m, run.Drawn)]
    return results.keep(drawn, tmp_path_factory.mktemp("kept")), drawn


def test_the_png_carries_its_recipe(kept):
    result, drawn = kept
    assert Recipe.load(result.path) == drawn.picture.recipe == result.recipe
    assert Path(result.path).parent.joinpath(Path(result.path).name).suffix == ".png"


def test_the_python_draws_the_same_picture(kept, tmp_path, monkeypatch):
    result, drawn = kept
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(results.python_of(result.recipe), names)  # noqa: S102
    assert (pixels(Image.open("picture.png")) == pixels(drawn.picture.image)).all() and names["guide"].report.steps


def test_the_shell_draws_the_same_picture(kept, tmp_path):
    result, drawn = kept
    program = f'diffguide() {{ {shlex.quote(sys.executable)} -m diffguide "$@"; }}\n'
    text = program + results.shell_of(result.recipe)
    done = subprocess.run(
        ["bash", "-ec", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (pixels(Image.open(tmp_path / "picture.png")) == pixels(drawn.picture.image)).all()


def test_a_mask_and_a_prompt_like_an_option_go_home_too(tmp_path, monkeypatch):
    mask = np.zeros((4, 4))
    mask[1:, :2] = 1
    recipe = recipe_of(
        prompt="--red circle", layout=Layout(Region("red circle", mask=mask)), methods=[MethodSpec(name="bacon")]
    )
    names: dict = {}
    code = results.python_of(recipe)
    exec(code[code.index("layout =") : code.index("with ")], {"dg": __import__("diffguide")}, names)  # noqa: S102
    assert names["layout"] == recipe.layout
    *_, command = results.shell_of(recipe).split("END\n")
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout.json").write_text(recipe.layout.to_json())
    options = cli.parser().parse_args(words[1:])
    assert options.prompt == "--red circle"


def test_curves_and_maps_are_those_of_the_run(kept):
    result, drawn = kept
    losses = [loss["Bacon"][0] for step in drawn.picture.report.steps for loss in step.losses]
    (series,) = result.curves["series"]
    assert [y for _, y in series["points"]] == pytest.approx(losses, abs=1e-5)
    assert [x for x, _ in series["points"]] == list(range(1, len(losses) + 1))
    maps = result.maps
    assert maps["steps"] == 4 and maps["grid"] == [16, 16] and len(maps["boxes"]) == 2
    levels_ = np.frombuffer(__import__("base64").b64decode(maps["words"][1]["maps"]), np.uint8).reshape(5, 16, 16)
    word = drawn.maps[maps["words"][1]["word"]]
    expected = np.stack([word.mean(0), *word])
    np.testing.assert_allclose(levels_ / 255, expected / expected.max((1, 2), keepdims=True), atol=0.5 / 255 + 1e-6)


def test_a_form_of_a_recipe_makes_that_recipe_again(kept):
    result, _ = kept
    again = form_of(result.recipe).recipe("cpu", "float32")
    assert again == result.recipe.model_copy(update={"versions": {}})


# Grids.


def test_a_grid_turns_one_parameter_and_nothing_else():
    recipe = recipe_of(layout=LAYOUT, methods=[MethodSpec(name="bacon"), MethodSpec(name="pag", params={"scale": 2.0})])
    assert "pag.scale" in sweep.names(["bacon", "pag"])
    jobs = sweep.recipes(recipe, "pag.scale", "1, 2,4")
    assert [job.methods[1].params for _, job in jobs] == [{"scale": 1.0}, {"scale": 2.0}, {"scale": 4.0}]
    assert all(job.model_copy(update={"methods": recipe.methods}) == recipe for _, job in jobs)
    assert [job.methods[0].params for _, job in sweep.recipes(recipe, "bacon.sides", "8;8,16")] == [{"sides": [8]}, {}]
    usual = sweep.recipes(recipe, "bacon.scale", "")
    assert [job.methods[0].params.get("scale", 100.0) for _, job in usual] == [20.0, 100.0, 500.0]
    with pytest.raises(ParamError, match="outside"):
        sweep.recipes(recipe, "pag.scale", "1,99")
    with pytest.raises(ParamError, match="choose a parameter"):
        sweep.recipes(recipe, "nag.scale", "1")
    with pytest.raises(ParamError, match="at most 12"):
        sweep.recipes(recipe, "pag.scale", ",".join(["1"] * 13))


# Safety.


def test_the_output_folder_holds_pictures_alone(tmp_path):
    folder = safety.output_folder(tmp_path / "new" / "one")
    save_png(Image.new("RGB", (8, 8)), folder / "a.png", recipe_of())
    assert safety.output_folder(folder) == folder
    for name in ("page.html", ".secret.png", "notes.txt"):
        (folder / name).write_text("x")
        with pytest.raises(OutputError, match="files alone"):
            safety.output_folder(folder)
        (folder / name).unlink()
    (folder / "link.png").symlink_to(tmp_path)
    with pytest.raises(OutputError, match=r"link\.png"):
        safety.output_folder(folder)


def test_other_machines_need_a_password_or_a_word_of_ours():
    safety.check_host("127.0.0.1", [], False)
    safety.check_host("::1", [], False)
    safety.check_host("0.0.0.0", [("a", "b")], False)
    safety.check_host("0.0.0.0", [], True)
    with pytest.raises(ParamError, match="--auth"):
        safety.check_host("0.0.0.0", [], False)
    assert safety.logins(["me:a:b"]) == [("me", "a:b")]
    with pytest.raises(ParamError, match="NAME:PASSWORD") as told:
        safety.logins(["hunter2"])
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize("heads", ["@../../x.json", "mid,@/etc/passwd", "@flux.json"])
def test_a_parameter_opens_no_file(heads):
    recipe = recipe_of(methods=[MethodSpec(name="soft-pag", params={"heads": heads})])
    with pytest.raises(ParamError, match="reads presets alone"):
        served(recipe, "cpu", "float32")


def test_what_is_too_large_is_refused():
    for changes in ({"steps": 900}, {"num_images": 60}, {"width": 8192, "height": 8192}):
        with pytest.raises(ParamError, match="an editor draws at most"):
            served(recipe_of(**changes), "cpu", "float32")
    with pytest.raises(RecipeError, match="unknown field"):
        Recipe.from_json({**recipe_of().to_dict(), "code": "x"})


def test_previews_stay_small_and_cheap(runner):
    from diffguide.app.preview import CELLS, Previews, thumbnail

    pipe = runner.pipe("shapes-unet")
    image = thumbnail(pipe, torch.randn(1, 4, 128, 64))
    assert image.size == (CELLS // 2 * 8, CELLS * 8)
    previews = Previews(pipe)
    previews.spent = 1e9
    assert previews.of(torch.randn(1, 4, 16, 16)) is None


def test_the_command_tells_what_is_wrong_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken = socket.create_server(("127.0.0.1", 0))
    cases = [
        (["--host", "0.0.0.0"], "--auth"),
        (["--auth", "x"], "NAME:PASSWORD"),
        (["--model", "nothing-such"], "no model is called"),
        (["--device", "cuda:77"], "cannot be used"),
        (["--output-dir", str(Path(__file__).parent)], "may hold .png files alone"),
        (["--port", "99999"], "--port 99999 is not in [1, 65535]"),
        (["--port", str(taken.getsockname()[1])], "name another, or none for a free one"),
    ]
    for options, text in cases:
        assert cli.main(["app", *options]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("diffguide: error")]
        assert text in line
    taken.close()


def test_a_painted_mask_is_the_place_of_its_region_and_goes_again():
    from diffguide.app import masks

    drawing = {"size": [128, 64], "items": [{"id": "a", "phrase": "a fox", "box": [0, 0, 0.1, 0.1], "group": 0}]}
    layer = np.zeros((64, 128, 4), np.uint8)
    layer[16:48, 32:96] = 255
    value = masks.painted({"layers": [layer]}, 1, drawing)["value"]
    (region,) = canvas.layout_of(canvas.drawing_of(value)).regions
    assert region.mask.shape == (128, 256) and region.instances[0] == pytest.approx((0.25, 0.25, 0.75, 0.75), abs=0.01)
    assert region.mask.mean() == pytest.approx(0.25, abs=0.01)
    back = masks.boxed(1, value)["value"]
    assert canvas.layout_of(canvas.drawing_of(back)).regions[0].box == pytest.approx((0.25, 0.25, 0.75, 0.75), abs=0.01)
    for which, painting in ((2, {"layers": [layer]}), (1, {"layers": [layer * 0]}), (1, None)):
        with pytest.raises(gr.Error):
            masks.painted(painting, which, drawing)
