"""What was drawn and what it cost, summed up over scenes and batches, each figure with its interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffguide.bench.contenders import PLAIN
from diffguide.bench.ledger import Record
from diffguide.bench.statistics import Interval, difference, ratio

if TYPE_CHECKING:
    from diffguide.bench.pictures import PictureBench


def summary(bench: "PictureBench", label: str, records: Sequence[Record], against: str = PLAIN) -> dict[str, Any]:
    """A row of the result.

    Shares and `extra_objects` (for each picture) resample scenes, each with all its pictures; costs resample batches.
    `seconds` is for each picture, `memory` (MiB) is the mean of the batches' peaks. Gains are above what the contender
    `against` drew of the same scenes.
    """
    runs = [r["runs"][label] for r in records]
    plain = [r["runs"][PLAIN] for r in records]
    sizes = [len(r["pictures"]) for r in runs]
    seconds, memory = [r["seconds"] for r in runs], [r["memory"] for r in runs]
    losses = [r["loss"] for r in runs if bench.losses and r["loss"] is not None]
    drawn, base = ([p for r in some for p in r["pictures"]] for some in (runs, [r["runs"][against] for r in records]))
    gains = {f"{name}_gain": gained(drawn, base, *counts) for name, counts in bench.gains.items()}
    return {
        "method": label,
        "n": sum(sizes),
        **bench.shares(drawn),
        **(gains if label != against else {}),
        "seconds_ratio": ratio(seconds, [r["seconds"] for r in plain]),
        "memory_ratio": ratio(memory, [r["memory"] for r in plain]),
        "forwards": ratio([r["forwards"] * n for r, n in zip(runs, sizes, strict=True)], sizes),
        "backwards": ratio([r["backwards"] * n for r, n in zip(runs, sizes, strict=True)], sizes),
        "seconds": ratio(seconds, sizes),
        "memory": ratio(memory, [1.0] * len(memory)),
        **({"last_loss": ratio(losses, [1.0] * len(losses))} if losses else {}),
    }


def ranked(rows: Sequence[dict[str, Any]], metric: str) -> list[str]:
    """The methods, the best first."""
    return [row["method"] for row in sorted(rows, key=lambda row: -row[metric]["value"])]


def share(pictures: Sequence[dict[str, int]], above: str, below: str | None = None) -> Interval:
    """Sum of one count over the sum of another, or over pictures; scenes are resampled, each with all its pictures.

    Scenes in which there is nothing to count (a sum of 0 below) are left out.
    """
    a, b = by_scene(pictures, above, below)
    return ratio(a, b) if a else {"value": 0.0, "low": 0.0, "high": 0.0}


def by_scene(pictures: Sequence[dict[str, int]], above: str, below: str | None = None) -> tuple[list[int], list[int]]:
    """The sums of both counts for each scene, in the order of the list; scenes with nothing below are left out."""
    scenes: dict[int, list[int]] = {}
    for p in pictures:
        sums = scenes.setdefault(p["scene"], [0, 0])
        sums[0] += p[above]
        sums[1] += 1 if below is None else p[below]
    counted = [sums for _, sums in sorted(scenes.items()) if sums[1] > 0]
    return [a for a, _ in counted], [b for _, b in counted]


def pooled(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of a batch as one: all their pictures, and their mean cost."""
    mean = {key: sum(run[key] for run in runs) / len(runs) for key in ("seconds", "memory", "forwards", "backwards")}
    return {**mean, "loss": None, "pictures": [picture for run in runs for picture in run["pictures"]]}


def gained(
    pictures: Sequence[dict[str, int]], base: Sequence[dict[str, int]], above: str, below: str | None = None
) -> Interval:
    """What a share is above that of other pictures of the same scenes; scenes that either leaves out count for none."""
    counted = [p["scene"] for p in base if below is None or p[below] > 0]
    both = {p["scene"] for p in pictures if below is None or p[below] > 0} & set(counted)
    kept = ([p for p in each if p["scene"] in both] for each in (pictures, base))
    rows = [by_scene(each, above, below) for each in kept]
    return difference(*rows[0], than=rows[1]) if both else {"value": 0.0, "low": 0.0, "high": 0.0}
