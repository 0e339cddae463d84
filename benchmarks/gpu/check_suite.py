"""The tests that need a GPU, by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.gpu import ROOT
from benchmarks.gpu.part import CheckError, Part

MARK = "pytest.mark.gpu"
LIMIT = 300.0
"""Seconds that one file may take."""


def run(part: Part) -> None:
    """A row for each file with such tests."""
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py") if MARK in path.read_text())
    files = [name for name in files if name != "test_gpu_benchmark.py"]
    for name in [min(files, key=lambda name: len(_packages(name)))] if part.tiny else files:
        row = f"tests: {name}"
        if find_spec("pytest") is None:
            part.skip(row, "pytest is not installed")
        elif (missing := _missing(name)) is not None:
            part.skip(row, f"{missing} is not installed")
        else:
            part.attempt(row, partial(_file, part, name))


def _missing(name: str) -> str | None:
    """The first package that the file imports and that is not there."""
    here = {path.stem for path in (ROOT / "tests").glob("*.py")}
    return next((each for each in _packages(name) if each not in here and find_spec(each) is None), None)


def _packages(name: str) -> list[str]:
    return sorted(set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "tests" / name).read_text(), re.MULTILINE)))


def _file(part: Part, name: str) -> Mapping[str, Any]:
    """What pytest says.

    Raises:
        CheckError: a test failed.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    paths = [str(ROOT / "src"), str(ROOT / "tests"), *filter(None, [kept.get("PYTHONPATH")])]
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
