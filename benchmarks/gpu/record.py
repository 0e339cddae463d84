"""Results as lines of JSON, each on the disk before the next measurement begins."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
FILE = "rows.jsonl"
OUTCOMES = ("ok", "failed")
"""Rows that are not to be repeated: one that was skipped, or that had only started, is tried again."""


def read_rows(path: Path) -> list[Row]:
    """The lines of a record that are complete; the last one may have been cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in rows if isinstance(row, dict) and "status" in row]


class Record:
    """The rows of one part in a file that all parts share.

    Args:
        path: the file; what stands in it is kept.
        part: the name of the part.
    """

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part
        _end_line(path)
        known = [row for row in read_rows(path) if row["part"] == part]
        self.known = {row["row"]: row for row in known if row["status"] in OUTCOMES}

    def write(self, row: str, status: str, data: Mapping[str, Any]) -> Row:
        """Append a row, and wait until it is on the disk."""
        line: Row = {"part": self.part, "row": row, "status": status, "at": round(time.time(), 3), **data}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if status in OUTCOMES:
            self.known[row] = line
        return line

    def attempt(self, row: str, run: Callable[[], Mapping[str, Any]]) -> Row:
        """Write what `run` returns, or its traceback."""
        self.write(row, "started", {})
        start = time.perf_counter()
        try:
            data = dict(run())
        except Exception as error:
            seconds = round(time.perf_counter() - start, 3)
            text = traceback.format_exc()
            return self.write(row, "failed", {"took": seconds, "error": describe(error), "traceback": text})
        return self.write(row, "ok", {"took": round(time.perf_counter() - start, 3), **data})

    def close_open_rows(self, why: str) -> list[str]:
        """Mark rows that had started and have no outcome as failed, and return their names."""
        rows = [row for row in read_rows(self.path) if row["part"] == self.part]
        last = {row["row"]: row["status"] for row in rows}
        open_rows = [name for name, status in last.items() if status == "started"]
        for name in open_rows:
            self.write(name, "failed", {"error": why, "traceback": why})
        return open_rows


def _end_line(path: Path) -> None:
    """End a last line that was cut off, so that what is appended is not lost with it."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a", encoding="utf-8") as file:
            file.write("\n")


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
