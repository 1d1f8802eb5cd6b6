"""Training pictures of the embedded world, drawn once and kept as arrays in the working folder."""

import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffguide.zoo.world import SIDE, Scene, render, sample_scene


def training_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the training set of this seed; held-out combinations are drawn again."""
    rng = random.Random(seed * 1_000_003 + index)
    while (scene := sample_scene(rng)).held_out:
        pass
    return scene


def _draw(job: tuple[int, range]) -> np.ndarray:
    seed, indices = job
    return np.stack([np.asarray(render(training_scene(seed, i), supersample=3)) for i in indices])


def pictures(folder: Path, seed: int, count: int) -> np.ndarray:
    """The training pictures as a memory map, uint8 [count, 128, 128, 3]; drawn on all cores if they are not there."""
    path = folder / f"pictures-{seed}-{count}.npy"
    if not path.exists():
        part = path.with_suffix(".part")
        store = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(count, SIDE, SIDE, 3))
        chunks = [range(i, min(i + 200, count)) for i in range(0, count, 200)]
        with ProcessPoolExecutor(os.cpu_count()) as pool, tqdm(total=count, desc="pictures", unit="picture") as bar:
            for chunk, drawn in zip(chunks, pool.map(_draw, [(seed, c) for c in chunks]), strict=True):
                store[chunk.start : chunk.stop] = drawn
                bar.update(len(chunk))
        store.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r")
