"""The editor's functions for programs: told steps, whole pictures, an order, an end for who leaves."""

import asyncio
import gc
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from browsing import PATIENCE, newest

from diffguide.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
PROMPT = "a red circle and a blue square"
SECONDS = PATIENCE / 1000


def recipe(**changes):
    return {"version": 1, "model": "shapes-unet", "prompt": PROMPT, "steps": 3} | changes


@pytest.fixture(scope="module")
def client(served):
    from gradio_client import Client

    return Client(served.url, verbose=False)


def wait_until(met, seconds=3 * SECONDS):
    until = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def test_a_recipe_comes_back_as_a_picture_that_carries_it(client, served):
    job = client.submit(recipe(seed=11), api_name="/draw")
    path, told = job.result(timeout=3 * SECONDS)
    assert Recipe.load(path).seed == 11 and told["recipe"]["seed"] == 11 and told["cost"]
    steps = [answer[1].get("step") for answer in job.outputs() if isinstance(answer[1], dict)]
    assert {1, 2, 3} <= set(steps)
    assert Recipe.load(newest(served.folder)) == Recipe.load(path)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"steps": 0}, "steps"), ({"model": "some/other"}, "this editor serves"), ({"code": 1}, "unknown field")],
)
def test_a_wrong_recipe_is_told_by_name(client, wrong, text):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=text):
        client.predict(recipe(**wrong), api_name="/draw")


def test_methods_plans_and_problems_are_functions(client):
    assert {"bacon", "pag"} <= {row["name"] for row in client.predict(api_name="/methods")["methods"]}
    layout = client.predict(PROMPT, 0, 1.0, api_name="/plan")
    assert [region["phrase"] for region in layout["regions"]] == ["red circle", "blue square"]
    notes = client.predict(recipe(layout=layout), api_name="/explain")["notes"]
    assert any("the regions do nothing" in note["text"] for note in notes)


def test_eight_at_once_come_in_their_order_and_none_is_lost(client, served):
    from gradio_client import Client

    seeds = list(range(100, 108))
    jobs = []
    with served.runner.lock:  # the device is busy until all are there
        first = client.submit(recipe(steps=2), api_name="/draw")
        wait_until(lambda: served.runner.workers)
        for seed in seeds:  # each is in the queue before the next one comes
            jobs.append(Client(served.url, verbose=False).submit(recipe(seed=seed, steps=2), api_name="/draw"))
            wait_until(lambda: jobs[-1].status().code.name == "IN_QUEUE")
    assert first.result(timeout=6 * SECONDS)
    answers = [job.result(timeout=6 * SECONDS) for job in jobs]
    assert [told["recipe"]["seed"] for _, told in answers] == seeds
    drawn = sorted(served.folder.glob("*.png"), key=lambda p: p.stat().st_mtime_ns)[-8:]
    assert [Recipe.load(path).seed for path in drawn] == seeds


def test_a_cancelled_job_and_a_killed_client_free_the_device(client, served):
    pictures = len(list(served.folder.glob("*.png")))
    job = client.submit(recipe(steps=200), api_name="/draw")
    wait_until(lambda: len(job.outputs()) > 1)
    job.cancel()
    wait_until(lambda: not served.runner.workers)
    program = f"""
from gradio_client import Client
for told in Client({served.url!r}, verbose=False).submit({recipe(steps=200)!r}, api_name="/draw"):
    print(told, flush=True)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline()  # it hears of its steps
    assert served.runner.workers
    other.kill()
    other.communicate()
    wait_until(lambda: not served.runner.workers)
    assert len(list(served.folder.glob("*.png"))) == pictures, "they were drawn to the end"
    assert client.predict(recipe(seed=12), api_name="/draw")[1]["recipe"]["seed"] == 12


def test_runs_leave_nothing_behind(client):
    from diffguide.app.run import Drawn
    from diffguide.guide import Guide

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (Drawn, Guide) for thing in gc.get_objects())

    client.predict(recipe(steps=1), api_name="/draw")
    before = alive()
    for seed in range(6):
        client.predict(recipe(steps=1, seed=seed), api_name="/draw")
    assert alive() <= before


def test_language_models_have_the_same_functions_as_tools(served, tmp_path):
    mcp = pytest.importorskip("mcp", reason="--mcp needs the extra mcp")
    http = pytest.importorskip("mcp.client.streamable_http")
    from diffguide.app import server

    demo, url = server.serve(["shapes-unet"], output=tmp_path, device="cpu", mcp=True, wait=False)

    async def talk():
        async with (
            http.streamable_http_client(url + "gradio_api/mcp/") as (get, send, _),
            mcp.ClientSession(get, send) as session,
        ):
            await session.initialize()
            names = {tool.name for tool in (await session.list_tools()).tools}
            drawn = await session.call_tool("draw", {"recipe": recipe(seed=12)})
            refused = await session.call_tool("draw", {"recipe": recipe(model="some/other")})
            return names, drawn, refused

    try:
        with ThreadPoolExecutor(1) as thread:  # where a browser is open, this one has a loop already
            names, drawn, refused = thread.submit(lambda: asyncio.run(talk())).result()
    finally:
        demo.close(verbose=False)
    del demo
    gc.collect()  # the server's loop, here rather than in the middle of another test
    assert names == {"draw", "explain", "plan", "methods"}
    assert not drawn.isError and Recipe.load(newest(tmp_path)).seed == 12
    assert refused.isError and "this editor serves shapes-unet" in refused.content[0].text
