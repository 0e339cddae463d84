"""The user's cache: what can be fetched or made again."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            write(file)
        temporary.replace(path)
    except OSError as error:
        what = f"cannot write the cache file '{path}': {error.strerror or error}"
        raise LabError(f"{what}. Set ASGO_CACHE to a folder with space that you can write.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
