"""The table of families: every cell is tried on a small model of the real class, and the page says the same."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_calls import PROMPT, Loop
from tiny_models import MODELS

from diffguide import Guide, abilities, cli
from diffguide.errors import DiffguideError, OutputError
from diffguide.family import ABILITIES
from diffguide.maps import Maps, Watch
from diffguide.method import Context, Method
from diffguide.params import param
from diffguide.processors import NAG, PAG, CaptureMaps
from diffguide.registry import families, of_model, refused

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"


@dataclass(frozen=True)
class Look(Method):
    """Keeps the maps of one kind that it sees; changes nothing."""

    kind: str = param("cross", "what to look at")

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"x": Watch(self.kind)}  # type: ignore[arg-type]

    def observe(self, maps: Maps, context: Context) -> None:
        context.memory["maps"] = {self.kind: torch.cat([seen.values.flatten(0, 1) for seen in maps["x"]])}


@dataclass(frozen=True)
class Pull(Method):
    """Attention to two words, raised."""

    def watch(self, context: Context) -> dict[str, Watch]:
        return {"words": Watch("cross", columns=(1, 2))}

    def rate(self, context: Context) -> float:
        return 100.0

    def most(self, context: Context) -> int:
        return 2

    def loss(self, maps: Maps, context: Context) -> torch.Tensor:
        return 20 - torch.stack([seen.values.sum(-1).mean(-1) for seen in maps["words"]]).mean(0).log()


def attach(pipe: Loop) -> None:
    plain = pipe()
    with Guide(pipe):
        assert torch.equal(pipe(), plain)
    assert torch.equal(pipe(), plain)


def see(pipe: Loop, kind: str) -> None:
    plain = pipe()
    with Guide(pipe, Look(kind=kind)) as guide:
        assert torch.equal(pipe(), plain)
        run = guide._run
    assert run is not None
    maps = run.memories[0]["maps"][kind]
    assert maps.shape[0] and maps.isfinite().all() and (maps >= 0).all() and maps.sum(-1).max() < 1 + 1e-5


def descend(pipe: Loop) -> None:
    plain = pipe()
    with Guide(pipe, Pull()) as guide:
        moved = pipe()
    losses = [next(iter(entry.values()))[0] for entry in guide.report.steps[0].losses]
    assert losses[0] > losses[1] and (moved - plain).abs().max() > 1e-6


def weaken(pipe: Loop) -> None:
    plain = pipe()
    with Guide(pipe, PAG(layers="all")) as guide:
        weak = pipe()
    assert guide.report.forwards >= 4 and (weak - plain).abs().max() > 1e-5


def find(pipe: Loop) -> None:
    plain = pipe()
    with Guide(pipe, CaptureMaps(words=("red circle", "red")), prompt=PROMPT) as guide:
        assert torch.equal(pipe(), plain)
    frames = guide._run.size[:-2]  # type: ignore[union-attr]
    for word in ("red circle", "red"):
        # this loop tells OmniGen nothing of its one picture, whose two branches are then taken for two
        rows = 2 if "omnigen" in type(pipe.family).__module__ else 1
        assert guide.maps[word].shape[:-2] == (rows, *frames)
        assert 0 < guide.maps[word].mean() < 1


def tell(pipe: Loop) -> None:
    plain, states = pipe(), torch.randn(1, 6, 8)

    def keep(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal states
        states = kwargs.get("encoder_hidden_states", states)

    handle = pipe.model.register_forward_pre_hook(keep, with_kwargs=True)
    pipe()
    handle.remove()
    with Guide(pipe, NAG(embeds=states)):
        assert (pipe() - plain).abs().max() < 1e-5
    with Guide(pipe, NAG(embeds=1.5 * states.flip(1))):
        assert (pipe() - plain).abs().max() > 1e-5


TRIALS: dict[str, Any] = {
    "attach": attach,
    "word maps": lambda pipe: see(pipe, "cross"),
    "self maps": lambda pipe: see(pipe, "self"),
    "gradient": descend,
    "weak pass": weaken,
    "words": find,
    "second prompt": tell,
}


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_the_table_says_is_so(name: str, ability: str) -> None:
    pipe = Loop(name)
    if ability not in pipe.family.lacks:
        TRIALS[ability](pipe)
        return
    with pytest.raises(DiffguideError) as error:
        TRIALS[ability](pipe)
    assert pipe.family.lacks[ability] in str(error.value)


def test_every_ability_has_a_trial_and_no_family_lacks_what_there_is_not() -> None:
    assert set(TRIALS) == set(ABILITIES)
    assert not {ability for family in families() for ability in family.lacks} - set(ABILITIES)


def test_every_denoiser_of_the_table_has_a_small_model_with_the_kinds_of_attention_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffguide.registry._registered", [])
    kinds: dict[str, set[str]] = {}
    for build in MODELS.values():
        model = build()
        family = of_model(model)
        kinds.setdefault(type(model).__name__, set()).update(site.kind for site in family.sites(model))
    for row in abilities.table():
        for model in row["models"]:
            assert model in kinds, f"{model} has no small model in tiny_models.py: its row of the table is untested"
            assert kinds[model] == set(row["kinds"]), model


def test_the_page_shows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffguide.registry._registered", [])
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(abilities.BEGIN)[2].partition(abilities.END)[0].strip()
    assert shown == abilities.markdown(), "write it again: diffguide families --page docs/families.md"


def test_a_page_is_written_between_its_marks(tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{abilities.BEGIN}\nold\n{abilities.END}\nafter\n")
    for told in ("written", "as it was"):
        assert cli.main(["families", "--page", str(page)]) == 0
        assert told in capsys.readouterr().err
    text = page.read_text()
    assert text.startswith(f"before\n{abilities.BEGIN}\n") and text.endswith(f"{abilities.END}\nafter\n")
    assert "\nold\n" not in text and "`SD3Transformer2DModel`" in text
    page.write_text("no marks")
    with pytest.raises(OutputError, match="0 places"):
        abilities.write(page)
    assert cli.main(["families", "--page", str(tmp_path / "none.md")]) == 2


def test_the_command_lists_what_the_table_holds(capsys: Any) -> None:
    assert cli.main(["families", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"families": abilities.table(), "refused": refused()}
    assert cli.main(["families"]) == 0
    text = capsys.readouterr().out
    assert "sana: SanaTransformer2DModel; cross attention; attach, word maps, gradient, words" in text
    assert "  no weak pass: its self-attention is linear" in text and "refused: CosmosTransformer3DModel: " in text
    assert cli.main(["families", "WanTransformer3DModel", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["families"]
    assert row["name"] == "wan" and "frames" in row["abilities"]["self maps"]
    assert cli.main(["families", "LTX2VideoTransformer3DModel"]) == 2
    assert "cannot be steered" in capsys.readouterr().err
    assert cli.main(["families", "mine"]) == 2
    assert "known: cogvideox, flux" in capsys.readouterr().err
