"""The rest of the editor's form in a browser: painted masks, a picture below, other models and sizes, a look back."""

import pytest
from browsing import newest
from PIL import Image

from diffguide.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_a_painted_mask_is_a_regions_place_and_its_box_comes_back(editor, served):
    page = editor.page
    editor.region("a red circle", (0.6, 0.6, 0.9, 0.9))
    page.get_by_role("button", name="Paint a mask for a region").click()
    page.locator("#mask").click()
    page.get_by_text("nothing is painted").wait_for()
    page.get_by_role("button", name="Brush", exact=True).click()
    page.get_by_role("button", name="Brush Size").wait_for()
    canvas = page.locator("#paint canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for row in (0.3, 0.4, 0.5):
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + row * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + row * box["height"], steps=2)
        page.mouse.up()
    page.wait_for_timeout(500)  # strokes end up in the value a little later
    page.locator("#mask").click()
    page.locator("svg.stage rect.masked").wait_for()
    (_, (x0, y0, x1, y1)) = editor.regions()[0]
    assert 0 <= x0 < 0.2 and 0.4 < x1 < 0.7 and 0.05 < y0 < 0.3 and 0.45 < y1 < 0.7  # around what was painted
    editor.add_method("bacon")
    editor.fill("steps", "3")
    editor.draw()
    (region,) = Recipe.load(newest(served.folder)).layout.regions
    assert region.mask is not None and 0.05 < region.mask.mean() < 0.5
    page.locator("#unmask").click()
    page.locator("svg.stage rect.body:not(.masked)").wait_for()
    assert editor.regions()[0][1] == pytest.approx([x0, y0, x1, y1], abs=1e-3)


def test_a_picture_below_stays_in_the_browser(editor, tmp_path):
    page, sent = editor.page, []
    file = tmp_path / "mine.png"
    Image.new("RGB", (64, 64), (12, 200, 40)).save(file)
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    page.locator("#canvas input.file").set_input_files(str(file))
    page.locator("#canvas image.under[href^='blob:']").wait_for(state="attached")
    page.get_by_role("button", name="No picture below").click()
    assert page.locator("#canvas image.under[href]").count() == 0
    assert not [url for url in sent if "upload" in url]


def test_another_model_has_its_own_heads_and_refusals(editor):
    page = editor.page
    editor.add_method("soft-pag")
    before = page.locator("#knobs .heads tbody tr").count()
    page.get_by_role("button", name="Negative prompt, model").click()
    page.locator("#model input").click()
    page.get_by_role("option", name="shapes-mmdit", exact=True).click()
    page.wait_for_function(
        "n => document.querySelectorAll('#knobs .heads tbody tr').length !== n", arg=before, timeout=90_000
    )
    assert page.locator("#knobs .heads tbody tr").count() == 6
    editor.says("notes", "No problems found")
    editor.add_method("attend-excite")
    editor.fill("prompt", "a red circle and a blue square")
    editor.add_method("sag")  # for U-Nets
    editor.says("notes", "SAG finds no site in this denoiser")


def test_another_size_reshapes_the_canvas_and_the_picture(editor, served):
    page = editor.page
    page.get_by_role("button", name="Guidance scale, scheduler, size").click()
    editor.fill("height", "64")
    page.wait_for_function("document.querySelector('svg.stage').getAttribute('viewBox') === '0 0 128 64'")
    box = page.locator("svg.stage").bounding_box()
    assert box["width"] == pytest.approx(2 * box["height"], rel=0.02)
    editor.fill("steps", "3")
    editor.draw()
    with Image.open(newest(served.folder)) as picture:
        assert picture.size == (128, 64)


def test_a_look_back_shows_a_picture_and_puts_its_form_back(editor, served):
    page = editor.page
    editor.fill("steps", "2")
    editor.fill("prompt", "a red circle")
    editor.draw()
    editor.fill("prompt", "a blue square")
    editor.fill("seed", "5")
    editor.draw()
    older = page.locator("#gallery button.thumbnail-item, #gallery button.gallery-item").nth(1)
    older.click()
    editor.tab("Recipe")
    editor.says("json", '"prompt": "a red circle"')
    page.locator("#recall").click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a red circle'")
    assert page.locator("#seed input").input_value() == "0"


def test_heads_named_by_pattern_are_shown_and_what_is_not_understood_is_kept(editor):
    page = editor.page
    editor.add_method("soft-pag")
    field = page.get_by_label("soft-pag heads", exact=True)
    pressed = page.locator("#knobs .heads button[aria-pressed=true]")
    for text, count in (("L1", 5), ("down_blocks.[0]*", 3), ("*mid_block*:2", 1), ("@shapes-unet-objects", 4)):
        field.fill(text)
        field.blur()
        page.wait_for_function(
            "n => document.querySelectorAll('#knobs .heads button[aria-pressed=true]').length === n", arg=count
        )
    field.fill("L0H1, no_such_layer*")
    field.blur()
    page.wait_for_function("document.querySelectorAll('#knobs .heads button[aria-pressed=true]').length === 1")
    page.get_by_label("head L1H0").click()
    assert field.input_value() == "L0H1,L1H0,no_such_layer*" and pressed.count() == 2
