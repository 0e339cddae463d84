"""What the literature says of a preset."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimInfo:
    """The facts about an optimizer that tables show.

    Args:
        paper: title and authors.
        year: of its first version.
        memory: numbers of state; ``d = m n``, k the shorter side and o the longer one, r a rank, s a block size.
        cost: leading term of the operations of a step; a root counts by its number of matrix products.
        lr: a learning rate to start a search from.
    """

    paper: str
    year: int
    memory: str
    cost: str
    lr: float
