"""The optimizers of ``benchmarks.step`` and how each is built on a `Workload`.

All get the same matrices and keep their packages' defaults, except that those which can refresh less often than
every step refresh every `interval` steps. An optimizer that is not for embeddings and vectors leaves them to
torch's fused AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from asgo.lab.optimizers.composite import Composite
from asgo.optimizer.param_groups import with_views
from asgo.presets import ASGO
from benchmarks.speed.workloads import Workload

LR, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
COLD_STEPS = 3
"""Steps before the others' turns: they allocate, some compile, and some treat their first step in another way."""

Build = Callable[[Workload, int], Optimizer]
Make = Callable[[list[nn.Parameter], int], Optimizer]


@dataclass(frozen=True)
class BenchSpec:
    """One row of `BENCH_OPTIMIZERS`.

    Args:
        package: the distribution that it is from.
        build: makes it from a workload and an interval.
        intervals: all: takes part with every interval asked for; first: with the first; every: it refreshes in
            every step; none: there is nothing to refresh.
        sides: of how many sides of a matrix it keeps square statistics, to estimate its memory.
        about: what it is and what it does every interval.
    """

    package: str
    build: Build
    intervals: Literal["all", "first", "every", "none"]
    sides: int
    about: str

    @property
    def is_ours(self) -> bool:
        """Whether it is of this library."""
        return self.package == "asgo"

    @property
    def slow_starts(self) -> int:
        """How many of its first steps prepare or compile, so that their time says nothing."""
        return 2 if self.package == HB else 1

    @property
    def version(self) -> str | None:
        """The installed version of its package; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def memory(self, workload: Workload) -> float:
        """About how many bytes its state takes, in float32: two moments, statistics and what is derived from them."""
        shapes = [param.shape for _, param in workload.matrices]
        squares = sum({0: 0, 1: min(m, n) ** 2, 2: m**2 + n**2}[self.sides] for m, n in shapes)
        return 4.0 * (2 * workload.numel + 2 * squares)


def _asgo(make: Callable[..., Optimizer], per_head: bool = False) -> Build:
    def build(workload: Workload, interval: int) -> Optimizer:
        groups = [dict(group) for group in (workload.heads if per_head else workload.whole)]
        return make(groups, lr=LR, precondition_frequency=interval)

    return build


def _square_root(workload: Workload, interval: int) -> Optimizer:
    return ASGO([dict(group) for group in workload.whole], lr=LR, root="square_root")


def _reference(workload: Workload, interval: int) -> Optimizer:
    return ASGO.reference([dict(group) for group in workload.whole], lr=LR)


def _adamw(foreach: bool) -> Build:
    def build(workload: Workload, interval: int) -> Optimizer:
        matrices = [named for group in workload.whole for named, view in with_views(group) if view is not None]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": workload.rest, "weight_decay": 0.0}]
        given = [group for group in groups if group["params"]]
        return AdamW(given, lr=LR, betas=BETAS, foreach=foreach, fused=not foreach)

    return build


def _beside_adamw(make: Make) -> Build:
    """`make` for the matrices, fused AdamW for the rest."""

    def build(workload: Workload, interval: int) -> Optimizer:
        parts = [make([param for _, param in workload.matrices], interval)]
        if workload.rest:
            parts.append(AdamW(workload.rest, lr=LR, betas=BETAS, weight_decay=0.0, fused=True))
        return Composite(parts)

    return build


def _muon(params: list[nn.Parameter], interval: int) -> Optimizer:
    return Muon(params, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")


def _peer(module: str, name: str, every: str = "", share: str = "", settings: Mapping[str, Any] | None = None) -> Build:
    """A class of another package, imported when it is built.

    Args:
        module: where the class is.
        name: the class.
        every: its argument for the interval in steps, if it has one.
        share: its argument for the share of the steps that refresh, if it has one.
        settings: other arguments that are not left at their defaults.
    """

    def make(params: list[nn.Parameter], interval: int) -> Optimizer:
        timing: dict[str, float] = ({every: interval} if every else {}) | ({share: 1 / interval} if share else {})
        return getattr(import_module(module), name)(params, lr=LR, **timing, **(settings or {}))

    return _beside_adamw(make)


def _po_muon(params: list[nn.Parameter], interval: int) -> Optimizer:
    return import_module("pytorch_optimizer").Muon([{"params": params, "use_muon": True}], lr=LR)


PO, HB, EO = "pytorch-optimizer", "heavyball", "emerging-optimizers"
_po, _hb = partial(_peer, "pytorch_optimizer"), partial(_peer, "heavyball")
_eo_soap, _eo_muon = "emerging_optimizers.soap", "emerging_optimizers.orthogonalized_optimizers"
_FREQUENCY, _COMPUTE = "precondition_frequency", "preconditioning_compute_steps"
_FROM_START = {"start_preconditioning_step": 1}

BENCH_OPTIMIZERS: dict[str, BenchSpec] = {
    "asgo": BenchSpec("asgo", _asgo(ASGO), "all", 1, "ASGO, queries and keys whole"),
    "asgo-heads": BenchSpec("asgo", _asgo(ASGO, per_head=True), "all", 1, "ASGO, queries and keys per head"),
    "asgo-packed": BenchSpec(
        "asgo", _asgo(partial(ASGO, packed_state=True)), "all", 1, "ASGO, statistics and roots as triangles"
    ),
    "asgo-square-root": BenchSpec("asgo", _square_root, "every", 1, "ASGO, the square root of the statistic alone"),
    "asgo-paper": BenchSpec("asgo", _asgo(ASGO.paper), "first", 1, "ASGO.paper, queries and keys whole"),
    "asgo-reference": BenchSpec("asgo", _reference, "every", 1, "ASGO.reference: the released iteration"),
    "adamw": BenchSpec("torch", _adamw(foreach=True), "none", 0, "AdamW(foreach=True)"),
    "adamw-fused": BenchSpec("torch", _adamw(foreach=False), "none", 0, "AdamW(fused=True)"),
    "muon": BenchSpec("torch", _beside_adamw(_muon), "every", 0, "Muon"),
    "po-soap": BenchSpec(PO, _po("SOAP", every=_FREQUENCY), "first", 2, "SOAP: QR, both sides up to 10,000"),
    "po-shampoo": BenchSpec(PO, _po("Shampoo", every=_COMPUTE), "first", 2, "Shampoo: SVD, both sides"),
    "po-scalable": BenchSpec(
        PO,
        _po("ScalableShampoo", every=_COMPUTE, settings=_FROM_START),
        "first",
        2,
        "ScalableShampoo: Schur-Newton, both sides in blocks of 512",
    ),
    "po-dash": BenchSpec(PO, _po("DASH", every=_FREQUENCY), "first", 2, "DASH: Newton, both sides in blocks of 1,024"),
    "po-kron": BenchSpec(
        PO, _po("Kron", share="pre_conditioner_update_probability"), "first", 2, "Kron: PSGD, both sides up to 8,192"
    ),
    "po-muon": BenchSpec(PO, _beside_adamw(_po_muon), "every", 0, "Muon"),
    "hb-soap": BenchSpec(HB, _hb("SOAP", every=_FREQUENCY), "first", 2, "SOAP: QR, both sides up to 2,048"),
    "hb-kl-shampoo": BenchSpec(
        HB, _hb("KLShampoo", every=_FREQUENCY), "first", 2, "KLShampoo: QR, both sides up to 2,048"
    ),
    "hb-psgd": BenchSpec(
        HB, _hb("PSGDKron", share="preconditioner_update_probability"), "first", 2, "PSGDKron: both sides up to 2,048"
    ),
    "hb-muon": BenchSpec(HB, _hb("Muon"), "every", 0, "Muon"),
    "eo-soap": BenchSpec(EO, _peer(_eo_soap, "SOAP"), "every", 2, "SOAP: QR, both sides"),
    "eo-muon": BenchSpec(EO, _peer(_eo_muon, "Muon"), "every", 0, "Muon"),
}


@contextmanager
def compilation(allowed: bool) -> Iterator[None]:
    """Inside, heavyball compiles its steps as it does by default, or not; nothing where it is not installed."""
    if allowed or find_spec("heavyball") is None:
        yield
        return
    utils: Any = import_module("heavyball.utils")
    before, utils.compile_mode = utils.compile_mode, None
    try:
        yield
    finally:
        utils.compile_mode = before
