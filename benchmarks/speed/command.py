"""The command of a benchmark: ``python -m benchmarks.NAME``, its flags, errors in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console

from asgo.lab import terminal

C = TypeVar("C")


def program(name: str) -> str:
    """The words that start a benchmark."""
    return f"python -m benchmarks.{name}"


def run_command(name: str, kind: type[C], run: Callable[[C, Console], Any], args: Sequence[str] | None) -> int:
    """Run a benchmark as the command line says, and return the exit code.

    Args:
        name: of its module in `benchmarks`.
        kind: its configuration.
        run: the benchmark.
        args: the words after the module; None: those of the process.
    """
    words = sys.argv[1:] if args is None else args
    return terminal.exit_code(lambda: parse(name, kind, words), lambda config: run(config, Console()))


def parse(name: str, kind: type[C], words: Sequence[str]) -> C | None:
    """The configuration that the words describe; None if they asked for help, which is then printed."""
    return terminal.parse(kind, words, program(name))
