"""What is remembered about a stream of gradients, and how that memory rescales a step."""

import warnings

from asgo.structures.base import Algebra, OneCall, Structure, limit_of
from asgo.structures.block_diagonal import BlockDiagonal
from asgo.structures.block_mean import BlockMean
from asgo.structures.low_rank import LowRankFactor, LowRankSymmetric
from asgo.structures.momentum_change import MomentumChange
from asgo.structures.one_sided import OneSided
from asgo.structures.packed import Packed, opened, packed_if
from asgo.structures.square_root import SquareRoot
from asgo.structures.two_sided import TwoSided

__all__ = [
    "Algebra",
    "BlockDiagonal",
    "BlockMean",
    "LowRankFactor",
    "LowRankSymmetric",
    "MomentumChange",
    "OneCall",
    "OneSided",
    "Packed",
    "SquareRoot",
    "Structure",
    "TwoSided",
    "limit_of",
    "opened",
    "packed_if",
]

_RENAMED: dict[str, type[Structure]] = {
    "Blockwise": BlockMean,
    "DenseBlocks": BlockDiagonal,
    "Difference": MomentumChange,
    "Kronecker": TwoSided,
}


def __getattr__(name: str) -> type[Structure]:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warnings.warn(f"asgo.structures.{name} is called {new.__name__} now.", DeprecationWarning, stacklevel=2)
    return new
