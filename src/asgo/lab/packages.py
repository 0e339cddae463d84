"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from asgo.lab.errors import LabError


def need(module: str, who: str, install: str) -> Any:
    """Import a package that `who` needs; a `LabError` says how to `install` it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise LabError(f"{who} needs {missing.name}, which is not installed: {install}.") from None
