"""Intervals around measured figures: percentile bootstrap for shares and ratios, quartiles for repeated timings."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Interval = dict[str, float]  # "value", "low", "high"

RESAMPLES = 2000
COVERAGE = 0.95


def ratio(above: ArrayLike, below: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    r"""$\sum_i a_i / \sum_i b_i$ with its 95 % interval, resampling the units i.

    `above` and `below` are [units]; every `below` must be positive. A share of objects has a unit for each scene, so
    that objects of one scene, and pictures of one scene, stay together. One unit alone gives an interval without width.

    Raises:
        ValueError: the lengths differ, there is no unit, a value is not finite, or a `below` is not positive.
    """
    a, b = np.asarray(above, np.float64), np.asarray(below, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"expected two equally long, non-empty rows of numbers, got shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (b > 0).all()):
        raise ValueError("expected finite numbers, those below the line positive")
    drawn = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    values = a[drawn].sum(1) / b[drawn].sum(1)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(values, (tail, 1 - tail))
    return _interval(a.sum() / b.sum(), low, high)


def difference(
    above: ArrayLike, below: ArrayLike, *, than: tuple[ArrayLike, ArrayLike], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    r"""$\sum_i a_i / \sum_i b_i$ less that of two other rows over the same units, with its 95 % interval.

    Units are resampled for both alike, so what makes one unit harder than another drops out.

    Raises:
        ValueError: as `ratio`, or the rows are not equally long.
    """
    rows = np.stack([np.asarray(row, np.float64) for row in (above, below, *than)])
    value = ratio(rows[0], rows[1], resamples=1)["value"] - ratio(rows[2], rows[3], resamples=1)["value"]
    units = rows.shape[1]
    a, b, c, d = rows[:, np.random.default_rng(seed).integers(0, units, (resamples, units))].sum(2)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(a / b - c / d, (tail, 1 - tail))
    return _interval(value, low, high)


def mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean with its 95 % interval."""
    return ratio(values, np.ones(len(values)), resamples=resamples, seed=seed)


def quartiles(values: Sequence[float]) -> Interval:
    """The median between the lower and the upper quartile: not an interval of confidence, but the spread of timings."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return _interval(middle, low, high)


def _interval(value: float, low: float, high: float) -> Interval:
    # resampled sums are added in another order, so that equal units may differ in the last bit
    return {"value": float(value), "low": float(min(low, value)), "high": float(max(high, value))}
