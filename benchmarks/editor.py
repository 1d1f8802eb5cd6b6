"""The editor measured and photographed: how soon it is there, how it bears many runs, how it looks.

    python benchmarks/editor.py start     seconds to the first usable page and from a click to the first preview
    python benchmarks/editor.py load      200 runs by 8 clients at once: none lost, memory of the server
    python benchmarks/editor.py shots     the pictures of docs/pictures, wide, on a phone and dark

Each starts an editor of its own, in a process of its own. `start` and `shots` need a Chromium.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
RECIPE = {"version": 1, "model": "shapes-unet", "prompt": "a red circle and a blue square", "steps": 4}
COLOURS = 128  # of a picture's palette: pages have few


@contextlib.contextmanager
def editor(*options: str) -> Iterator[tuple[str, int, float]]:
    """An editor in a process of its own: its address, its process id, the seconds until it answered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "diffguide", "app", "--port", str(port), "--output-dir", folder, *options]
        began = time.monotonic()
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}/"
        try:
            while True:
                if server.poll() is not None:
                    raise SystemExit(f"the editor ended with code {server.returncode}: {' '.join(command)}")
                try:
                    urllib.request.urlopen(url, timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.05)
            yield url, server.pid, time.monotonic() - began
        finally:
            server.terminate()
            server.wait()


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if path is None:
        raise SystemExit("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


def opened(chromium: Any, url: str, **options: Any) -> Any:
    """A page, when it can be used."""
    page = chromium.new_context(**options).new_page()
    page.set_default_timeout(300_000)
    page.goto(url)
    page.locator("svg.stage[data-ready='1']").wait_for()
    page.locator("#knobs .cards[data-ready='1']").wait_for(state="attached")
    return page


def start(options: argparse.Namespace) -> None:
    """Print medians over several starts."""
    rows = []
    for _ in range(options.times):
        with editor("--model", "shapes-unet") as (url, _, served), browser() as chromium:
            began = time.monotonic()
            page = opened(chromium, url)
            loaded = time.monotonic() - began
            began = time.monotonic()
            page.click("#go")
            page.locator("#progress .preview[data-seen='1']").wait_for(state="attached")
            rows.append(
                {"served": served, "page": loaded, "usable": served + loaded, "preview": time.monotonic() - began}
            )
            print({k: round(v, 2) for k, v in rows[-1].items()}, flush=True)
    print(json.dumps({name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}))


def memory(pid: int) -> float:
    """Resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmRSS: the memory of a process is read on Linux alone")


def load(options: argparse.Namespace) -> None:
    """Clients that draw one picture after the other; print how many came back and the server's memory."""
    from gradio_client import Client

    with editor("--model", "shapes-unet") as (url, pid, _):
        left, lock = list(range(options.runs)), threading.Lock()
        done: list[int] = []
        used: list[tuple[int, float]] = []
        faults: list[str] = []

        def work() -> None:
            client = Client(url, verbose=False)
            while True:
                with lock:
                    if not left:
                        return
                    seed = left.pop(0)
                try:
                    path, told = client.predict({**RECIPE, "seed": seed}, api_name="/draw")
                    if not path or told["recipe"]["seed"] != seed:
                        faults.append(f"seed {seed}: another's picture")
                except Exception as error:  # whatever it is, the run is lost
                    faults.append(f"seed {seed}: {error}")
                with lock:
                    done.append(seed)
                    used.append((len(done), memory(pid)))
                    if len(done) % 20 == 0:
                        print(f"{len(done)} runs, {used[-1][1]:.0f} MiB", flush=True)

        began = time.monotonic()
        clients = [threading.Thread(target=work) for _ in range(options.clients)]
        [client.start() for client in clients]
        [client.join() for client in clients]
        third = max(1, len(used) // 3)
        told = {
            "runs": len(done),
            "lost": len(faults),
            "seconds": round(time.monotonic() - began, 1),
            "MiB in the second third": round(statistics.median(m for _, m in used[third : 2 * third] or used)),
            "MiB in the last third": round(statistics.median(m for _, m in used[-third:])),
        }
        print(json.dumps(told))
        if faults:
            raise SystemExit("\n".join(faults[:5]))


def shots(options: argparse.Namespace) -> None:
    """Draw a scene and photograph the page."""
    options.out.mkdir(parents=True, exist_ok=True)
    with editor("--model", "shapes-unet") as (url, _, _), browser() as chromium:
        for name, size, more in (
            ("wide", (1400, 1000), {}),
            ("dark", (1400, 1000), {"color_scheme": "dark"}),
            ("phone", (390, 844), {"has_touch": True, "is_mobile": True}),
        ):
            page = opened(chromium, url, viewport={"width": size[0], "height": size[1]}, **more)
            scene(page, options.steps)
            if name == "dark":
                page.get_by_role("tab", name="Maps", exact=True).click()
            page.wait_for_timeout(1500)
            save(page, options.out / f"editor-{name}.png")
            page.context.close()


def scene(page: Any, steps: int) -> None:
    """Three boxes and a method, drawn."""
    page.click("#plan")
    page.locator("svg.stage g.item").nth(2).wait_for()
    page.locator("#knobs select.add").select_option("bacon")
    page.locator("#steps input").fill(str(steps))
    page.locator("#steps input").blur()
    page.locator("#compare input").check()
    page.click("#go")
    page.wait_for_function("document.querySelector('#progress .text').textContent.startsWith('Done')")
    page.wait_for_function("document.querySelector('#notes').textContent.includes('No problems')")


def save(page: Any, path: Path) -> None:
    """The whole page, with a palette, so that it stays small."""
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(path=str(Path(folder) / "page.png"), full_page=True)
        with Image.open(Path(folder) / "page.png") as image:
            image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB", flush=True)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True)
    p = commands.add_parser("start")
    p.add_argument("--times", type=int, default=3)
    p.set_defaults(command=start)
    p = commands.add_parser("load")
    p.add_argument("--runs", type=int, default=200)
    p.add_argument("--clients", type=int, default=8)
    p.set_defaults(command=load)
    p = commands.add_parser("shots")
    p.add_argument("--out", type=Path, default=PICTURES)
    p.add_argument("--steps", type=int, default=10)
    p.set_defaults(command=shots)
    options = top.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
