"""Regions of a picture: numbered, shrunk to their cores, grown back, and cleared of patches that belong to another."""

from collections.abc import Callable, Iterator

import numpy as np

ABSORBED = 0.35  # a patch with this share of its border on a larger one belongs to it


def components(labels: np.ndarray) -> np.ndarray:
    """Number the regions of equal non-zero label in [h, w], joined by edges, from 1; 0 stays 0."""
    height, width = labels.shape
    starts = np.ones(labels.shape, bool)
    starts[:, 1:] = labels[:, 1:] != labels[:, :-1]
    runs = starts.cumsum().reshape(height, width) - 1
    parent = list(range(int(runs[-1, -1]) + 1))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    joined = (labels[1:] == labels[:-1]) & (labels[1:] != 0)
    joined[:, 1:] &= ~joined[:, :-1] | starts[1:, 1:] | starts[:-1, 1:]  # one meeting of two runs is enough
    for upper, lower in zip(runs[:-1][joined].tolist(), runs[1:][joined].tolist(), strict=True):
        a, b = root(upper), root(lower)
        parent[max(a, b)] = min(a, b)
    roots = np.array([root(run) for run in range(len(parent))])
    roots[labels[starts] == 0] = -1
    found, numbers = np.unique(roots, return_inverse=True)
    if found[0] != -1:
        numbers = numbers + 1
    return numbers.reshape(-1)[runs]


def neighbours() -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Pairs of windows of a grid: all pixels with a neighbour left, right, above or below, and those neighbours."""
    every, first, last = slice(None), slice(1, None), slice(None, -1)
    for a, b in ((first, last), (last, first)):
        yield (every, a), (every, b)
        yield (a, every), (b, every)


def erode(labels: np.ndarray) -> np.ndarray:
    """Keep a label only where all eight neighbours bear it; beyond the canvas all bear it."""
    for axis in (0, 1):
        wide = np.pad(labels, [(int(a == axis),) * 2 for a in range(2)], mode="edge")
        before, after = (np.take(wide, range(i, i + labels.shape[axis]), axis) for i in (0, 2))
        labels = np.where((before == labels) & (after == labels), labels, 0)
    return labels


def grow(labels: np.ndarray, allowed: Callable[[int], np.ndarray], steps: int) -> np.ndarray:
    """Let labels [h, w] spread over unlabelled pixels, one pixel a step, each where `allowed(label)` [h, w] says."""
    labels = labels.copy()
    present = [int(label) for label in np.unique(labels) if label]
    open_to = np.zeros((max(present, default=0) + 1, *labels.shape), bool)
    for label in present:
        open_to[label] = allowed(label)
    rows, columns = np.nonzero(open_to.any(0) & (labels == 0))
    height, width = labels.shape
    for _ in range(steps):
        if not len(rows):
            break
        taken = np.zeros(len(rows), labels.dtype)
        for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            label = labels[(rows + dy).clip(0, height - 1), (columns + dx).clip(0, width - 1)]
            taken = np.where((taken == 0) & (label != 0) & open_to[label, rows, columns], label, taken)
        labels[rows, columns] = taken
        if not taken.any():
            break
        rows, columns = rows[taken == 0], columns[taken == 0]
    return labels


def absorb(ids: np.ndarray) -> np.ndarray:
    """Give patches that lie on a larger component to it: rims of a mixed colour, stains inside a thing."""
    count = int(ids.max()) + 1
    border = np.zeros((count, count), int)
    for here, there in neighbours():
        edge = ids[here] != ids[there]
        np.add.at(border, (ids[here][edge], ids[there][edge]), 1)
    areas = np.bincount(ids.ravel(), minlength=count)
    owner = np.arange(count)
    for patch in np.argsort(areas[1:]) + 1:
        contact = border[patch].copy()
        contact[0] = 0
        host = int(contact.argmax())
        if contact[host] >= ABSORBED * border[patch].sum() > 0 and areas[patch] < ABSORBED * areas[host]:
            owner[patch] = host
    for patch in range(count):
        while owner[patch] != owner[owner[patch]]:
            owner[patch] = owner[owner[patch]]
    return owner[ids]


def filled(mask: np.ndarray) -> np.ndarray:
    """A mask [h, w] with its holes closed."""
    outside = components(np.pad(~mask, 1, constant_values=True).astype(np.uint8))
    return (outside != outside[0, 0])[1:-1, 1:-1]
