"""The editor served for tests, a Chromium that looks at it, and hands for its canvas."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 90_000  # milliseconds; a busy machine is slow, a broken page never gets there


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An editor of the embedded models: its address, its runner, its folder."""
    pytest.importorskip("gradio", reason="the editor needs the extra app")
    from diffguide import zoo

    if "shapes-unet" not in zoo.names():
        pytest.skip("shapes-unet has not been trained in this checkout")
    from diffguide.app import server

    folder = tmp_path_factory.mktemp("pictures")
    kept: dict[str, Any] = {}
    make = server.Runner

    def runner(*options: Any) -> Any:
        kept["runner"] = make(*options)
        return kept["runner"]

    patch = pytest.MonkeyPatch()
    patch.setattr(server, "Runner", runner)
    demo, url = server.serve(["shapes-unet", "shapes-mmdit"], output=folder, device="cpu", wait=False)
    patch.undo()
    yield Served(url, kept["runner"], folder)
    demo.close(verbose=False)


class Served:
    """Where an editor is, and what is behind it."""

    def __init__(self, url: str, runner: Any, folder: Any) -> None:
        self.url, self.runner, self.folder = url, runner, folder


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser without a network of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    sync = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Editor:
    """A page of the editor, as a person handles it."""

    def __init__(self, context: Any, url: str) -> None:
        self.faults: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda m: self.faults.append(m.text) if m.type == "error" else None)
        self.page.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.faults.append(r.url)
        )
        self.page.goto(url)
        self.page.locator("svg.stage[data-ready='1']").wait_for()
        self.page.locator("#knobs .cards[data-ready='1']").wait_for(state="attached")
        before = None
        while (now := self.page.locator("svg.stage").bounding_box()) != before:  # the page settles as its styles come
            before = now
            self.page.wait_for_timeout(150)

    # The canvas.

    def point(self, x: float, y: float) -> tuple[float, float]:
        box = self.page.locator("svg.stage").bounding_box()
        return box["x"] + x * box["width"], box["y"] + y * box["height"]

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        self.page.mouse.move(*self.point(*start))
        self.page.mouse.down()
        self.page.mouse.move(*self.point(*stop), steps=6)
        self.page.mouse.up()

    def region(self, phrase: str, box: tuple[float, float, float, float]) -> None:
        """Draw a region and write its phrase."""
        self.drag(box[:2], box[2:])
        self.page.keyboard.type(phrase)
        self.page.keyboard.press("Enter")

    def regions(self) -> list[tuple[str, list[float]]]:
        """Phrase and box of what the canvas shows, read off the drawing itself."""
        code = """() => {
          const [, , w, h] = document.querySelector("svg.stage").getAttribute("viewBox").split(" ").map(Number);
          return [...document.querySelectorAll("svg.stage g.item")].map((group) => {
            const body = group.querySelector("rect.body");
            const [x, y, a, b] = ["x", "y", "width", "height"].map((name) => Number(body.getAttribute(name)));
            const phrase = group.querySelector("title").textContent || "(no phrase)";
            return [phrase, [x / w, y / h, (x + a) / w, (y + b) / h]];
          });
        }"""
        return [(phrase, box) for phrase, box in self.page.evaluate(code)]

    # The rest.

    def add_method(self, name: str) -> None:
        self.page.locator("#knobs select.add").select_option(name)
        self.page.locator(f"#knobs fieldset[data-method='{name}']").wait_for()

    def fill(self, field: str, text: str) -> None:
        target = self.page.locator(f"#{field} textarea, #{field} input").first
        target.fill(text)
        target.blur()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def says(self, part: str, text: str) -> None:
        """Wait until a part of the page shows a text."""
        from playwright.sync_api import expect

        expect(self.page.locator(f"#{part}")).to_contain_text(text, timeout=PATIENCE)

    def draw(self) -> None:
        """Press Draw and wait for the picture."""
        self.page.click("#go")
        self.says("progress", "Done")


def newest(folder: Path) -> Path:
    """The last picture that was written."""
    return max(folder.glob("*.png"), key=lambda p: p.stat().st_mtime_ns)


@pytest.fixture
def editor(chromium: Any, served: Any) -> Iterator[Editor]:
    """A fresh page on a wide screen; nothing may fail in it, and nothing may leave the machine."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = Editor(context, served.url)
    yield page
    context.close()
    assert not page.faults, page.faults


@pytest.fixture
def phone(chromium: Any, served: Any) -> Iterator[Editor]:
    """The same on a phone, with fingers."""
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = Editor(context, served.url)
    yield page
    context.close()
    assert not page.faults, page.faults
