"""The families as data: what there is and what can be done with each; the table of docs/families.md."""

import re
from pathlib import Path
from typing import Any

from diffguide.errors import FamilyError, OutputError
from diffguide.family import ABILITIES, Family
from diffguide.registry import families, refused

BEGIN, END = "<!-- families: written by `diffguide families --page` -->", "<!-- /families -->"


def table() -> list[dict[str, Any]]:
    """Every family in plain JSON values.

    A row has the family's name (its file), class, help, the denoisers it describes, the kinds of attention among its
    sites, and `abilities`: for each of `ABILITIES` an empty text where it works, else the reason why it is refused.
    """
    rows = [
        {
            "name": name_of(family),
            "class": type(family).__name__,
            "help": (type(family).__doc__ or "").strip().partition("\n")[0],
            "models": list(family.models),
            "kinds": list(family.kinds),
            "abilities": {ability: family.lacks.get(ability, "") for ability in ABILITIES},
        }
        for family in families()
    ]
    return sorted(rows, key=lambda row: row["name"])


def name_of(family: Family) -> str:
    """The name of the file that describes it."""
    return type(family).__module__.rpartition(".")[2]


def named(name: str) -> list[dict[str, Any]]:
    """The rows of a family's file, or of the class of one of its denoisers; raises FamilyError with the known ones."""
    rows = [row for row in table() if name in (row["name"], row["class"], *row["models"])]
    if rows:
        return rows
    if name in refused():
        raise FamilyError(f"{name} cannot be steered: {refused()[name]}")
    known = ", ".join(sorted({row["name"] for row in table()}))
    raise FamilyError(f"no family is called {name!r:.60} (known: {known})")


def markdown() -> str:
    """The table in Markdown; what is refused is numbered, with the reasons below."""
    reasons: dict[str, int] = {}
    lines = [
        f"| family | denoiser | attention | {' | '.join(ABILITIES)} |",
        "|---" * (3 + len(ABILITIES)) + "|",
    ]

    def cell(reason: str) -> str:
        return f"no ({reasons.setdefault(reason, len(reasons) + 1)})" if reason else "yes"

    for row in table():
        cells = [cell(row["abilities"][ability]) for ability in ABILITIES]
        models = ", ".join(f"`{m}`" for m in row["models"])
        lines.append(f"| `{row['name']}` | {models} | {', '.join(row['kinds'])} | {' | '.join(cells)} |")
    for model, reason in sorted(refused().items()):
        lines.append(f"| refused | `{model}` | | {cell(reason)} |{' |' * (len(ABILITIES) - 1)}")
    notes = [f"{number}. {reason[:1].upper()}{reason[1:]}." for reason, number in reasons.items()]
    return "\n".join([*lines, "", *notes])


def write(page: Path) -> bool:
    """Put the table between its marks in a page; returns whether that changed anything.

    Raises OutputError where the page has no such marks, or cannot be read or written.
    """
    try:
        old = page.read_text(encoding="utf-8")
        new, times = re.subn(
            f"{re.escape(BEGIN)}.*?{re.escape(END)}",
            lambda _: f"{BEGIN}\n\n{markdown()}\n\n{END}",
            old,
            flags=re.DOTALL,
        )
        if times != 1:
            raise OutputError(f"{page} has {times} places for the table, expected one: {BEGIN} and {END}")
        if new != old:
            page.write_text(new, encoding="utf-8")
    except OSError as fault:
        raise OutputError(f"cannot write {page}: {fault.strerror or fault}") from None
    return new != old
