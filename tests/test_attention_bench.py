"""The bench of attention: what is wrong is not timed, what is absent is told, and every case can be called."""

import json

import pytest
import torch

from diffguide import bench
from diffguide.bench import attention, attention_cases, guided_steps, thrift
from diffguide.bench.attention_cases import CASES, Case, columns
from diffguide.bench.attention_oracle import sampled, samples, truth
from diffguide.errors import ParamError
from diffguide.kernels import Window, attend, door
from diffguide.kernels.problem import Problem

CPU = torch.device("cpu")
TINY = Case("tiny", (1, 2, 64, 64, 8), (1, 2, 48, 48, 8), columns(3))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(attention.CASES, "tiny", TINY)


@pytest.fixture
def without_flex(monkeypatch):
    """Compiling takes longer than all the rest."""
    route = door.ROUTES["flex"]
    monkeypatch.setitem(door.ROUTES, "flex", type(route)("flex", lambda problem: "left out", route.run, route.why))


def test_rows_tell_what_was_taken_and_what_it_cost(tiny, without_flex, tmp_path, capsys):
    file = tmp_path / "found.json"
    found = bench.run_bench("attention", device="cpu", cases=["tiny"], limit=2, json=file)
    assert json.loads(file.read_text()) == found
    rows = {row["method"]: row for row in found["rows"]}
    routes = {"lse-columns", "side-values", "recompute", "reference"}
    assert set(rows) == {"torch", "diffguide", "torch-math", *routes}
    assert rows["torch"]["seconds_ratio"] == {"value": 1, "low": 1, "high": 1}
    assert rows["diffguide"]["route"] == "lse-columns" and rows["diffguide"]["case"] == "tiny"
    assert all(row["error"]["value"] < 1e-6 and row["n"] == 2 for row in rows.values())
    absent = found["absent"]["tiny"]
    assert absent["sdpa"] == "gives no maps" and absent["tiles"] == "there is no window"
    assert set(rows) | set(absent) == set(attention.VARIANTS)
    assert found["settings"]["dtype"] == "float32" and found["model"] == "calls of its own"
    assert "Absent from tiny: " in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch):
    route = door.ROUTES["side-values"]
    wrong = type(route)(route.name, route.reason, lambda p: tuple(x * 1.01 for x in route.run(p)), route.why)
    monkeypatch.setitem(door.ROUTES, "side-values", wrong)
    for gradient in (False, True):
        case = Case("tiny", TINY.sizes, TINY.small, TINY.asked, gradient)
        rows, absent = attention.compare(case, ["side-values", "recompute"], CPU, torch.float32, 1)
        assert [row["method"] for row in rows] == ["torch", "recompute"]
        assert absent["side-values"].startswith("wrong: its error against float64 is 1.0e-02")


def test_wrong_gradients_are_seen(monkeypatch):
    """The output is right, but half of the gradient is lost."""
    route = door.ROUTES["recompute"]

    def halved(problem):
        return tuple(x * 0.5 + 0.5 * x.detach() for x in route.run(problem))

    monkeypatch.setitem(door.ROUTES, "recompute", type(route)(route.name, route.reason, halved, route.why))
    case = Case("tiny", TINY.sizes, TINY.small, TINY.asked, gradient=True)
    rows, absent = attention.compare(case, ["recompute"], CPU, torch.float32, 1)
    assert [row["method"] for row in rows] == ["torch"] and "5.0e-01" in absent["recompute"]


@pytest.mark.parametrize("name", CASES)
def test_every_case_and_its_twin_are_calls_that_can_be_made(name):
    case = CASES[name]
    for sizes in (case.small, case.sizes):
        B, H, N, M, D = sizes
        if B * H * N > 2**18 and "blocks" in name:
            continue  # its choices alone are gigabytes
        q, k = (torch.empty(B, H, n, D, device="meta") for n in (N, M))
        Problem(q, k, k, **case.asked(sizes)).check()
    assert case.small[1] <= case.sizes[1] and case.small[4] == case.sizes[4]


def test_twins_of_windows_are_windows_of_the_same_kind():
    for name in ("flux_2048_window", "wan_480p_self", "wan_1080p_self"):
        case = CASES[name]
        ours, theirs = (case.asked(sizes)["window"] for sizes in (case.small, case.sizes))
        shares = [Window(w.shape, w.sizes).visible(range(1), w.tokens).float().mean() for w in (ours, theirs)]
        assert ours.tokens < theirs.tokens and 0.2 < shares[0] / shares[1] < 5


def test_regions_of_the_cases_see_their_own_words_and_those_of_all():
    asked = attention_cases.regions(4, 2)((1, 1, 8, 10, 4))["regions"]
    seen = asked.shared()[0, 0] != 0
    assert seen[:, :2].all() and seen[:, 2:].sum(1).tolist() == [2] * 8
    assert [row.nonzero()[0].item() for row in seen[:, 2:]] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_sampled_rows_are_those_of_the_whole():
    case = Case("tiny", TINY.sizes, (1, 2, 100, 100, 8), columns(3))
    tensors, options = case.inputs(CPU, torch.float32)
    rows = samples(100)
    assert sum(len(range(100)[own]) for own in rows) == 80
    found = sampled(attend(*tensors, **options, backend="reference"), rows)
    right = truth(tensors, options, rows)
    assert all(torch.allclose(x, r, atol=1e-6) and x.shape == r.shape for x, r in zip(found, right, strict=True))
    assert samples(7) == [slice(0, 7)]


def test_a_guided_step_is_the_same_by_both_ways(monkeypatch):
    model = thrift.sd15_shaped((8, 8, 16, 16), 16)
    monkeypatch.setattr(guided_steps, "_model", lambda *_: model)
    found = bench.run_bench("attention", device="cpu", cases=["sd15_blocks_guided"], limit=1, progress=False)
    assert [row["method"] for row in found["rows"]] == list(guided_steps.METHODS)
    assert all(row["error"]["value"] < 1e-4 and row["seconds_ratio"]["value"] > 0 for row in found["rows"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["sdxl"]}, "no case is called 'sdxl' .known: sd15_512_self"),
        ({"cases": "sdxl"}, "give a list"),
        ({"methods": ["cuda"]}, "no variant is called 'cuda' .known: torch, diffguide, fused"),
        ({"seeds": 2}, "attention has no seeds"),
        ({"device": "warp"}, "device = 'warp'"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ParamError, match=message):
        bench.run_bench("attention", progress=False, **options)


def test_other_benches_have_no_cases():
    with pytest.raises(ParamError, match="the bench thrift has no cases"):
        bench.run_bench("thrift", cases=["tiny"], progress=False)
