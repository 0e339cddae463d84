"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` at the end, whole; if anything is raised, nothing changes.

    It is a temporary file in the same folder, with a name of its own for every process and thread, flushed, then
    renamed.

    Raises:
        OSError: what the disk raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # some file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save(obj: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save` to a temporary file beside `path`, then rename: a reader sees the old file or the whole new one.

    Raises:
        OSError: no space, no permission, no such folder; a previous file at `path` is untouched.
    """
    with replacing(Path(path)) as file:
        _write(obj, file, path)


def _write(obj: Any, file: IO[bytes], path: str | os.PathLike[str]) -> None:
    try:
        torch.save(obj, file)
        file.flush()
    except RuntimeError as error:
        # torch's zip writer hides why a write failed behind its own account of it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """`torch.load` of tensors and plain data only.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not a whole checkpoint.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint that can be read whole ({reason}); use another one.") from error
