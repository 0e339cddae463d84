"""Text that is at hand wherever Python is: the sources of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT, EVALUATIONS = 20, 4
"""One file in so many is held out; batches of what is held out that one evaluation takes."""


@dataclass(frozen=True)
class Text:
    """Batches of bytes, the same for every optimizer, that need nothing from the host once they are planned.

    Args:
        train: bytes to learn from, ``uint8`` on the device.
        held_out: others.
        starts: ``(batches, rows)``, where the rows of each batch begin.
        rows: of a batch.
        context: bytes of a row, without the last one, which is only predicted.
    """

    train: Tensor
    held_out: Tensor
    starts: Tensor
    rows: int
    context: int

    @staticmethod
    def of(sources: tuple[Tensor, Tensor], rows: int, context: int, batches: int) -> Text:
        """A plan of so many batches."""
        train, held_out = sources
        dice = torch.Generator().manual_seed(0)
        starts = torch.randint(len(train) - context, (batches, rows), generator=dice)
        return Text(train, held_out, starts.to(train.device), rows, context)

    def batch(self, number: int) -> Tensor:
        """``(rows, context + 1)`` tokens to learn from."""
        return self._rows(self.train, self.starts[number])

    def held_out_batches(self) -> Iterator[Tensor]:
        """The same number of tokens `EVALUATIONS` times, from places evenly spaced over what is held out."""
        last = len(self.held_out) - self.context - 1
        places = torch.linspace(0, last, self.rows * EVALUATIONS, device=self.held_out.device).long()
        for some in places.split(self.rows):
            yield self._rows(self.held_out, some)

    def _rows(self, source: Tensor, starts: Tensor) -> Tensor:
        return source[starts[:, None] + torch.arange(self.context + 1, device=source.device)].long()


def read(most: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bytes to learn from and held-out ones: the sources in the order of their paths, at most so many.

    Raises:
        RuntimeError: there are too few to learn from.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = bytearray(), bytearray()
    for number, path in enumerate(sorted(root.rglob("*.py"))):
        if {"site-packages", "dist-packages"} & set(path.parts):
            continue
        if len(train) + len(held_out) >= most:
            break
        (held_out if number % HELD_OUT == 0 else train).extend(path.read_bytes())
    if len(train) < 100_000 or len(held_out) < 5_000:
        raise RuntimeError(f"{root} holds {len(train)} bytes of Python to learn from: too few.")
    learned, kept = (torch.frombuffer(part, dtype=torch.uint8).clone().to(device) for part in (train, held_out))
    return learned, kept
