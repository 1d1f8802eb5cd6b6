"""Searches on Ray workers: the same scores as in one process, whoever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
from PIL import Image

from diffguide import cli
from diffguide.errors import ModelError, ParamError, SearchError
from diffguide.pipelines.source import load
from diffguide.search import Fleet, Hunt, hunt
from diffguide.search.objectives import Objective, brightness

PROMPTS = ("a red circle", "a blue square")
PLAN = Hunt(PROMPTS, objective="brightness", keep=2, steps=2, scale=5.0)
TRIALS = 15  # of the small model's 14 heads, and the plain one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def source(model: str) -> Callable[[], Any]:
    return partial(load, model, device="cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores, which fleets without an address use as well."""
    Fleet(workers=2).begin()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def logged(log: Path, end_at: int) -> Objective:
    """Brightness, each time with a line in the log; the process that writes line `end_at` is killed there.

    Nobody goes far ahead alone: before the end two processes must have written, after it three.
    """

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float]:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        asked = len(log.read_text().split())
        if asked == end_at:
            os.kill(os.getpid(), signal.SIGKILL)
        while asked > 2 and len(set(log.read_text().split())) < (3 if asked > end_at else 2):
            time.sleep(0.01)
        return brightness(pictures, prompts)

    return score


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def test_two_workers_find_what_one_process_finds_though_one_of_them_is_killed(
    cluster: str, source: Callable[[], Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    told: list[tuple[str, int, int]] = []
    found = hunt(
        source,
        PLAN,
        objective=logged(log, end_at=8),
        folder=tmp_path / "found",
        tell=lambda *t: told.append(t),
        ray=Fleet(workers=2),
    )
    assert found == hunt(source(), PLAN)
    assert len(lines(tmp_path / "found")) == TRIALS
    asked = log.read_text().split()
    assert len(asked) == TRIALS + 1 and len(set(asked)) == 3  # the killed trial once more, by a third worker
    assert told[0] == ("plain", 0, TRIALS) and told[-1] == ("done", TRIALS, TRIALS)
    assert len(told) == TRIALS + 2  # each trial as it is given out, one of them twice, and the end


def test_a_driver_that_is_killed_goes_on_with_nothing_lost_or_done_twice(
    cluster: str, model: str, source: Callable[[], Any], tmp_path: Path
) -> None:
    log, folder = tmp_path / "log", tmp_path / "found"
    program = f"""
import sys, time, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from functools import partial
from pathlib import Path
import test_fleet as t
from diffguide.pipelines.source import load
def score(pictures, prompts):
    with Path({str(log)!r}).open("a") as file:
        file.write("drawn ")
    if len(Path({str(log)!r}).read_text().split()) == 5:
        time.sleep(600)
    return [1.0 * len(p) for p in prompts]
t.hunt(partial(load, {model!r}, device="cpu"), t.PLAN, objective=score, folder=Path({str(folder)!r}),
       ray=t.Fleet(workers=1, address={cluster!r}))
"""
    driver = subprocess.Popen([sys.executable, "-c", program])
    try:
        while not log.exists() or len(log.read_text().split()) < 5:
            assert driver.poll() is None, "the driver ended by itself"
            time.sleep(0.05)
    finally:
        driver.kill()
        code = driver.wait()
    assert code == -signal.SIGKILL
    kept = lines(folder)
    assert len(kept) == 4
    asked = []

    def score(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[float]:
        asked.append(1)
        return [1.0 * len(p) for p in prompts]

    hunt(source(), PLAN, objective=score, folder=folder)
    assert len(asked) == TRIALS - 4
    done = lines(folder)
    assert done[:4] == kept and len({(job["round"], str(job["unit"])) for job in done}) == len(done) == TRIALS


def test_the_command_line_finds_the_same_with_workers_and_without(
    cluster: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["heads", "search", "--model", model, "--device", "cpu", "--layers", "mid", "--keep", "1", "--steps", "1"]
    line += ["--prompt", PROMPTS[0], "--objective", "contrast", "--json", "--out"]
    assert cli.main([*line, str(tmp_path / "here")]) == 0
    here = json.loads(capsys.readouterr().out)
    assert cli.main([*line, str(tmp_path / "there"), "--ray", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == here


def test_what_a_worker_raises_is_raised_here_and_a_job_that_ends_every_worker_is_named(cluster: str) -> None:
    def wrong(held: Any, job: Any) -> None:
        raise ParamError(f"{held} cannot do {job}")

    def deadly(held: Any, job: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with Fleet(workers=1, retries=1).crew(lambda workers: f"one of {workers}") as crew:
        with pytest.raises(ParamError, match="one of 1 cannot do that"):
            list(crew.run(wrong, ["that"]))
        assert list(crew.run(lambda held, job: held + job, [" more"])) == [(" more", "one of 1 more")]
        given: list[str] = []
        with pytest.raises(SearchError, match="round 1, L0H3: the worker died, 2 times out of 2; "):
            list(crew.run(deadly, ["round 1, L0H3", "round 1, L0H4"], given.append))
        assert given == ["round 1, L0H3"] * 2


def test_a_pipeline_that_cannot_be_loaded_is_told(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        hunt(partial(load, str(tmp_path)), PLAN, ray=Fleet(workers=1))


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ({"workers": 0}, "Fleet.workers = 0 is outside"),
        ({"workers": 1.5}, "Fleet.workers = 1.5 is not"),
        ({"retries": -1}, "Fleet.retries = -1 is outside"),
    ],
)
def test_fleets_that_cannot_be_are_refused(fleet: dict[str, Any], said: str) -> None:
    with pytest.raises(ParamError, match=said):
        Fleet(**fleet)


def test_more_workers_than_gpus_are_refused(cluster: str) -> None:
    with pytest.raises(ParamError, match="workers = 2, but there are 0 GPUs"):
        hunt(print, PLAN, ray=Fleet(workers=2, gpu=True))


def test_an_address_is_refused_where_ray_is_at_work_already(cluster: str) -> None:
    with pytest.raises(SearchError, match="Ray is at work in this process already, so the address 'auto'"):
        hunt(print, PLAN, ray=Fleet(address="auto"))


def test_a_pipeline_is_not_sent_to_workers(source: Callable[[], Any]) -> None:
    with pytest.raises(ParamError, match="a StableDiffusionPipeline cannot be sent to workers"):
        hunt(source(), PLAN, ray=Fleet())


def test_without_ray_its_option_is_refused_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["heads", "search", "--model", model, "--prompt", PROMPTS[0], "--ray"]) == 2
    assert "pip install 'diffguide[ray]'" in capsys.readouterr().err
    assert cli.main(["heads", "search", "--workers", "2"]) == 2
    assert "--workers is of --ray" in capsys.readouterr().err
    assert cli.main(["heads", "search", "--ray", "--device", "cuda:1"]) == 2
    assert "each worker has a device of its own; say cuda" in capsys.readouterr().err
