"""Packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from asgo.lab.errors import LabError


def need(module: str, who: str, install: str) -> Any:
    """Import a package that may not be installed.

    Args:
        module: what to import.
        who: what needs it, for the message.
        install: how to get it.

    Raises:
        LabError: saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise LabError(f"{who} needs {missing.name}, which is not installed: {install}.") from None
