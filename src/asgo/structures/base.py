"""The contract of a structure."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from asgo._types import Root, Stack, State


class Structure(ABC):
    """A memory of gradients and the rescaling it implies, for a whole stack ``(b, m, n)`` at once.

    Every tensor of the state has the stack's `b` as its first axis, so that states of several parameters can
    stand in one tensor. A structure holds settings only; the state belongs to the optimizer.

    Laws (tested for every structure): a stack gives what each matrix gives alone; the result equals the
    textbook formula in float64; measurements of row shards add up where it says so; a matrix whose gradient is zero
    rests: nothing of its state changes.
    """

    @abstractmethod
    def additive_rows(self, m: int, n: int) -> bool:
        """Whether measurements of row shards of an ``m x n`` matrix add up to the measurement of the whole."""

    @abstractmethod
    def init(self, like: Stack) -> State:
        """The state before the first gradient, in the dtype and on the device of `like`."""

    @abstractmethod
    def measure(self, grad: Stack) -> Tensor:
        """The statistic of one gradient, e.g. ``G G^T``."""

    @abstractmethod
    def fold(self, state: State, measurement: Tensor, beta2: float) -> None:
        """Average a measurement into the memory, in place; with ``beta2`` of 1 add it up (AdaGrad's sum)."""

    @abstractmethod
    def refresh(self, state: State, root: Root, eps: float) -> Tensor:
        """Recompute what is derived from the memory, in place: the only cubic work.

        Returns:
            ``(b,)`` bool: whether the root could be computed. Where not, the last good one stays.
        """

    @abstractmethod
    def precondition(self, state: State, direction: Stack) -> Stack:
        """Rescale a direction by the refreshed memory; cheap, every step."""

    @abstractmethod
    def cost(self, m: int, n: int) -> float:
        """Multiplications of one refresh of one ``m x n`` matrix, up to the root's number of products."""
