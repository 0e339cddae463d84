"""The tests that need a GPU, by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.part import CheckError, Part

MARK, TESTS = "@pytest.mark.gpu", ROOT / "tests"
LIMIT = 300.0
"""Seconds that one file may take."""


def run(part: Part) -> None:
    """A row for each file with such tests."""
    files = [path.relative_to(TESTS).as_posix() for path in sorted(TESTS.rglob("test_*.py")) if _is_marked(path)]
    for name in [min(files, key=lambda name: len(_packages(name) - sys.stdlib_module_names))] if part.tiny else files:
        row = f"tests: {name}"
        if find_spec("pytest") is None:
            part.skip(row, "pytest is not installed")
        elif (missing := _missing(name)) is not None:
            part.skip(row, f"{missing} is not installed")
        else:
            part.attempt(row, partial(_file, part, name))


def _is_marked(path: Path) -> bool:
    return MARK in path.read_text(encoding="utf-8")


def _missing(name: str) -> str | None:
    """The first package that the file imports and that is not there."""
    here = {path.stem for path in TESTS.rglob("*.py")}
    return next((each for each in sorted(_packages(name)) if each not in here and find_spec(each) is None), None)


def _packages(name: str) -> set[str]:
    return set(re.findall(r"^(?:from|import) (\w+)", (TESTS / name).read_text(), re.MULTILINE))


def _file(part: Part, name: str) -> Mapping[str, Any]:
    """What pytest says.

    Raises:
        CheckError: a test failed.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    paths = [str(ROOT / "src"), str(TESTS), *filter(None, [kept.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"tests/{name}"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=max(1.0, min(LIMIT, part.left)),
        check=False,
    )
    if done.returncode:
        raise CheckError(f"pytest ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}")
    return {"summary": (done.stdout.strip().splitlines() or [""])[-1]}
