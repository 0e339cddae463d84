"""The command of an experiment: its flags, errors in one line, ``--resume``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich.console import Console

from asgo.lab import terminal
from asgo.lab.config.codec import from_json
from asgo.lab.files import read_json
from experiments.runner import ExperimentConfig, marker, program

E = TypeVar("E", bound=ExperimentConfig)


def run_command(name: str, kind: type[E], run: Callable[[E, Console], Any], args: Sequence[str] | None) -> int:
    """Run an experiment as the command line says, and return the exit code.

    Args:
        name: of its package in `experiments`.
        kind: its configuration.
        run: the experiment.
        args: the words after the module; None: those of the process.
    """
    words = sys.argv[1:] if args is None else args
    return terminal.exit_code(lambda: parse(name, kind, words), lambda config: run(config, Console()))


def parse(name: str, kind: type[E], words: Sequence[str]) -> E | None:
    """The configuration; with ``--resume``, fields that are not given are those of the folder."""
    config = terminal.parse(kind, words, program(name))
    if config is None or not config.resume:
        return config
    path = config.out / marker(name)
    saved = from_json(kind, read_json(path)) if path.exists() else None
    return terminal.parse(kind, words, program(name), default=saved)
