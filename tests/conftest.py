"""What every test needs: one thread, no network, quiet libraries. The environment is set before anything reads it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"

import pytest
import torch
from browsing import chromium, editor, phone, served  # noqa: F401  one editor and one browser for all files of a process
from hypothesis import settings

torch.set_num_threads(1)  # two threads spin on busy cores: the same two steps take 4.8 s instead of 0.08 s
# runners are shared: a slow example is no failure, and each run there tries the same ones
settings.register_profile("shared", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first, so that no process works at it alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
