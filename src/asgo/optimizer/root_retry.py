"""A second try for a root that failed, for that matrix alone and without making a device wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from asgo.linalg.masked import known_all_true

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from asgo._types import State
    from asgo.structures import Structure


@dataclass(frozen=True)
class _Flags:
    """Which matrices of a run have no new root, on their way to the host."""

    start: int
    failed: Tensor
    arrived: torch.cuda.Event | None

    @staticmethod
    def send(start: int, failed: Bool[Tensor, "b"]) -> _Flags:
        if not failed.is_cuda:
            return _Flags(start, failed.to("cpu"), None)
        here = torch.empty(failed.shape, dtype=torch.bool, pin_memory=True).copy_(failed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return _Flags(start, here, arrived)

    def have_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def rows(self) -> list[int]:
        return [self.start + int(i) for i in self.failed.nonzero()]


class RootRetry:
    """Refreshes the roots of a bucket; a root that fails is tried once more by `Structure.retried`.

    On a CPU the second try follows at once. A device is not waited for: its flags travel to the host while it works
    on, the last good root serves this step, and the second try comes with the next step that finds them arrived.
    They are no part of the state: after a resume the next refresh raises them anew.

    Args:
        deferred: not to wait.
        retries: whether there is a second try; not where it would come after other ranks have been sent the root.
    """

    def __init__(self, deferred: bool, retries: bool = True) -> None:
        self.deferred, self.retries = deferred, retries
        self._flags: list[_Flags] = []

    def refresh(self, structure: Structure, state: State, runs: list[slice]) -> None:
        """A new root for every matrix in `runs`, in place; failures are counted in ``state["failures"]``."""
        pending, exact = self._pending(), structure.retried()
        for rows in runs:
            due = {key: tensor[rows] for key, tensor in state.items()}
            ok = structure.compute_root(due)
            if exact is not None and self.retries and _is_readable(ok):
                ok = self._retry(exact, due, rows.start, ok)
            due["failures"] += ~ok
        if exact is not None:
            for row in pending:
                _again(exact, state, row)

    def _retry(self, exact: Structure, due: State, start: int, ok: Bool[Tensor, "b"]) -> Tensor:
        if self.deferred:
            self._flags.append(_Flags.send(start, ~ok))
            return ok
        if known_all_true(ok):
            return ok
        rows = _Flags.send(0, ~ok).rows()
        return ok.index_copy(0, torch.tensor(rows), torch.cat([_again(exact, due, row) for row in rows]))

    def _pending(self) -> list[int]:
        rows: set[int] = set()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return []  # an event must not be asked while a graph is captured; the next step that is not will do it
        while self._flags and self._flags[0].have_arrived():
            rows.update(self._flags.pop(0).rows())
        return sorted(rows)


def _is_readable(ok: Tensor) -> bool:
    """Whether flags can be read on the host: not while a graph is captured or compiled, nor on an unknown device."""
    if torch.compiler.is_compiling():
        return False
    return ok.device.type == "cpu" or (ok.is_cuda and not torch.cuda.is_current_stream_capturing())


def _again(exact: Structure, state: State, row: int) -> Tensor:
    return exact.compute_root({key: tensor[row : row + 1] for key, tensor in state.items()})
