"""The optimizers that a step is compared with, on the same parameters: torch's Muon and AdamW, HeavyBall's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import AdamW, Muon

from benchmarks.gpu.forms import LR
from benchmarks.gpu.shapes import Workload

BETAS = (0.9, 0.95)
MUON_STEPS = 5


class Steps(Protocol):
    """What is timed: an optimizer, or several that step together."""

    def step(self) -> object:
        """One step."""
        ...


class Together:
    """Several optimizers as one."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()


def with_adamw(matrices: Any, rest: list[nn.Parameter], lr: float = LR) -> Steps:
    """An optimizer for the matrices, and fused AdamW for the rest."""
    return Together([matrices, *([AdamW(rest, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)] if rest else [])])


def muon(workload: Workload, fused: bool = False) -> Steps:
    """`torch.optim.Muon`, whose updates have the size of AdamW's, as ASGO's have."""
    ours = Muon(workload.matrices(fused), lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return with_adamw(ours, workload.rest)


def adamw(workload: Workload) -> Steps:
    """Fused AdamW for everything."""
    return AdamW(workload.params, lr=LR, betas=BETAS, weight_decay=0.1, fused=True)


def heavyball(name: str) -> Callable[[Workload], Steps]:
    """A class of HeavyBall, not compiled: compiling takes longer than there is time for."""

    def build(workload: Workload) -> Steps:
        utils: Any = import_module("heavyball.utils")
        utils.compile_mode = None
        return with_adamw(getattr(import_module("heavyball"), name)(workload.matrices(False), lr=LR), workload.rest)

    return build


@dataclass(frozen=True)
class Peer:
    """One row of `PEERS`.

    Args:
        name: of the row.
        build: the optimizer.
        needs: the module that must be there.
        fused: whether it says something only where a parameter holds several matrices.
    """

    name: str
    build: Callable[[Workload], Steps]
    needs: str = "torch"
    fused: bool = False

    def unavailable(self, workload: Workload) -> str | None:
        """Why it cannot be timed; None if it can."""
        if find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return "no parameter holds several matrices" if self.fused and not workload.is_fused else None


PEERS: tuple[Peer, ...] = (
    Peer("torch Muon, fused matrices", lambda workload: muon(workload, fused=True), fused=True),
    Peer("torch AdamW, fused", adamw),
    Peer("HeavyBall SOAP", heavyball("SOAP"), "heavyball"),
    Peer("HeavyBall Muon", heavyball("Muon"), "heavyball"),
)
MUON = "torch Muon"
"""The row that the others are compared with, one by one."""


def state_bytes(owner: Any, others: Iterable[Tensor]) -> int:
    """Bytes of the tensors in an optimizer's state, each memory once, without those of `others`."""
    parts = owner.parts if isinstance(owner, Together) else [owner]
    known = {tensor.untyped_storage().data_ptr() for tensor in others}
    found: dict[int, int] = {}
    for state in (state for part in parts for state in part.state.values()):
        for tensor in _tensors(state):
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for at, size in found.items() if at not in known)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for each in inner for tensor in _tensors(each)]
