"""The editor in a browser: draw, steer, look, stop, take the recipe home; no fault, and nothing leaves the machine."""

import time

import pytest
from browsing import PATIENCE, newest
from PIL import Image

from diffguide.layout import Layout, Region
from diffguide.recipe import Recipe, save_png
from diffguide.zoo import detector

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

CIRCLE, SQUARE, STAR = (0.06, 0.08, 0.42, 0.44), (0.58, 0.10, 0.92, 0.44), (0.30, 0.54, 0.70, 0.92)
NEAR = 0.006  # a screen pixel is a 400th of the canvas, and a drag has two ends


def test_two_boxes_a_method_and_a_picture_that_follows_them(editor, served):
    editor.region("a red circle", CIRCLE)
    editor.region("a blue square", SQUARE)
    editor.region("a yellow star", STAR)
    boxes = dict(editor.regions())
    assert boxes["a red circle"] == pytest.approx(CIRCLE, abs=NEAR)
    editor.add_method("bacon")
    editor.fill("steps", "8")
    editor.says("notes", "No problems found")
    editor.draw()
    assert editor.page.locator("#progress .preview").get_attribute("data-seen") == "1"
    assert editor.page.locator("#picture img").is_visible()
    read = detector.detect(Image.open(newest(served.folder)).convert("RGB"))
    score = detector.score(read, [("red", "circle", CIRCLE), ("blue", "square", SQUARE), ("yellow", "star", STAR)])
    assert score.in_box == 3
    recipe = Recipe.load(newest(served.folder))
    assert [r.phrase for r in recipe.layout.regions] == ["a red circle", "a blue square", "a yellow star"]
    assert [s.name for s in recipe.methods] == ["bacon"] and recipe.steps == 8
    editor.tab("Recipe")
    editor.says("json", '"model": "shapes-unet"')
    editor.says("python", "dg.Bacon(layout=layout)")
    editor.says("shell", "layout.json")


def test_touch_draws_and_undo_takes_it_back(phone):
    stage = phone.page.locator("svg.stage")
    stage.scroll_into_view_if_needed()
    session = phone.page.context.new_cdp_session(phone.page)

    def touch(kind: str, x: float = 0, y: float = 0) -> None:
        left, top = phone.point(x, y)
        points = [] if kind == "touchEnd" else [{"x": left, "y": top}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    scrolled = phone.page.evaluate("scrollY")
    touch("touchStart", 0.2, 0.2)
    for part in range(1, 9):
        touch("touchMove", 0.2 + part * 0.05, 0.2 + part * 0.06)
    touch("touchEnd")
    phone.page.locator("svg.stage g.item").wait_for()
    assert phone.regions()[0][1] == pytest.approx([0.2, 0.2, 0.6, 0.68], abs=0.01)
    assert phone.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert abs(phone.page.evaluate("scrollY") - scrolled) < 50  # a finger on the canvas draws and does not scroll
    phone.page.locator("#canvas [data-act=undo]").click()
    assert phone.regions() == []
    phone.page.locator("#canvas [data-act=redo]").click()
    assert len(phone.regions()) == 1


def test_keyboard_and_table_move_boxes_exactly(editor):
    editor.region("a red circle", (0.2, 0.2, 0.4, 0.4))
    page = editor.page
    page.locator("g.item").focus()
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowRight", "Alt+ArrowDown"):
        page.keyboard.press(key)
    assert editor.regions()[0][1] == pytest.approx([0.21, 0.26, 0.42, 0.46], abs=NEAR)
    page.locator("#canvas summary").click()
    page.get_by_label("left of region 1").fill("0.125")
    page.get_by_label("left of region 1").blur()
    page.get_by_label("Phrase of region 1").fill("a red ring")
    page.get_by_label("Phrase of region 1").blur()
    phrase, box = editor.regions()[0]
    assert phrase == "a red ring" and box[0] == pytest.approx(0.125, abs=1e-6)
    page.get_by_label("right of region 1").fill("0.05")  # left of its left
    page.get_by_label("right of region 1").blur()
    assert page.get_by_label("right of region 1").get_attribute("aria-invalid") == "true"
    assert editor.regions()[0][1][2] == pytest.approx(0.42, abs=NEAR)
    page.locator("g.item").focus()
    page.keyboard.press("Control+d")
    assert len(editor.regions()) == 2
    page.keyboard.press("Delete")
    assert len(editor.regions()) == 1
    page.keyboard.press("Control+z")
    assert len(editor.regions()) == 2


def test_a_handle_resizes_a_box_moves_and_the_order_changes(editor):
    editor.region("one", (0.2, 0.2, 0.4, 0.4))
    editor.region("two", (0.6, 0.6, 0.8, 0.8))
    editor.drag((0.8, 0.8), (0.9, 0.95))
    assert editor.regions()[1][1] == pytest.approx([0.6, 0.6, 0.9, 0.95], abs=2 * NEAR)
    editor.drag((0.7, 0.7), (0.6, 0.65))
    assert editor.regions()[1][1] == pytest.approx([0.5, 0.55, 0.8, 0.9], abs=3 * NEAR)
    editor.page.locator("#canvas [data-act=back]").click()
    assert [phrase for phrase, _ in editor.regions()] == ["two", "one"]
    editor.page.locator("#canvas select.snap").select_option("8x8")
    editor.region("three", (0.13, 0.7, 0.36, 0.99))
    assert editor.regions()[2][1] == [0.125, 0.75, 0.375, 1.0]


def test_a_stop_ends_the_run_and_the_next_one_draws(editor, served):
    editor.fill("steps", "200")
    before = len(list(served.folder.glob("*.png")))
    editor.page.click("#go")
    editor.says("progress", " of 200")
    editor.page.click("#stop")
    editor.says("progress", "Stopped")
    wait_until(lambda: not served.runner.workers)
    assert len(list(served.folder.glob("*.png"))) == before
    editor.fill("steps", "4")
    editor.draw()
    assert len(list(served.folder.glob("*.png"))) == before + 1


def test_a_closed_tab_frees_the_device(chromium, served):
    pictures = len(list(served.folder.glob("*.png")))
    context = chromium.new_context()
    page = context.new_page()
    page.goto(served.url)
    page.locator("#steps input").fill("200")
    page.click("#go")
    page.wait_for_function(
        "document.querySelector('#progress .text').textContent.includes(' of 200')", timeout=PATIENCE
    )
    assert served.runner.workers
    context.close()
    wait_until(lambda: not served.runner.workers)
    assert len(list(served.folder.glob("*.png"))) == pictures, "it was drawn to the end"


def test_a_picture_restores_everything_and_maps_are_shown(editor, served, tmp_path):
    phrase = "a red circle"
    layout = Layout(
        Region(phrase, box=(0.1, 0.2, 0.5, 0.6), weight=2.0), Region("blue square", box=(0.5, 0.5, 0.9, 0.9))
    )
    recipe = Recipe(
        model="shapes-unet", prompt="a red circle and a blue square", negative_prompt="a green ring", layout=layout,
        steps=5, methods=[{"name": "bacon", "params": {"scale": 60.0}}], guidance_scale=3.5, seed=7, scheduler="ddim",
    )  # fmt: skip
    file = tmp_path / "shared.png"
    save_png(Image.new("RGB", (16, 16)), file, recipe)
    page = editor.page
    page.get_by_role("button", name="Open a picture or a recipe").click()
    page.locator("#drop input[type=file]").set_input_files(str(file))
    page.wait_for_function(
        "document.querySelector('#restored textarea').value.startsWith('Restored')", timeout=PATIENCE
    )
    wait_until(lambda: len(editor.regions()) == 2)
    assert editor.regions()[0] == (phrase, pytest.approx([0.1, 0.2, 0.5, 0.6], abs=1e-4))
    page.locator("#knobs fieldset[data-method=bacon]").wait_for()
    assert page.get_by_label("bacon scale", exact=True).input_value() == "60"
    editor.draw()
    drawn = Recipe.load(newest(served.folder))
    assert drawn.model_copy(update={"versions": {}, "device": None}) == recipe
    editor.tab("Maps")
    editor.says("maps", "circle")
    assert page.locator("#maps canvas").count() == 6  # each word once
    mean = page.evaluate(INK)
    page.locator("#maps .step").fill("5")
    page.locator("#maps .words[data-step='5']").wait_for()
    assert page.evaluate(INK) != mean
    editor.tab("Losses")
    page.locator("#curves svg path").wait_for(state="attached")  # a tab is made when it is opened
    assert page.locator("#curves svg path").count() == 1
    page.locator("#gallery button.thumbnail-item, #gallery .thumbnail-lg").first.click()
    page.click("#recall")


INK = "() => { const c = document.querySelectorAll('#maps canvas')[1]; return c.toDataURL(); }"
NASTY = "<img src=x onerror=alert(1)> ${alert(1)} {{alert}} <b>é</b>"


def test_hostile_strings_stay_text(editor, tmp_path):
    dialogs: list[str] = []
    editor.page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
    recipe = Recipe(
        model="shapes-unet",
        prompt=NASTY,
        layout=Layout(Region(NASTY, box=(0.1, 0.1, 0.6, 0.6))),
        methods=[{"name": "nag", "params": {"negative": NASTY}}],
        steps=4,
    )
    file = tmp_path / "nasty.json"
    file.write_text(recipe.to_json())
    editor.page.get_by_role("button", name="Open a picture or a recipe").click()
    editor.page.locator("#drop input[type=file]").set_input_files(str(file))
    editor.page.locator("#knobs fieldset[data-method=nag]").wait_for()
    assert editor.regions()[0][0] == NASTY
    editor.page.click("#go")
    wait_until(lambda: editor.page.locator("#progress .text").inner_text().startswith(("Done", "no ", "the ")), editor)
    assert editor.page.locator("#canvas b, #canvas img[src=x], #knobs b, #notes b, #progress b").count() == 0
    assert dialogs == []


def test_heads_are_picked_on_the_grid_and_modes_offer_their_methods(editor):
    page = editor.page
    editor.add_method("soft-pag")
    page.get_by_label("head L0H0").click()
    pressed = page.locator("#knobs .heads button[aria-pressed=true]")
    first = pressed.count()
    assert page.get_by_label("head L0H0").get_attribute("aria-pressed") == "true" and first > 1  # "mid" and this one
    page.get_by_label("head L0H0").click()
    assert pressed.count() == first - 1
    value = page.get_by_label("soft-pag heads", exact=True).input_value()
    assert value and all(part.startswith("L") for part in value.split(","))
    page.get_by_label("soft-pag scale", exact=True).fill("99")
    page.get_by_label("soft-pag scale", exact=True).blur()
    editor.says("knobs", "not a number in [0, 20]")
    page.get_by_label("Maps", exact=True).check()
    page.locator("#knobs fieldset[data-method=capture-maps]").wait_for()
    assert page.get_by_role("tab", name="Maps", exact=True).get_attribute("aria-selected") == "true"


def test_a_draft_outlives_a_reload_and_problems_are_told(editor):
    editor.region("a purple cow", (0.2, 0.2, 0.6, 0.6))
    editor.add_method("bacon")
    editor.says("notes", "purple cow")
    editor.fill("prompt", "a purple cow")
    editor.says("notes", "No problems found")
    editor.page.reload()
    editor.page.locator("#knobs fieldset[data-method=bacon]").wait_for()
    assert editor.regions()[0][0] == "a purple cow"
    assert editor.page.locator("#prompt textarea").input_value() == "a purple cow"


def test_a_comparison_a_grid_and_a_plan(editor, served):
    page = editor.page
    page.click("#plan")
    wait_until(lambda: len(editor.regions()) == 3)
    editor.add_method("bacon")
    editor.fill("steps", "4")
    page.get_by_label("Also without methods, to compare").check()
    editor.draw()
    editor.tab("Compare")
    assert page.locator("#slider img").count() >= 2
    editor.tab("Grid")
    page.locator("#knob input").fill("bacon.scale")
    page.locator("#knob input").press("Enter")
    editor.fill("values", "0, 100")
    page.click("#sweep")
    editor.says("progress", "Done: 2 pictures")
    editor.says("sheet", "scale = 100")
    scales = {
        r.methods[0].params.get("scale", 100.0) for r in map(Recipe.load, served.folder.glob("*.png")) if r.methods
    }
    assert {0.0, 100.0} <= scales


def wait_until(met, editor=None, seconds=PATIENCE / 1000):
    """Wait for something outside the page, or read off it."""
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, "it never came"
        editor.page.wait_for_timeout(100) if editor else time.sleep(0.1)
