"""Data in rows: images with their classes, prompts with their responses. Every row is seen once in each pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from asgo.lab.data.sampling import Draw, IndexedBatches, Pair

IGNORED = -100
"""The target of a position that has no loss."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs with their targets.

    Args:
        inputs: ``(rows, ...)``, images or token ids.
        targets: ``(rows,)`` classes, or ``(rows, tokens)`` ids, `IGNORED` where there is no loss.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: np.ndarray) -> Pair:
        """Some of the rows; of tokens, as many columns as have a target in one of them."""
        inputs, targets = self.inputs[index], self.targets[index]
        if targets.ndim == 1:
            return inputs, targets
        width = int((targets != IGNORED).any(0).nonzero().max()) + 1
        return inputs[:, :width].long(), targets[:, :width].long()


class RowBatches(IndexedBatches):
    """Batches of rows, in an order that the seed and the number of the pass decide."""

    def __init__(self, rows: Rows, draw: Draw) -> None:
        """Draw from `rows`, at least one."""
        super().__init__(draw)
        self.rows = rows
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batch(self, step: int) -> Pair:
        """Return inputs and targets of a step, of batch_size rows."""
        draw = self.draw
        places = np.arange(step * draw.blocks, (step + 1) * draw.blocks)
        passes, within = np.divmod(places, len(self.rows))
        chosen = [self._pass(number)[within[passes == number]] for number in np.unique(passes)]
        inputs, targets = self.rows.take(np.concatenate(chosen))
        mine = slice(draw.rank * draw.batch_size, (draw.rank + 1) * draw.batch_size)
        return inputs[mine], targets[mine]

    def _pass(self, number: int) -> np.ndarray:
        if self._order[0] != number:
            numbers = self.draw.numbers(int(number), len(self.rows))
            self._order = number, np.argsort(numbers, kind="stable")
        return self._order[1]


@dataclass(frozen=True, eq=False)
class RowData:
    """All that a trainer needs to know about data in rows.

    Args:
        batches: training batches of this process.
        held_out: rows for validation, the same in every process.
        vocab_size: number of classes, or of distinct ids.
        fingerprint: hash of all rows and of the split.
        description: one line about rows and their parts.
        test: rows that are seen once, after the last step; None: there are none.
    """

    batches: RowBatches
    held_out: Rows
    vocab_size: int
    fingerprint: str
    description: str
    test: Rows | None = None

    def validation(self, batch_size: int, max_blocks: int | None = None) -> Iterator[Pair]:
        """Yield rows that lie evenly over those held out, the same each time; all of them for None or 0."""
        return in_batches(self.held_out, batch_size, max_blocks)


def in_batches(rows: Rows, batch_size: int, most: int | None = None) -> Iterator[Pair]:
    """Yield at most so many rows, spread evenly over all, in pairs of `batch_size` rows."""
    count = min(most or len(rows), len(rows))
    index = np.arange(count) * len(rows) // count
    for first in range(0, count, batch_size):
        yield rows.take(index[first : first + batch_size])
