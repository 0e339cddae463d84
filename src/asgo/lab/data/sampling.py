"""What a model sees: blocks of tokens, drawn so that a run can stop anywhere and go on as if it had not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from asgo.lab.data.corpora import DocumentStream
from asgo.lab.data.tokenization import Tokenizer, id_type
from asgo.lab.errors import LabError

Pair = tuple[Tensor, Tensor]
"""Inputs and targets, both int64 of shape (blocks, block_size); targets are the inputs one token later. Of images:
float32 (images, 1, height, width), and classes."""

Own = TypeVar("Own", bound="IndexedBatches")


@dataclass(frozen=True)
class Draw:
    """Which blocks a process gets, decided by seed and step alone.

    Args:
        block_size: tokens per block.
        batch_size: blocks per batch and process.
        seed: seed of the order.
        rank: which process this is.
        world: how many processes share a step.
        fingerprint: hash of the data, so that a checkpoint of other data is refused.
    """

    block_size: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Raise LabError for a negative seed or a rank that does not exist."""
        if self.seed < 0:
            raise LabError(f"seed {self.seed} is out of range: pass 0 or more.")
        if not 0 <= self.rank < self.world:
            raise LabError(f"rank {self.rank} is out of range: {self.world} processes have 0 to {self.world - 1}.")

    @property
    def blocks(self) -> int:
        """Blocks of all processes in one step."""
        return self.batch_size * self.world

    def numbers(self, step: int, count: int) -> np.ndarray:
        """Return random 64-bit numbers of a step, shape (count,), the same in every process."""
        # A bit generator's raw stream, unlike a Generator's methods, never changes between numpy versions.
        return np.random.PCG64(np.random.SeedSequence((self.seed, step))).random_raw(count)

    def pair(self, blocks: np.ndarray) -> Pair:
        """Return this process's slice of the blocks of all, shape (blocks, block_size + 1), as a pair."""
        mine = blocks[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return _pair(mine)

    def state_dict(self) -> dict[str, Any]:
        """Return what must stay the same for a run to go on with the same batches."""
        return {
            "seed": self.seed,
            "blocks": self.blocks,
            "block_size": self.block_size,
            "fingerprint": self.fingerprint,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise LabError if a state comes from other data, another seed or another batch."""
        for name, mine in self.state_dict().items():
            if state.get(name) != mine:
                what = f"the checkpoint's data position has {name} {state.get(name)}, this run {mine}"
                raise LabError(f"{what}. Resume with the configuration of the checkpoint.")


class Batches(Protocol):
    """Training batches of one process, one per step."""

    def batch(self, step: int) -> Pair:
        """Return inputs and targets of a step, each (batch_size, block_size)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as plain data and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned; LabError if it is of other data."""
        ...


class IndexedBatches(ABC):
    """Batches of any step at any time, since only the step decides."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    @abstractmethod
    def batch(self, step: int) -> Pair:
        """Return inputs and targets of a step."""

    def at(self: Own, rank: int, world: int) -> Own:
        """The batches of another process."""
        other = copy(self)
        other.draw = replace(self.draw, rank=rank, world=world)
        return other

    def state_dict(self) -> dict[str, Any]:
        """Return what identifies the batches; the position is the step itself."""
        return self.draw.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise LabError if `state` is of other batches."""
        self.draw.check(state)


class TrainBatches(IndexedBatches):
    """Blocks at random positions of a whole corpus."""

    def __init__(self, ids: np.ndarray, draw: Draw) -> None:
        """Draw from `ids`, shape (tokens,), longer than one block."""
        super().__init__(draw)
        self.ids = ids

    def batch(self, step: int) -> Pair:
        """Return inputs and targets of a step, each (batch_size, block_size)."""
        positions = self.draw.numbers(step, self.draw.blocks) % (len(self.ids) - self.draw.block_size)
        return self.draw.pair(_windows(self.ids, positions, self.draw.block_size))


class StreamingBatches:
    """Blocks drawn at random from a pool that a stream of documents fills; one step after the other.

    Neighbouring blocks of a stream are often of one document, so batches come from a pool of `pool_blocks`
    blocks whose empty places the next blocks of the stream take. Every process reads the whole stream and
    takes its slice of each batch. After the last document comes the first training document again.
    """

    def __init__(self, stream: DocumentStream, tokenizer: Tokenizer, draw: Draw, pool_blocks: int) -> None:
        """Draw from the documents that `stream` has not read yet.

        Raises:
            LabError: if there are none.
        """
        self.stream, self.tokenizer, self.draw = stream, tokenizer, draw
        self._start = stream.state_dict()
        self._step = 0
        self._pool_blocks = max(pool_blocks, draw.blocks)
        self._pool = np.empty((0, draw.block_size + 1), id_type(tokenizer.vocab_size))
        self._tail = np.empty(0, id_type(tokenizer.vocab_size))
        self._read_document()  # An error for a stream without documents comes now, not at the first step.
        stream.load_state_dict(self._start)

    def batch(self, step: int) -> Pair:
        """Return inputs and targets of the next step, each (batch_size, block_size).

        Raises:
            LabError: for a step out of order, or a stream that cannot be read.
        """
        if step != self._step:
            what = f"a stream gives its batches in order: step {self._step} is next, got {step}"
            raise LabError(f"{what}. Call load_state_dict with the state of that step first.")
        if not len(self._pool):
            self._pool = self._read_blocks(self._pool_blocks)
        order = np.argsort(self.draw.numbers(step, len(self._pool)), kind="stable")
        places = order[: self.draw.blocks]
        blocks = self._pool[places]
        self._pool[places] = self._read_blocks(self.draw.blocks)
        self._step += 1
        return self.draw.pair(blocks)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch: of the stream, and the tokens read but not yet given."""
        return self.draw.state_dict() | {
            "step": self._step,
            "stream": self.stream.state_dict(),
            "pool": torch.from_numpy(self._pool.astype(np.int64)),
            "tail": torch.from_numpy(self._tail.astype(np.int64)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` returned.

        Raises:
            LabError: if it is of other data, another seed or another batch.
        """
        self.draw.check(state)
        self.stream.load_state_dict(state["stream"])
        self._step = state["step"]
        self._pool = state["pool"].cpu().numpy().astype(self._pool.dtype)
        self._tail = state["tail"].cpu().numpy().astype(self._tail.dtype)

    def _read_blocks(self, count: int) -> np.ndarray:
        """Read the next blocks, shape (count, block_size + 1); the last token starts the next one too."""
        size, parts, tokens = self.draw.block_size, [self._tail], len(self._tail)
        while tokens <= count * size:
            parts.append(self.tokenizer.encode(self._read_document()))
            tokens += len(parts[-1])
        ids = np.concatenate(parts)
        self._tail = ids[count * size :]
        return _windows(ids, np.arange(count) * size, size)

    def _read_document(self) -> str:
        document = self.stream.read()
        if document is None:
            self.stream.load_state_dict(self._start)
            document = self.stream.read()
        if document is None:
            what = f"corpus '{self.stream.config.name}' has no documents left after the held-out ones"
            raise LabError(f"{what}. Pass a smaller --corpus.validation-characters, or --corpus.no-streaming.")
        return document


def validation_blocks(
    ids: np.ndarray, block_size: int, batch_size: int, max_blocks: int | None = None
) -> Iterator[Pair]:
    """Yield blocks that do not overlap and lie evenly over `ids`, the same each time.

    Args:
        ids: held-out tokens, shape (tokens,).
        block_size: tokens per block.
        batch_size: blocks per pair; the last pair may have fewer.
        max_blocks: most blocks to take; None or 0 for all.
    """
    total = (len(ids) - 1) // block_size
    count = min(max_blocks or total, total)
    starts = np.arange(count) * total // count * block_size
    for first in range(0, count, batch_size):
        yield _pair(_windows(ids, starts[first : first + batch_size], block_size))


def _windows(ids: np.ndarray, starts: np.ndarray, block_size: int) -> np.ndarray:
    return ids[starts.astype(np.int64)[:, None] + np.arange(block_size + 1)]


def _pair(blocks: np.ndarray) -> Pair:
    both = torch.from_numpy(blocks.astype(np.int64))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
