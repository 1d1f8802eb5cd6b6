"""Results as tables, for a terminal and for a page."""

from typing import Any

Result = dict[str, Any]


def metrics(result: Result) -> list[str]:
    """The metrics of a result, in order of appearance."""
    found = [key for row in result["rows"] for key, value in row.items() if isinstance(value, dict)]
    return list(dict.fromkeys(found))


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def interval(value: dict[str, float] | None) -> str:
    """`0.745 [0.7, 0.78]`, or the number alone where the interval has no width."""
    if value is None:
        return ""
    middle, low, high = (number(value[key]) for key in ("value", "low", "high"))
    return middle if low == high == middle else f"{middle} [{low}, {high}]"


def cells(result: Result) -> list[list[str]]:
    """The table: a line of headings, then a line for each row."""
    labels = [key for key in ("method", "case", "route", "denoiser", "n") if any(key in row for row in result["rows"])]
    columns = metrics(result)
    lines = [[*labels, *(name.replace("_", " ") for name in columns)]]
    for row in result["rows"]:
        lines.append([*(str(row.get(key, "")) for key in labels), *(interval(row.get(name)) for name in columns)])
    return lines


def as_text(result: Result) -> str:
    """One metric a line and one column a row of the result: rows are few, metrics many."""
    across = [list(line) for line in zip(*cells(result), strict=True)]
    widths = [max(len(line[i]) for line in across) for i in range(len(across[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in across]
    return "\n".join([f"{result['bench']} on {result['model']}", *lines, *_notes(result)]) + "\n"


def as_markdown(result: Result) -> str:
    """The page `report.md`."""
    across = [list(line) for line in zip(*cells(result), strict=True)]
    lines = ["| " + " | ".join(line) + " |" for line in across]
    lines.insert(1, "|" + "---|" * len(across[0]))
    page = [f"# Bench {result['bench']} on {result['model']}", "", *lines, ""]
    page += [line + "\n" for line in _notes(result)]
    if "sheet" in result:
        page += [f"![pictures]({result['sheet']['file']})", "", result["sheet"]["caption"], ""]
    return "\n".join(page)


def _notes(result: Result) -> list[str]:
    notes = []
    if len(result.get("ranking", {}).get("methods", ())) > 2:
        ranking = result["ranking"]
        notes.append(f"Ranked by {ranking['by'].replace('_', ' ')}: {', '.join(ranking['methods'])}.")
    if "detector" in result:
        told = ", ".join(
            f"{key.replace('_', ' ')} {interval(value)}"
            for key, value in result["detector"].items()
            if isinstance(value, dict)
        )
        notes.append(f"The detector on the drawn truth of these {result['detector']['n']} scenes: {told}.")
    for case, lost in result.get("absent", {}).items():
        if lost:
            notes.append(f"Absent from {case}: " + "; ".join(f"{name}: {why}" for name, why in lost.items()) + ".")
    for title in ("settings", "versions"):
        notes.append(f"{title.capitalize()}: " + ", ".join(f"{k} {v}" for k, v in result.get(title, {}).items()) + ".")
    if "intervals" in result:
        notes.append(f"Intervals: {result['intervals']}.")
    return notes
