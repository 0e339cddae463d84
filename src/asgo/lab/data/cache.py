"""The user's cache: what can be fetched or made again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from asgo.checkpoint.files import replacing
from asgo.lab.errors import LabError


def cache_folder() -> Path:
    """Return $ASGO_CACHE, else the folder asgo in $XDG_CACHE_HOME or ~/.cache; it may not exist yet."""
    if os.environ.get("ASGO_CACHE"):
        return Path(os.environ["ASGO_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asgo"


def write_cached(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file of the cache whole or not at all, also when several processes write it at once.

    Raises:
        LabError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write(file)
    except OSError as error:
        what = f"cannot write the cache file '{path}': {error.strerror or error}"
        raise LabError(f"{what}. Set ASGO_CACHE to a folder with space that you can write.") from error
