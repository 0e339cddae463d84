"""The files that TensorBoard shows, beside ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class Board:
    """Writes numbers for ``tensorboard --logdir``; nothing where the package `tensorboard` is not installed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Open a file; what an earlier session wrote after this step is not shown any more."""
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes a second, and is optional

            self._writer = SummaryWriter(str(self.path), purge_step=step + 1)

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """One point of a curve for each number."""
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()
