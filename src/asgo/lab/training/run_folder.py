"""A run folder: everything that a run was, is and gave, in files that explain themselves.

::

    config.json        the configuration, every field        curve.png      loss against steps
    environment.json   versions, commit, device, dates       result.json    written once, at the end
    routing.txt        which parameter is stepped how        checkpoints/   the last two, atomic
    metrics.jsonl      one line per logged step or evaluation; tensorboard/ has the same, and metrics of parameters
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo import checkpoint
from asgo.checkpoint import sharded
from asgo.lab.config.codec import command, flat, from_json, to_json
from asgo.lab.config.runs import TrainConfig
from asgo.lab.errors import LabError
from asgo.lab.files import make_folder, read_json, write_bytes, write_json, write_text, writing
from asgo.lab.training.board import Board

KEEP = 2
"""Checkpoints kept in a run folder."""

_NAME = re.compile(r"step-(\d+)(\.pt)?")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
        writes: whether this process writes to it; the others only read.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.board = Board(path / "tensorboard")

    def create(self, config: TrainConfig, session: dict[str, Any], routing: str) -> None:
        """Write what describes the run; on a resumed run only the new session is added."""
        if not self.writes:
            return
        make_folder(self.path)
        write_json(self.path / "config.json", to_json(replace(config, resume=False)))
        make_folder(self.checkpoints)
        sessions_path = self.path / "environment.json"
        earlier = read_json(sessions_path)["sessions"] if sessions_path.exists() else []
        reproduce = command("asgo train", replace(config, resume=False))
        write_json(sessions_path, {"command": reproduce, "sessions": [*earlier, session]})
        write_text(self.path / "routing.txt", routing + "\n")

    def config(self) -> TrainConfig:
        """The configuration of the run in this folder."""
        return from_json(TrainConfig, read_json(self.path / "config.json"))

    # ---- metrics ---------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        if self.writes:
            with writing(self.metrics_path), self.metrics_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.board.add({key: value for key, value in line.items() if key != "step"}, line["step"])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line that was cut short is left out."""
        return read_metrics(self.metrics_path)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, as if the run had stopped there."""
        if self.writes and self.metrics_path.exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        if self.writes:
            self.board.begin(step)

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self, state: dict[str, Any]) -> None:
        """Save a checkpoint, then drop all but the last `KEEP`; a failure leaves the earlier ones alone."""
        if not self.writes:
            return
        path = self.checkpoints / f"step-{state['step']:08d}.pt"
        with writing(path):
            _sync(self.metrics_path)
            checkpoint.save(state, path)
            self._prune()

    def save_together(self, state: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
        """As `save`, but called by all processes of the run: each writes its part of the model and the optimizer."""
        path = self.checkpoints / f"step-{state['step']:08d}"
        with writing(path):
            _sync(self.metrics_path)
            sharded.save(path, model, optimizer, state)
            if self.writes:
                self._prune()

    def _prune(self) -> None:
        for old in [*self.saved()[:-KEEP], *self.checkpoints.glob(".*.tmp")]:  # also what a kill left half-way
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def saved(self) -> list[Path]:
        """The checkpoints of this run, oldest first."""
        found = self.checkpoints.glob("step-*") if self.checkpoints.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=lambda path: path.stem)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, None if there is none yet; of one that is a folder, what all processes share.

        Raises:
            LabError: for a file that is not a checkpoint of this library.
        """
        saved = self.saved()
        if not saved:
            return None
        try:
            folder = saved[-1].is_dir()
            state = sharded.read_about(saved[-1])["extra"] if folder else checkpoint.load(saved[-1])
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise LabError(
                f"cannot read the checkpoint {saved[-1]}: {reason}. Delete it to go on from the one before."
            ) from error
        if not isinstance(state, dict) or not {"step", "model_fingerprint", "data_fingerprint"} <= set(state):
            raise LabError(f"{saved[-1]} is not a checkpoint of asgo train: delete it, or pass another --out.")
        return state

    # ---- the end ---------------------------------------------------------------------------------

    def finish(self, result: dict[str, Any], curve: bytes | None = None) -> None:
        """Write the curve and ``result.json``; after this the run is finished."""
        if not self.writes:
            return
        self.board.close()
        if curve is not None:
            write_bytes(self.path / "curve.png", curve)
        write_json(self.path / "result.json", result)

    def result(self) -> dict[str, Any] | None:
        """What a finished run gave, None for a run that is not finished."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None


def check_out(config: Any, marker: str, what: str, free: Sequence[str] = ()) -> None:
    """Refuse a folder ``config.out`` that `config` may not write to; nothing is changed.

    Args:
        config: with the fields ``out`` and ``resume``.
        marker: the file in which such a folder keeps its configuration.
        what: such a folder holds.
        free: the fields that may differ on resuming, beside ``out`` and ``resume``.

    Raises:
        LabError: for a folder in use, one that holds something else, or one with another configuration.
    """
    path: Path = config.out
    if path.exists() and not path.is_dir():
        raise LabError(f"--out {path} is a file: pass a folder.")
    if not path.is_dir() or all(entry.name.startswith(".") for entry in path.iterdir()):
        return
    if not (path / marker).exists():
        raise LabError(f"--out {path} is not empty and holds no {what}: pass another folder.")
    if not config.resume:
        raise LabError(f"--out {path} already holds a {what}: pass --resume to continue it, or another --out.")
    old, new = flat(from_json(type(config), read_json(path / marker))), flat(config)
    names = [n for n in {**old, **new} if old.get(n) != new.get(n) and n not in ("out", "resume", *free)]
    if names:
        differences = ", ".join(f"{n} (there {old.get(n)!r}, asked {new.get(n)!r})" for n in names)
        raise LabError(
            f"--out {path} was made with another configuration: {differences}. Leave those flags out to "
            "continue it, or pass another --out."
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``metrics.jsonl``, as dicts; an empty list if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _sync(path: Path) -> None:
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
