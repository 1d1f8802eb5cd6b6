"""Benches on a tiny pipeline: what they promise does not depend on how good the pictures are."""

import copy
import json
import multiprocessing
import os
import time
from collections import Counter
from pathlib import Path
from statistics import quantiles

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffguide import bench
from diffguide.bench import (
    contenders,
    drawing,
    knobs,
    layout,
    ledger,
    negative,
    pictures,
    prompts,
    scenes,
    semantics,
    sheet,
    statistics,
    styles,
    tables,
    thrift,
)
from diffguide.bench.summary import gained, summary
from diffguide.errors import ModelError, OutputError, ParamError
from diffguide.processors import methods
from diffguide.tokens import find
from diffguide.zoo.denoisers.shapes_unet import assemble
from diffguide.zoo.parts import TEXT_WIDTH, build_text_encoder
from diffguide.zoo.tokenizer import build_tokenizer
from diffguide.zoo.world import STYLES, Scene, Thing, phrase, plural, render

TOKENIZER = build_tokenizer()

COSTS = ("seconds", "memory", "seconds_ratio", "memory_ratio")


@pytest.fixture(scope="module")
def pipe():
    """The real classes with random weights: 128x128 pixels, 16x16 latents."""
    torch.manual_seed(0)
    widths = (8, 8, 8, 8)
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
        scaling_factor=1.0,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=8,
    )
    tokenizer = build_tokenizer()
    pipe = assemble(vae, build_text_encoder(tokenizer), tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny(pipe, **options):
    return bench.run_bench("layout", model=pipe, progress=False, **{"limit": 2, "seeds": 1, "steps": 2, **options})


# The list of scenes.


def test_scene_file_is_what_the_function_makes():
    assert scenes.FILE.read_text(encoding="utf-8") == scenes.as_text(scenes.make_list())


def test_scenes_are_held_out_plain_and_different():
    tasks = scenes.load_tasks()
    assert len(tasks) == 100 and all(t.scene.held_out and t.scene.style is None for t in tasks)
    assert sorted(len(t.scene.things) for t in tasks) == [2] * 50 + [3] * 50
    assert sum(len(scenes.groups(t.scene)) < len(t.scene.things) for t in tasks) == 15
    assert len({tuple(sorted(thing.kind for thing in t.scene.things)) for t in tasks}) == 100


def test_beginning_of_the_list_does_not_depend_on_its_length():
    assert scenes.make_list(seed=3, count=4) == scenes.make_list(seed=3, count=9)[:4]


def test_layouts_hold_every_box_and_their_phrases_are_in_the_prompt():
    tokenizer = build_tokenizer()
    for task in scenes.load_tasks():
        boxes = [box for region in task.layout.regions for box in region.instances]
        assert sorted(boxes) == sorted(thing.box for thing in task.scene.things)
        for region in task.layout.regions:
            assert find(tokenizer, task.caption, region.phrase)
            word = region.phrase.split()[1]
            assert (word in map(plural, ("square", *[t.shape for t in task.scene.things]))) == (
                len(region.instances) > 1
            )


def test_captions_leave_sizes_out_and_say_the_ground():
    tasks = scenes.load_tasks()
    assert not [t for t in tasks if "small" in t.caption or "big" in t.caption]
    assert all(t.caption.endswith(f" on a {t.scene.background} background") for t in tasks)
    assert tasks[6].caption.startswith("two ")


# The list of prompts.


def test_prompt_file_is_what_the_function_makes():
    assert prompts.FILE.read_text(encoding="utf-8") == prompts.as_text(prompts.make_list())


def test_prompts_are_held_out_and_of_every_sort():
    every = prompts.load_prompts()
    assert len(every) == 240 and Counter(p.sort for p in every) == prompts.SORTS
    for p in every:
        things = tuple(Thing(color, shape, 0.5, 0.5, 0.1) for color, shape, _ in p.targets)
        assert Scene("white", things).held_out and 2 <= len(things) <= 4
        (a, s, _), (b, t, _) = (*p.kinds, *p.kinds)[:2]
        assert p.sort != "one colour" or (a == b and s != t)
        assert p.sort != "one shape" or (a != b and s == t)
        assert (p.relation is not None and p.relation in p.caption) == (p.sort == "relation")
        assert all(find(TOKENIZER, p.caption, phrase(*kind).split(" ", 1)[1]) for kind in p.kinds)
    assert [p.sort for p in prompts.load_prompts(9)] == [*prompts.SORTS, "two", "three"]


def truth(prompt, **changes):
    """A scene that is what the prompt says, things in a row (in a column for above and below)."""
    things = [[color, shape] for color, shape, _ in prompt.targets]
    order = list(range(len(things)))
    if prompt.relation in ("to the right of", "below"):
        order.reverse()
    if changes.get("swapped"):
        order.reverse()
    if "color" in changes:
        things[0][0] = changes["color"]
    if "drop" in changes:
        things, order = things[1:], order[: len(things) - 1]
    places = [0.14 + 0.72 / max(1, len(prompt.targets) - 1) * i for i in order]
    down = prompt.relation in ("above", "below")
    made = [
        Thing(*kind, 0.5 if down else at, at if down else 0.5, 0.11) for kind, at in zip(things, places, strict=True)
    ]
    return render(Scene("white", tuple(made)))


@pytest.mark.parametrize("sort", prompts.SORTS)
def test_a_picture_is_read_for_what_its_prompt_says(sort):
    prompt = next(p for p in prompts.load_prompts() if p.sort == sort)
    got = semantics.BENCH.counts(truth(prompt), prompt)
    n = len(prompt.targets)
    assert (got["wanted"], got["present"], got["complete"], got["extra"], got["bound"], got["shaped"]) == (
        n,
        n,
        1,
        0,
        n,
        n,
    )
    assert got["number_right"] == got["numbered"] == (sort == "number")
    assert got["relation_right"] == got["related"] == (sort == "relation")
    fewer = semantics.BENCH.counts(truth(prompt, drop=True), prompt)
    assert fewer["present"] == n - 1 and not fewer["complete"] and not fewer["number_right"]
    other = next(c for c in ("red", "green", "cyan") if c not in {k[0] for k in prompt.kinds})
    wrong = semantics.BENCH.counts(truth(prompt, color=other), prompt)
    assert (wrong["bound"], wrong["shaped"], wrong["extra"]) == (n - 1, n, 1)
    if sort == "relation":
        assert not semantics.BENCH.counts(truth(prompt, swapped=True), prompt)["relation_right"]


@pytest.mark.parametrize("module", [layout, semantics])
def test_the_methods_of_a_bench_are_there(module):
    assert [c.label for c in contenders.contenders(module.BENCH.methods, layouts=module.BENCH.layouts)] == [
        *module.BENCH.methods
    ]


def test_semantics_plans_layouts_for_methods_that_need_one(pipe, tmp_path):
    options = {"limit": 3, "seeds": 1, "steps": 2, "progress": False}
    found = bench.run_bench("semantics", model=pipe, methods=["conform+iterations=1"], out=tmp_path / "o", **options)
    assert [row["method"] for row in found["rows"]] == ["none", "conform+iterations=1"]
    assert found["rows"][1]["backwards"]["value"] > 0 and (tmp_path / "o" / "contact_sheet.png").stat().st_size > 1000
    assert {"attributes_bound", "complete_two", "complete_four"} <= found["rows"][0].keys()
    found = bench.run_bench("semantics", model=pipe, methods=["backward-guidance", "a-star"], **options)
    assert all(row["backwards"]["value"] > 0 for row in found["rows"][1:])
    _, placed, free = contenders.contenders(["backward-guidance", "a-star"], layouts=False)
    task = semantics.BENCH.tasks(1)[0]
    assert placed.build([task.layout]).layout == [task.layout] and free.build([task.layout]).layout is None
    assert [r.phrase for r in task.layout.regions] == [f"{c} {s}" for c, s, _ in task.kinds]


def test_a_long_heading_is_whole_over_its_column():
    title = "a-star+factor=10+scale=100+window=0:0.2"
    assert sheet.heading(title) == ["a-star +factor=10", "+scale=100", "+window=0:0.2"]
    assert sheet.heading("soft-pag+blend=1+heads=@shapes-mmdit-shapes")[1:] == ["+heads=", "@shapes-mmdit-shapes"]
    row = sheet.Row("a scene", [], [Image.new("RGB", (8, 8))] * 2, ["", ""])
    short, long = (sheet.contact_sheet([name, "none"], [row]) for name in ("bacon", title))
    assert long.height - short.height == 2 * sheet.LINE and long.width == short.width


def test_heads_by_lot_are_drawn_five_times_and_stay_the_same(pipe, tmp_path):
    lots = ["pag+layers=all", "soft-pag+blend=1+heads=random2"]
    options = {"limit": 2, "seeds": 1, "steps": 2, "progress": False}
    found, again = (bench.run_bench("perturbation", model=pipe, methods=lots, **options) for _ in range(2))
    labels = [f"soft-pag+blend=1+heads=random2:{n}" for n in range(5)]
    assert [row["method"] for row in found["rows"]] == ["none", *lots[:1], *labels, lots[1]]
    sharp = [row["sharpness"]["value"] for row in found["rows"]]
    assert sharp[-1] == pytest.approx(np.mean(sharp[2:7]), rel=1e-12)  # all draws as one row: as many pictures each
    assert len(set(sharp)) == len(sharp) and sharp == [row["sharpness"]["value"] for row in again["rows"]]
    assert all(row["forwards"]["value"] == 6 for row in found["rows"][1:])
    assert {"shape_score", "objects_present"} <= found["rows"][0].keys()


def test_gains_are_told_against_any_of_those_compared(pipe):
    options = {"methods": ["pag", "seg"], "limit": 2, "seeds": 1, "steps": 2, "progress": False}
    found = bench.run_bench("perturbation", model=pipe, against="seg", **options)
    plain, pag, seg = found["rows"]
    assert found["against"] == "seg" and "sharpness_gain" not in seg
    for row in (plain, pag):
        gain = row["sharpness"]["value"] - seg["sharpness"]["value"]
        assert row["sharpness_gain"]["value"] == pytest.approx(gain, abs=1e-12)
    with pytest.raises(ParamError, match="against = 'sag' is not compared here"):
        bench.run_bench("perturbation", model=pipe, against="sag", **options)


def test_a_gain_counts_scenes_that_both_have():
    one, two = {"scene": 0, "a": 1, "b": 2}, {"scene": 1, "a": 4, "b": 4}
    nothing = {"scene": 1, "a": 0, "b": 0}
    assert gained([one, two], [{**one, "a": 0}, nothing], "a", "b")["value"] == 0.5
    assert gained([two], [nothing], "a", "b") == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_style_that_was_asked_for_is_read_in_the_truth(pipe):
    tasks = styles.BENCH.tasks(6)
    assert [t.style for t in tasks] == [*STYLES, *STYLES] and all(t.caption.endswith(t.style) for t in tasks)
    task = next(t for t in tasks if t.style == "as a sketch")
    things = tuple(Thing(c, s, 0.25 + 0.5 * n, 0.5, 0.2) for n, (c, s, _) in enumerate(task.kinds[:2]))
    asked, plain = (styles.BENCH.counts(render(Scene("white", things, style)), task) for style in (task.style, None))
    assert asked["styled"] > asked["fine"] / 2 > plain["styled"]
    assert asked["sketch_styled"] == asked["styled"] and not asked["fog_fine"] and not asked["fog_asked"]
    assert styles.BENCH.note(asked).startswith("sketch, ") and styles.BENCH.note(plain).startswith("plain, ")
    found = bench.run_bench("styles", model=pipe, methods=["pag"], limit=3, seeds=1, steps=2, progress=False)
    wanted = [f"{name}_{what}" for name in ("night", "fog", "sketch") for what in ("read", "read_gain", "right_gain")]
    assert {*wanted, "style_read", "style_read_gain"} <= set(found["rows"][1])


def test_what_a_negative_prompt_names_is_counted_apart(pipe):
    task = negative.prompts()[0]  # and a green square
    things = {name: Thing(*name.split(), x, 0.5, 0.15) for name, x in (("red circle", 0.3), ("green square", 0.7))}
    both, other, named = (
        negative.BENCH.counts(render(Scene("white", tuple(things[n] for n in names))), task)
        for names in (("red circle", "green square"), ("green square",), ("red circle",))
    )
    assert [c["absent"] for c in (both, other, named)] == [0, 1, 0]
    assert [c["present"] for c in (both, other, named)] == [1, 1, 0] and both["extra"] == named["extra"] == 0
    assert "1 red circle" in negative.BENCH.note(both) and "red" not in negative.BENCH.note(other)
    kinds = [p.kinds for p in negative.prompts()]
    assert len(set(kinds)) == len(kinds) == 40 and not any("red" in k[0] or "circle" in k[0] for k in kinds)
    found = bench.run_bench("negative", model=pipe, limit=1, seeds=1, steps=2, progress=False)
    assert found["settings"]["guidance_scale"] == 1.0
    assert [row["forwards"]["value"] for row in found["rows"]] == [2, 4, 4]


def test_without_guidance_there_is_one_row_for_each_picture(pipe):
    options = {"limit": 1, "seeds": 1, "steps": 2, "progress": False, "guidance_scale": 1}
    found = bench.run_bench("perturbation", model=pipe, methods=["pag"], **options)
    assert [row["forwards"]["value"] for row in found["rows"]] == [2, 4]
    assert found["settings"]["guidance_scale"] == 1.0


def sleeper():
    pictures.end_with_parent()
    time.sleep(120)


def boss(pipe):
    child = multiprocessing.get_context("spawn").Process(target=sleeper)
    child.start()
    pipe.send(child.pid)
    time.sleep(120)


def test_workers_end_with_a_bench_that_is_killed():
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("spawn").Process(target=boss, args=(there,))
    parent.start()
    assert here.poll(60)
    child = here.recv()
    parent.kill()
    parent.join()
    for _ in range(600):
        try:
            os.kill(child, 0)
            if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":  # gone, with nobody to bury it
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


# Statistics.

values = st.floats(-1e6, 1e6)
units = st.lists(st.tuples(values, st.floats(0.1, 1e3)), min_size=1, max_size=20)


@given(units, units)
@settings(max_examples=30)
def test_a_difference_is_that_of_the_ratios_and_of_the_same_rows_nothing(pairs, others):
    a, b = zip(*pairs, strict=True)
    assert statistics.difference(a, b, than=(a, b), resamples=50) == {"value": 0, "low": 0, "high": 0}
    c, d = ([*each, *each] for each in zip(*others, strict=True))
    e, f = (np.resize(each, len(c)) for each in (a, b))
    got = statistics.difference(c, d, than=(e, f), resamples=50)
    slack = 1e-9 * (1 + max(map(abs, [*c, *e])) / min([*d, *f]))
    assert got["value"] == pytest.approx(np.sum(c) / np.sum(d) - np.sum(e) / np.sum(f), abs=slack)
    back = statistics.difference(e, f, than=(c, d), resamples=50)
    assert back["low"] == pytest.approx(-got["high"], abs=slack) and got["low"] <= got["value"] <= got["high"]


def test_what_is_hard_for_both_drops_out_of_a_difference():
    """Scenes differ much, each gains the same: the difference is sure, though either share is not."""
    plain = np.array([0, 1, 2, 3, 4, 5, 6, 7] * 4)
    got = statistics.difference(plain + 1, np.full(32, 10), than=(plain, np.full(32, 10)))
    assert got["low"] == pytest.approx(0.1) and got["high"] == pytest.approx(0.1)
    assert statistics.ratio(plain, np.full(32, 10))["high"] - statistics.ratio(plain, np.full(32, 10))["low"] > 0.1
    with pytest.raises(ValueError, match="shape"):
        statistics.difference([1, 2], [1, 1], than=([1], [1]))


@given(units)
@settings(max_examples=30)
def test_ratio_lies_in_its_interval_and_between_the_units(pairs):
    a, b = zip(*pairs, strict=True)
    got = statistics.ratio(a, b, resamples=50)
    slack = 1e-9 * (1 + max(map(abs, a)) / min(b))
    quotients = [x / y for x, y in pairs]
    assert got["value"] == pytest.approx(np.sum(a) / np.sum(b), abs=slack)
    assert min(quotients) - slack <= got["low"] <= got["value"] <= got["high"] <= max(quotients) + slack


@given(values, st.integers(1, 12))
@settings(max_examples=30)
def test_equal_units_leave_no_doubt(value, count):
    got = statistics.mean([value] * count, resamples=50)
    assert got["low"] == pytest.approx(value) and got["high"] == pytest.approx(value)


@given(units, st.floats(0.5, 4.0))
@settings(max_examples=30)
def test_interval_scales_with_its_values(pairs, factor):
    a, b = map(np.array, zip(*pairs, strict=True))
    one, more = statistics.ratio(a, b, resamples=50), statistics.ratio(factor * a, b, resamples=50)
    for key in ("value", "low", "high"):
        assert more[key] == pytest.approx(factor * one[key], rel=1e-9, abs=1e-6)


def test_interval_of_a_share_is_the_binomial_one():
    got = statistics.mean([1.0] * 150 + [0.0] * 250, resamples=4000)
    half = 1.96 * (0.375 * 0.625 / 400) ** 0.5
    assert got["high"] - got["value"] == pytest.approx(half, rel=0.1)
    assert got["value"] - got["low"] == pytest.approx(half, rel=0.1)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        got = statistics.mean(rng.normal(3.0, 1.0, 60), resamples=300, seed=i)
        hits += got["low"] <= 3.0 <= got["high"]
    assert 180 <= hits <= 198


def test_same_seed_gives_the_same_interval():
    sample = list(range(10))
    assert statistics.mean(sample, seed=1) == statistics.mean(sample, seed=1) != statistics.mean(sample, seed=2)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([float("nan")], [1.0])])
def test_meaningless_ratios_are_refused(above, below):
    with pytest.raises(ValueError, match="expected"):
        statistics.ratio(above, below)


@given(st.lists(values, min_size=2, max_size=9))
@settings(max_examples=30)
def test_quartiles_are_those_of_the_standard_library(sample):
    got = statistics.quartiles(sample)
    assert [got[key] for key in ("low", "value", "high")] == pytest.approx(
        quantiles(sample, method="inclusive"), abs=1e-6
    )


# The layout bench.


@pytest.fixture(scope="module")
def result(pipe, tmp_path_factory):
    """A run of three scenes with a last batch that is not full, and everything it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    methods = [
        "bacon+first_iterations=2+iterations=1",
        "bacon+scale=0",
        "attend-excite+iterations=1",
        "backward-guidance",
    ]
    got = tiny(pipe, limit=3, batch=2, methods=methods, json=folder / "result.json", out=folder / "out")
    return got, folder


def test_result_has_the_form_of_a_bench(result):
    got, folder = result
    assert json.loads((folder / "result.json").read_text()) == got
    assert (got["bench"], got["model"]) == ("layout", "StableDiffusionPipeline")
    assert [row["method"] for row in got["rows"]][:3] == [
        "none",
        "bacon+first_iterations=2+iterations=1",
        "bacon+scale=0",
    ]
    named = {"objects_present", "scenes_complete", "objects_in_box", "objects_centred", "extra_objects"}
    named |= {"seconds_ratio", "memory_ratio", "forwards", "backwards", "seconds", "memory"}
    for row in got["rows"]:
        own = named | ({"objects_in_box_gain"} if row["method"] != "none" else set())
        assert set(row) == {"method", "n", *own} and row["n"] == 3
        for metric in own:
            assert row[metric]["low"] <= row[metric]["value"] <= row[metric]["high"]
    assert {"diffguide", "torch", "diffusers"} <= set(got["versions"])
    assert got["settings"]["steps"] == 2 and got["settings"]["guidance_scale"] == drawing.GUIDANCE_SCALE
    assert got["detector"]["n"] == 3 and got["detector"]["objects_present"]["value"] >= 0.9
    assert not list(folder.glob("*.part*"))


def test_plain_rows_cost_one(result):
    plain = result[0]["rows"][0]
    for metric, value in (("seconds_ratio", 1.0), ("memory_ratio", 1.0), ("forwards", 4.0), ("backwards", 0.0)):
        assert plain[metric] == {"value": value, "low": value, "high": value}


def test_methods_that_move_latents_are_billed(result):
    for row in result[0]["rows"][1:]:
        idle = "scale=0" in row["method"]
        assert (row["backwards"]["value"] > 0) != idle
        assert (row["forwards"]["value"] > 4) != idle


def test_zero_strength_draws_the_plain_pictures(result):
    _, folder = result
    got = [
        Image.open(folder / "out" / "pictures" / f"{i:03d}-{name}.png")
        for name in ("none", "bacon+scale=0")
        for i in range(3)
    ]
    for plain, idle in zip(got[:3], got[3:], strict=True):
        assert np.array_equal(np.asarray(plain), np.asarray(idle))
    assert not np.array_equal(np.asarray(got[0]), np.asarray(got[1]))


def test_strength_moves_the_pictures(result):
    pictures = result[1] / "out" / "pictures"
    plain, moved = (
        np.asarray(Image.open(pictures / f"000-{name}.png"), float) for name in ("none", "backward-guidance")
    )
    assert np.abs(plain - moved).max() > 0


def test_page_and_sheet_show_every_method(result):
    got, folder = result
    page = (folder / "out" / "report.md").read_text()
    assert all(row["method"] in page for row in got["rows"]) and "contact_sheet.png" in page
    with Image.open(folder / "out" / "contact_sheet.png") as page:
        assert page.width == sheet.GAP + 6 * (sheet.CELL + sheet.GAP)
        assert page.height > 3 * sheet.CELL


def test_noise_depends_on_scene_and_seed_alone():
    task, other = scenes.load_tasks(2)
    draw = [
        torch.randn(4, generator=drawing.Job(t, s).noise()) for t, s in ((task, 0), (task, 0), (task, 1), (other, 0))
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2]) and not torch.equal(draw[0], draw[3])


def test_batch_size_does_not_change_what_is_drawn(pipe):
    jobs = [drawing.Job(task, 0) for task in scenes.load_tasks(3)]
    plain = contenders.contenders([])[0]
    together = drawing.draw(pipe, jobs, plain, 2).pictures
    alone = [drawing.draw(pipe, [job], plain, 2).pictures[0] for job in jobs]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_pipeline_is_given_back_as_it_was(pipe):
    scheduler, config = pipe.scheduler, dict(pipe._progress_bar_config)
    tiny(pipe, limit=1, methods=["none"])
    assert pipe.scheduler is scheduler and pipe._progress_bar_config == config


def test_killed_run_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    options = {"limit": 3, "batch": 1, "methods": ["backward-guidance"]}
    whole = tiny(pipe, **options)
    drawn, plain = [], pictures.draw

    def until_killed(pipe, jobs, contender, steps):
        drawn.append((jobs[0].task.index, contender.label))
        if len(drawn) == 2 + 4 + 2:  # warm-up, two batches, and a last batch whose second method never ends
            raise KeyboardInterrupt
        return plain(pipe, jobs, contender, steps)

    monkeypatch.setattr(pictures, "draw", until_killed)
    with pytest.raises(KeyboardInterrupt):
        tiny(pipe, **options, json=tmp_path / "a.json")
    part = tmp_path / "a.json.part.jsonl"
    part.write_text(part.read_text() + '{"batch": 2, "ru')  # killed while writing
    drawn.clear()
    drawn.extend([(-1, "")] * 10)
    again = tiny(pipe, **options, json=tmp_path / "a.json")
    assert [index for index, _ in drawn[10:]] == [2] * 4
    assert not part.exists()
    for a, b in zip(whole["rows"], again["rows"], strict=True):
        assert {k: v for k, v in a.items() if k not in COSTS} == {k: v for k, v in b.items() if k not in COSTS}


@pytest.mark.slow
def test_workers_draw_what_one_would(pipe, tmp_path):
    """With the bench's scheduler, not the model's own."""
    pipe.save_pretrained(tmp_path / "model")
    PNDMScheduler.from_config(pipe.scheduler.config).save_pretrained(tmp_path / "model" / "scheduler")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", "PNDMScheduler"))
    options = {"limit": 3, "batch": 1, "methods": ["backward-guidance"], "steps": 2, "seeds": 1, "progress": False}
    one = bench.run_bench("layout", model=tmp_path / "model", **options)
    two = bench.run_bench("layout", model=tmp_path / "model", workers=2, out=tmp_path / "out", **options)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert {k: v for k, v in a.items() if k not in COSTS} == {k: v for k, v in b.items() if k not in COSTS}
    assert two["settings"]["workers"] == 2 and len(list((tmp_path / "out" / "pictures").iterdir())) == 6
    with pytest.raises(ParamError, match="give the model's name or folder"):
        bench.run_bench("layout", model=pipe, workers=2, **options)


def test_run_with_other_settings_starts_anew(tmp_path):
    path = tmp_path / "part.jsonl"
    ledger.Ledger(path, {"steps": 1}).add({"batch": 0, "runs": {}})
    assert set(ledger.Ledger(path, {"steps": 1}).records) == {0}
    assert not ledger.Ledger(path, {"steps": 2}).records
    assert not ledger.Ledger(path, {"steps": 1}).records


def test_perfect_pictures_score_perfectly():
    jobs = [drawing.Job(task, 0) for task in scenes.load_tasks(8)]
    drawn = drawing.Drawn([render(job.task.scene) for job in jobs], 2.0, 100.0, 60.0, 0.0)
    row = summary(layout.BENCH, "none", [{"runs": {"none": pictures.account(layout.BENCH, jobs, drawn)}}])
    for metric in ("objects_present", "scenes_complete", "objects_in_box", "objects_centred"):
        assert row[metric]["value"] == 1.0
    assert row["extra_objects"]["value"] == 0.0
    assert row["seconds"]["value"] == 0.25


def test_misplaced_things_are_present_but_not_in_their_box():
    jobs = [drawing.Job(task, 0) for task in scenes.load_tasks(8)]

    def elsewhere(thing):  # mirrored left and right: of the same kind and size
        return Thing(thing.color, thing.shape, 1 - thing.cx, thing.cy, thing.r)

    mirrored = [type(j.task.scene)(j.task.scene.background, tuple(map(elsewhere, j.task.scene.things))) for j in jobs]
    drawn = drawing.Drawn([render(scene) for scene in mirrored], 1.0, 1.0, 60.0, 0.0)
    row = summary(layout.BENCH, "none", [{"runs": {"none": pictures.account(layout.BENCH, jobs, drawn)}}])
    assert row["objects_present"]["value"] == 1.0
    assert row["objects_in_box"]["value"] < 0.6


def test_costs_are_ratios_of_sums():
    def run(seconds, memory):
        counts = {"wanted": 2, "present": 1, "centred": 1, "in_box": 0, "extra": 0, "complete": 0}
        pictures = [{"scene": i, "seed": 0, **counts} for i in range(2)]
        return {"seconds": seconds, "memory": memory, "forwards": 70.0, "backwards": 5.0, "pictures": pictures}

    records = [{"runs": {"none": run(s, 100.0), "x": run(2 * s, 150.0)}} for s in (1.0, 3.0)]
    row = summary(layout.BENCH, "x", records)
    assert row["seconds_ratio"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert row["memory_ratio"]["value"] == 1.5 and row["seconds"]["value"] == 2.0
    assert (row["objects_present"]["value"], row["objects_in_box"]["value"]) == (0.5, 0.0)


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "speed"}, "no bench is called 'speed' .*attention, knobs, layout, negative, peers"),
        ({"methods": ["bacn"]}, "bacn.*known.*bacon"),
        ({"methods": ["bacon+scle=1"]}, "no parameter 'scle'.*scale"),
        ({"methods": ["bacon+scale=-1"]}, "Bacon.scale = -1.* outside"),
        ({"methods": ["bacon", "bacon"]}, "listed twice"),
        ({"methods": "bacon"}, "give a list"),
        ({"limit": 0}, "limit = 0"),
        ({"seeds": True}, "seeds = True"),
        ({"batch": 2.5}, "batch = 2.5"),
        ({"dtype": "int8"}, "dtype = 'int8'.*float16"),
        ({"name": "thrift", "seeds": 2}, "thrift has no seeds"),
        ({"name": "perturbation", "methods": ["soft-pag+heads=random0"]}, "draws no heads"),
        ({"name": "perturbation", "methods": ["soft-pag+heads=random3"] * 2}, "is listed twice"),
        ({"name": "perturbation", "guidance_scale": -1}, r"guidance_scale = -1 is outside \[0, 100\]"),
        ({"name": "peers", "guidance_scale": 2}, "has no guidance_scale"),
        ({"name": "thrift", "methods": ["pag"]}, "backward-guidance, bacon"),
    ],
)
def test_wrong_settings_are_named_before_a_model_is_loaded(options, message):
    with pytest.raises(ParamError, match=message):
        bench.run_bench(options.pop("name", "layout"), model="nowhere/at-all", progress=False, **options)


def test_missing_models_and_folders_are_named(tmp_path):
    with pytest.raises(ModelError, match="no model is called"):
        bench.run_bench("layout", model=str(tmp_path / "nothing"), progress=False)
    with pytest.raises(OutputError, match="folder that exists"):
        bench.run_bench("layout", json=tmp_path / "none" / "a.json", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        bench.run_bench("layout", out=tmp_path / "file" / "out", progress=False)


def test_a_saved_pipeline_is_loaded_by_its_folder(pipe, tmp_path):
    from diffguide.bench.models import load

    pipe.save_pretrained(tmp_path / "tiny")
    loaded, label = load(str(tmp_path / "tiny"), "cpu")
    assert label == "tiny"
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)


# Knobs.


@pytest.mark.parametrize("name", sorted(methods()))
def test_both_ends_of_every_knob_are_settings(name):
    """Within the range, other than the default, and written as the command line reads them."""
    for turn in knobs.turns(methods()[name], {}):
        assert turn.value != turn.knob.default
        turn.knob.check(name, turn.value)
        read = turn.knob.parse(name, turn.setting.partition("=")[2])
        assert read == pytest.approx(turn.value, rel=1e-2) if isinstance(read, float | tuple) else read == turn.value


@pytest.mark.parametrize("name", ["bacon", "conform"])
def test_knobs_are_turned_one_at_a_time(pipe, tmp_path, name, monkeypatch):
    kept = {"scale", "window", "softmax", "boundary"}
    monkeypatch.setattr(knobs, "turns", lambda *m, turns=knobs.turns: (t for t in turns(*m) if t.knob.name in kept))
    found = bench.run_bench("knobs", model=pipe, methods=[name], steps=2, out=tmp_path, progress=False)
    labels = [row["method"] for row in found["rows"]]
    assert labels[0] == name
    assert len(labels) == len(set(labels)) > 4 and all(label.startswith(name) for label in labels)
    with Image.open(tmp_path / "contact_sheet.png") as sheet_:
        assert sheet_.width < 4 * sheet.CELL < sheet_.height


def test_knobs_are_turned_from_the_settings_that_are_given():
    turns = {(t.knob.name, t.column): t.value for t in knobs.turns(methods()["a-star"], {"factor": 10.0})}
    assert (turns["factor", "low"], turns["factor", "high"]) == (2.0, 50.0) and turns["scale", "low"] == 4.0
    (row,) = knobs.on_sheet(
        [t for t in knobs.turns(methods()["a-star"], {"factor": 10.0}) if t.knob.name == "factor"],
        {"factor": 10.0},
        {},
        (Image.new("RGB", (8, 8)), "2/2"),
        [],
    )
    assert row.notes == ["2: ", "10: 2/2", "50: "]


@pytest.mark.parametrize("names", [None, ["bacon", "conform"], ["none"]])
def test_knobs_of_one_method_are_turned(pipe, names):
    with pytest.raises(ParamError, match="one method; name it"):
        bench.run_bench("knobs", model=pipe, methods=names, progress=False)


def test_knobs_are_turned_on_a_scene_of_the_list(pipe):
    with pytest.raises(ParamError, match="limit = 101: the list has 100 scenes"):
        bench.run_bench("knobs", model=pipe, methods=["bacon"], limit=101, progress=False)


# Peers.


def test_peers_draw_the_same_with_the_same_losses(pipe, tmp_path):
    """The pipeline of diffusers leaves nothing behind."""
    pipe = copy.deepcopy(pipe).to(dtype=torch.float64)
    before = dict(pipe.unet.attn_processors)
    found = bench.run_bench("peers", model=pipe, limit=1, steps=6, out=tmp_path, progress=False)
    assert [row["method"] for row in found["rows"]] == ["none", "diffusers", "attend-excite"]
    plain, theirs, ours = found["rows"]
    assert "last_loss" not in plain and 0 < ours["last_loss"]["value"] < 1
    assert ours["last_loss"]["value"] == pytest.approx(theirs["last_loss"]["value"], abs=1e-6)
    assert ours["backwards"] == theirs["backwards"] and ours["forwards"]["value"] < theirs["forwards"]["value"]
    assert "numbers_right" not in ours, "none was asked for"
    assert pipe.unet.attn_processors == before
    with Image.open(tmp_path / "contact_sheet.png") as sheet_:
        assert sheet_.width > 3 * 128


def test_peers_of_other_methods_are_not_to_be_had(pipe):
    with pytest.raises(ParamError, match="conform: this bench compares attend-excite"):
        bench.run_bench("peers", model=pipe, methods=["conform"], progress=False)


# What passes save.


@pytest.mark.parametrize("name", thrift.METHODS)
def test_early_stop_gives_the_same_gradient(pipe, name):
    method = thrift.named(name)(layout=thrift.LAYOUT)
    one = thrift.Pass.prepare(pipe.unet, method, (16, 16))
    (_, full), (_, early) = one.run(early=False), one.run(early=True)
    assert torch.equal(full, early)
    assert full.abs().max() > 0 and full.shape == (1, 4, 16, 16)
    assert torch.allclose(one.run(checkpointing=True)[1], early, atol=1e-6 * float(early.abs().max()))


def test_early_stop_leaves_work_undone(pipe):
    """The output layer is never reached, and without the stop it is."""
    method = thrift.named("bacon")(layout=thrift.LAYOUT)
    one = thrift.Pass.prepare(pipe.unet, method, (16, 16))
    reached = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda *_: reached.append(True))
    try:
        one.run(early=True)
        assert not reached
        one.run(early=False)
        assert reached
    finally:
        handle.remove()


def test_the_thrift_bench_reports_both_denoisers(pipe, monkeypatch, capsys):
    monkeypatch.setattr(thrift, "sd15_shaped", lambda make=thrift.sd15_shaped: make((8, 8, 16, 16), 16))
    got = bench.run_bench("thrift", model=pipe, limit=2, progress=True)
    assert [(row["method"], row["n"]) for row in got["rows"]] == [("backward-guidance", 2), ("bacon", 2)] * 2
    assert len({row["denoiser"] for row in got["rows"]}) == 2
    for row in got["rows"]:
        assert row["early_stop_gradient_error"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert row["checkpointing_gradient_error"]["value"] < 1e-4
        assert row["checkpointing_memory_ratio"]["value"] < 1
        for switch in ("early_stop", "reuse", "checkpointing"):
            ratio = row[f"{switch}_seconds_ratio"]
            assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    printed = capsys.readouterr()
    assert "reuse seconds ratio" in printed.out and "pair" in printed.err


# Tables.


def test_columns_are_aligned_and_intervals_told():
    rows = [
        {"method": "none", "n": 4, "objects_present": {"value": 0.5, "low": 0.25, "high": 0.75}},
        {"method": "attend-excite", "n": 4, "objects_present": {"value": 1.0, "low": 1.0, "high": 1.0}},
    ]
    text = tables.as_text({"bench": "layout", "model": "m", "rows": rows, "settings": {"steps": 2}, "versions": {}})
    lines = text.splitlines()
    assert "0.5 [0.25, 0.75]" in text and "[1" not in text
    assert lines[1].index("attend-excite") == lines[3].index("1", 30)


@given(st.floats(-1e5, 1e5))
def test_numbers_keep_three_digits(value):
    assert float(tables.number(value)) == pytest.approx(value, rel=6e-3, abs=1e-12)


def test_every_file_that_is_a_bench_is_one():
    assert bench.names() == [
        "attention",
        "knobs",
        "layout",
        "negative",
        "peers",
        "perturbation",
        "semantics",
        "styles",
        "thrift",
    ]
