"""The repository must not get in the way of what is installed beside it, nor carry what belongs to one machine."""

import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest

import diffguide

ROOT = Path(__file__).resolve().parents[1]
WORKING_FOLDERS = {"kernels", "processors", "pipelines", "app"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".txt", ".yaml", ".yml", ".svg", ".css", ".js"}
SIZE_LIMIT = 60 * 2**20  # bytes
MACHINE_PATH = re.compile(r"(?<![\w.:/~)}>-])/(?:" + "|".join(("work", "home", "root")) + r")/\w")


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control that are on disk, absolute."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


@pytest.fixture(scope="module")
def texts(tracked: list[Path]) -> dict[str, bytes]:
    """Tracked files called like text, or without a zero byte near their start, by their path in the repository."""
    contents = {file.relative_to(ROOT): file.read_bytes() for file in tracked}
    return {
        name.as_posix(): content
        for name, content in contents.items()
        if name.suffix in TEXT_SUFFIXES or b"\0" not in content[:8192]
    }


def names(tracked: list[Path]) -> list[Path]:
    return [file.relative_to(ROOT) for file in tracked]


def test_top_level_hides_no_installed_package(tracked):
    folders = {name.parts[0] for name in names(tracked) if len(name.parts) > 1}
    assert not folders & WORKING_FOLDERS, "keep the working folders inside diffguide/"
    packages = {name.parts[0] for name in names(tracked) if len(name.parts) == 2 and name.name == "__init__.py"}
    modules = {name.name for name in names(tracked) if len(name.parts) == 1 and name.suffix == ".py"}
    assert packages == {"diffguide"}, "only diffguide may be importable from the root"
    assert not modules, "a module at the root hides an installed one of the same name"


def test_tests_are_no_packages(tracked):
    found = [name for name in names(tracked) if name.parts[0] == "tests" and name.name == "__init__.py"]
    assert not found, "tests lie flat; delete these files"


def test_no_script_is_called_like_a_package(tracked):
    scripts = [name for name in names(tracked) if name.parts[0] in {"examples", "benchmarks"} and name.suffix == ".py"]
    assert not [name for name in scripts if name.stem in WORKING_FOLDERS], "a script's folder comes first on sys.path"


@pytest.mark.parametrize("path", ["/{}/x/y.py", "open('/{}/me')", 'p = "/{}/a"', "cd /{}/a", "--out=/{}/b"])
@pytest.mark.parametrize("folder", ["work", "home", "root"])
def test_machine_paths_are_recognised(path, folder):
    assert MACHINE_PATH.search(path.format(folder))


@pytest.mark.parametrize("text", ["https://a.org/{}/b", "../{}/b", "~/{}/b", "docs/{}/b", "$HOME/{}/b", "/{}ing/b"])
@pytest.mark.parametrize("folder", ["work", "home", "root"])
def test_other_paths_are_left_alone(text, folder):
    assert not MACHINE_PATH.search(text.format(folder))


def test_no_file_names_a_path_of_one_machine(texts):
    own = "tests/" + Path(__file__).name
    lines = {
        f"{name}:{number}"
        for name, content in texts.items()
        if name != own
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    }
    assert not lines


def test_repository_stays_small(tracked):
    size = sum(file.stat().st_size for file in tracked)
    assert size < SIZE_LIMIT, f"{size / 2**20:.1f} MiB are tracked"


def test_every_text_file_is_utf8(texts):
    broken = []
    for name, content in texts.items():
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            broken.append(f"{name}: {error}")
    assert not broken


def test_version_is_written_once():
    try:
        installed = importlib.metadata.version("diffguide")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("diffguide is on the path but not installed: pip install -e .")
    assert installed == diffguide.__version__, "install again: pip install -e ."
