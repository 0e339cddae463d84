"""Writing to the run folder: whole or not at all, and a disk's refusal as one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asgo.checkpoint.files import replacing
from asgo.lab.errors import LabError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises while `path` is written into a `LabError` that says so."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).rstrip(".")
        raise LabError(
            f"cannot write {path}: {reason}. What was saved before is intact: make room or give access, "
            "then repeat the command with --resume."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's content, atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content, atomically."""
    with writing(path), replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replace a file's content by indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_results(out: Path, contents: Mapping[str, Any]) -> None:
    """Write files of a folder by name: bytes, texts, and everything else as JSON."""
    make_folder(out)
    for name, content in contents.items():
        if isinstance(content, bytes):
            write_bytes(out / name, content)
        elif isinstance(content, str):
            write_text(out / name, content)
        else:
            write_json(out / name, finite(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises `LabError` for a file that cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise LabError(f"cannot read {path}: {error}. Start a new run in another --out folder.") from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents, if they are not there."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def finite(value: Any) -> Any:
    """Plain JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_new(out: Path) -> None:
    """Raise `LabError` for a folder of results that is in use, or a file."""
    if out.is_file():
        raise LabError(f"--out {out} is a file: pass a folder.")
    if out.is_dir() and any(out.iterdir()):
        raise LabError(f"--out {out} is not empty, and nothing is overwritten: pass another --out.")
