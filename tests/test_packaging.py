"""What a package index and a reader of the version are told."""

import re
import subprocess
from pathlib import Path

import pytest

import asgo

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def test_the_version_is_written_once_and_is_that_of_the_tag():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", asgo.__version__)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "asgo.__version__"}
    assert f"\nversion: {asgo.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    git = ["git", "-C", str(ROOT), "tag", "--points-at", "HEAD", "v*"]
    tags = subprocess.run(git, capture_output=True, text=True, check=False).stdout.split()
    assert tags in ([], [f"v{asgo.__version__}"])


def test_every_file_that_is_no_code_is_packaged():
    package = ROOT / "src/asgo"
    data = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    data = {name for name in data if not name.endswith((".py", ".pyc"))}
    assert data == set(PROJECT["tool"]["setuptools"]["package-data"]["asgo"])
    assert "py.typed" in data


def test_every_host_has_an_extra_by_its_name():
    hosts = {path.stem for path in (ROOT / "src/asgo/hosts").glob("*.py")} - {"__init__", "common"}
    assert hosts <= set(EXTRAS)
    for name in hosts:
        assert EXTRAS[name][0].startswith(name)
