"""What a package index and a reader of the version are told."""

import re
import subprocess
from pathlib import Path

import pytest

import asgo

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LAB = tomllib.loads((ROOT / "src/asgo/lab/pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_version_is_written_once_and_is_that_of_the_tag():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", asgo.__version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "asgo.__version__"}
    assert f"\nversion: {asgo.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert LAB["project"]["version"] == asgo.__version__
    assert LAB["project"]["dependencies"] == [f"asgo[lab]=={asgo.__version__}"]
    git = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "v*"]
    tags = subprocess.run(git, capture_output=True, text=True, check=False).stdout.split()
    assert tags in ([], [f"v{asgo.__version__}"])


def test_every_file_is_in_one_distribution():
    """What is no code is named as the data of a package, and the laboratory's packages are named one by one."""
    lab = ROOT / "src/asgo/lab"
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src/asgo"]
    ours = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True)
    data = {name.removeprefix("src/asgo/") for name in ours.stdout.split() if not name.endswith(".py")}
    build = {"lab/pyproject.toml", "lab/LICENSE"}
    named = set(PROJECT["tool"]["setuptools"]["package-data"]["asgo"])
    named |= {
        f"{name.removeprefix('asgo.').replace('.', '/')}/{file}"
        for name, files in LAB["tool"]["setuptools"]["package-data"].items()
        for file in files
    }
    assert data == named | build
    assert "py.typed" in data
    folders = {path.parent.relative_to(lab).parts for path in lab.rglob("__init__.py") if "build" not in path.parts}
    assert LAB["tool"]["setuptools"]["packages"] == sorted(".".join(("asgo", "lab", *parts)) for parts in folders)
    assert (lab / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_wheel_of_the_optimizers_is_light():
    """Lines of Python in it: training code installs no harness."""
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    assert find == {"where": ["src"], "exclude": ["asgo.lab*"]}
    modules = [
        path for path in (ROOT / "src/asgo").rglob("*.py") if "lab" not in path.relative_to(ROOT / "src/asgo").parts
    ]
    assert sum(len(path.read_text().splitlines()) for path in modules) <= 16_000


def test_every_host_has_an_extra_by_its_name():
    hosts = {path.stem for path in (ROOT / "src/asgo/hosts").glob("*.py")} - {"__init__", "common"}
    assert hosts <= set(EXTRAS)
    for name in hosts:
        assert EXTRAS[name][0].startswith(name)
