"""Recipes carried out: the same recipe gives the same pixels, and the pipeline is given back as it was."""

import json

import numpy as np
import pytest
import tiny
import torch

from diffguide import pipelines, zoo
from diffguide.errors import LayoutError, ModelError, ParamError, PromptError
from diffguide.layout import Layout, Region
from diffguide.pipelines.run import draw, run
from diffguide.pipelines.source import SCHEDULERS, load
from diffguide.recipe import MethodSpec, Recipe

PROMPT = "a red circle and a blue square"
LAYOUT = Layout(Region("red circle", box=(0.1, 0.1, 0.5, 0.5)), Region("blue square", box=(0.5, 0.5, 0.9, 0.9)))
BACON = MethodSpec(
    name="bacon", params={"first_iterations": 2, "iterations": 1, "threshold": 0.0, "window": [0.0, 0.5]}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    return load(folder, device="cpu")


def recipe(**changed) -> Recipe:
    given = {"model": "tiny", "prompt": PROMPT, "layout": LAYOUT, "steps": 4, "device": "cpu", "methods": (BACON,)}
    return Recipe(**(given | changed))


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.image)


def test_a_picture_is_redrawn_alone_bit_identically(pipe, folder):
    pictures = run(recipe(num_images=3, seed=5), pipe, progress=False)
    assert [p.recipe.index for p in pictures] == [0, 1, 2] and [p.seed for p in pictures] == [5, 6, 7]
    assert not np.array_equal(pixels(pictures[0]), pixels(pictures[1]))
    again = Recipe.from_json(pictures[2].recipe.model_copy(update={"model": str(folder)}).to_json())
    (alone,) = run(again, index=again.index, progress=False)  # loaded anew
    assert np.array_equal(pixels(alone), pixels(pictures[2]))


def test_picture_i_is_picture_0_of_the_next_seed(pipe):
    _, second = run(recipe(num_images=2, seed=8), pipe, progress=False)
    (first,) = run(recipe(seed=9), pipe, progress=False)
    assert np.array_equal(pixels(first), pixels(second))


def test_a_plain_recipe_is_the_pipeline_itself(pipe):
    (ours,) = run(recipe(methods=(), seed=3), pipe, progress=False)
    plain = pipe(PROMPT, num_inference_steps=4, guidance_scale=7.5, generator=torch.Generator().manual_seed(3)).images[
        0
    ]
    assert np.array_equal(pixels(ours), np.asarray(plain))
    assert ours.report.forwards == 0


@pytest.mark.parametrize("given", ["height", "width"])
def test_one_side_alone_is_drawn_as_asked(pipe, given):
    factor = pipe.vae_scale_factor
    own = pipe.unet.config.sample_size * factor
    (drawn,) = draw(recipe(methods=(), layout=None, steps=1, **{given: 2 * own}), pipe)
    wanted = {"height": own, "width": own} | {given: 2 * own}
    assert pixels(drawn).shape[:2] == (wanted["height"], wanted["width"])


def test_looking_at_maps_changes_no_pixel(pipe):
    (blind,) = run(recipe(), pipe, progress=False)
    (seeing,) = run(recipe(), pipe, capture_maps=True, progress=False)
    (named,) = run(recipe(), pipe, capture_maps=["red circle"], progress=False)
    assert np.array_equal(pixels(blind), pixels(seeing)) and np.array_equal(pixels(blind), pixels(named))
    assert set(seeing.maps) == {"a", "red", "circle", "and", "blue", "square"} and set(named.maps) == {"red circle"}
    assert all(values.shape == (16, 16) and (values >= 0).all() for values in seeing.maps.values())
    assert np.allclose(named.maps["red circle"], (seeing.maps["red"] + seeing.maps["circle"]) / 2, atol=1e-6)
    assert not blind.maps and seeing.recipe == blind.recipe


def test_the_guide_is_at_work(pipe):
    (guided,) = run(recipe(), pipe, progress=False)
    (plain,) = run(recipe(methods=()), pipe, progress=False)
    assert not np.array_equal(pixels(guided), pixels(plain))
    assert guided.report.backwards == 3  # two in the first step, one in the second, none later


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_scheduler_draws_and_is_taken_away_again(pipe, name):
    if name == "lms":
        pytest.importorskip("scipy", reason="LMSDiscreteScheduler integrates with scipy")
    kept = pipe.scheduler
    (once,) = run(recipe(scheduler=name, methods=()), pipe, progress=False)
    (again,) = run(recipe(scheduler=name, methods=()), pipe, progress=False)
    assert np.array_equal(pixels(once), pixels(again))
    assert pipe.scheduler is kept


def test_an_abandoned_run_leaves_the_pipeline_as_it_was(pipe):
    kept, processors = pipe.scheduler, dict(pipe.unet.attn_processors)
    drawing = draw(recipe(num_images=2, scheduler="euler"), pipe, progress=False)
    next(drawing)
    drawing.close()
    assert pipe.scheduler is kept and dict(pipe.unet.attn_processors) == processors
    assert not pipe.unet._forward_hooks and "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"scheduler": "ddmi"}, ParamError, r"no scheduler is called 'ddmi' \(known: ddim"),
        ({"prompt": "a red circle"}, PromptError, "blue square"),
        ({"layout": None}, LayoutError, "bacon needs a layout"),
        ({"methods": [MethodSpec(name="bacom")]}, ParamError, "no method is called 'bacom'"),
        (
            {"methods": [MethodSpec(name="pag", params={"scale": 99})]},
            ParamError,
            r"PAG.scale = 99 is outside \[0, 20\]",
        ),
        ({"methods": [MethodSpec(name="attend-excite", params={"words": ["dog"]})]}, PromptError, "dog"),
    ],
)
def test_what_is_wrong_is_told_before_the_first_step(pipe, monkeypatch, changed, error, said):
    monkeypatch.setattr(type(pipe), "__call__", drawn_too_soon)
    with pytest.raises(error, match=said):
        run(recipe(**changed), pipe, progress=False)


def drawn_too_soon(
    self, prompt=None, negative_prompt=None, height=None, width=None, num_inference_steps=0, guidance_scale=0
):
    raise AssertionError("the pipeline was called")


def test_an_index_beyond_the_recipe_is_refused(pipe):
    with pytest.raises(ParamError, match="index = 2 is outside 0 to 1"):
        run(recipe(num_images=2), pipe, index=2)


def test_wrong_models_are_told_in_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    broken, foreign, code, pickled = (tmp_path / name for name in ("broken", "foreign", "code", "pickled"))
    index = json.loads((folder / "model_index.json").read_text())
    for place, text in ((broken, "{"), (foreign, json.dumps({"_class_name": "NoSuchPipeline"}))):
        place.mkdir()
        (place / "model_index.json").write_text(text)
    code.mkdir()
    (code / "model_index.json").write_text(json.dumps(index | {"_class_name": ["mine", "Mine"]}))
    (code / "mine.py").write_text("raise SystemExit('the code of a stranger has run')")
    tiny.save(pickled)
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    cases = {
        "empty": "no model_index.json",
        "file.safetensors": "is a file",
        "nowhere": "no model is called",
        "./nowhere/x": "no model is called",
        "broken": "cannot be loaded",
        "foreign": "cannot be loaded",
        "code": "cannot be loaded",
        "pickled": "cannot be loaded",
    }
    for name, said in cases.items():
        with pytest.raises(ModelError, match=said) as caught:
            load(name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_wrong_places_are_told(folder):
    with pytest.raises(ParamError, match="device = 'quantum' cannot be used here"):
        load(folder, device="quantum")
    with pytest.raises(ParamError, match="dtype = 'int8' is not one of"):
        load(folder, "int8")


def test_the_dtype_is_that_of_the_weights(folder):
    assert load(folder, "bfloat16", "cpu").unet.dtype == torch.bfloat16


def test_embedded_models_are_where_they_are_said_to_be(monkeypatch, tmp_path, folder):
    with pytest.raises(ModelError, match=r"no embedded model is called '../x' \(known: shapes-unet, shapes-mmdit\)"):
        zoo.path("../x")
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    assert zoo.names() == []
    with pytest.raises(ModelError, match="zoo train shapes-unet"):
        load("shapes-unet")
    (tmp_path / "shapes-unet").symlink_to(folder)
    assert zoo.names() == ["shapes-unet"]
    assert load("shapes-unet", device="cpu").unet.config.sample_size == 16


def test_the_layout_pipeline_is_the_guide_in_one_call(folder, pipe):
    ready = pipelines.LayoutPipeline.from_pretrained(folder, device="cpu")
    ready.pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    output = ready(PROMPT, layout=LAYOUT, params=BACON.params, num_inference_steps=4, generator=rng)
    (ours,) = run(recipe(), pipe, progress=False)
    assert np.array_equal(np.asarray(output.images[0]), pixels(ours))
    assert ready.report.backwards == 3
    with pytest.raises(LayoutError, match="pag does not act on a layout"):
        ready(PROMPT, layout=LAYOUT, method="pag")
