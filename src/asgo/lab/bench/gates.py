"""Numbers that the roots should reach, as a table of pass and fail.

Speeds are times faster than the released iteration, in the same process on the same matrices. They hold for one
or two CPU threads, or for a GPU, and those for other machines are left out. Errors hold at one damping. What the
run did not measure, for want of a root, a size, real matrices or the right damping, is listed as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asgo.lab.bench.matrices import SCALED
from asgo.lab.bench.rows import CaseRow, Gate, RootRow

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Speed:
    """`root` at least so many times as fast as `rival`, by size; `threads` and `device` say where."""

    root: str
    rival: str
    least: dict[int, float]
    device: str
    threads: int | None = None
    batch: int = 1


SPEEDS = (
    Speed("auto", "reference", {128: 3.3, 384: 7.0, 768: 8.0, 1024: 7.0}, "cpu", 1),
    Speed("auto", "reference", {128: 2.7, 384: 4.0, 768: 5.5, 1024: 5.0}, "cpu", 2),
    Speed("eigh64", "reference", {384: 3.3, 768: 3.3, 1024: 3.3}, "cpu", 1),
    Speed("minimax", "reference", {128: 1.75, 384: 1.75, 768: 1.75, 1024: 1.75}, "cpu", 1),
    Speed("minimax", "reference", {384: 1.8, 768: 1.8, 1024: 1.8}, "cuda"),
    Speed("minimax", "eigh", {1024: 10.0}, "cuda", batch=8),
)


@dataclass(frozen=True)
class Error:
    """Roots whose names match `pattern`: largest error and, if not None, smallest cosine on real matrices at `eps`."""

    what: str
    pattern: str
    most: float
    cos: float | None
    eps: float = 1e-6


ERRORS = (
    Error("the default", "auto", 4e-2, 0.999),
    Error("float64", "eigh64", 1e-4, None),
    Error("21 products", "minimax", 2.5e-3, 0.99999),
    Error("17 products", "minimax.*(17|mixed|fast)", 1.2e-2, 0.9999),
    Error("bfloat16 products", ".*(bf16|bfloat16).*", 4e-3, None),
    Error("TF32 products", ".*tf32.*", 3.5e-2, 0.999, eps=1e-5),
)

PRODUCT_PATH, ROBUST_ERROR = "minimax", 2.5e-3
UNCHANGED = 1.25
"""Errors of scaled gradients over those of the same gradients unscaled: what counts as unchanged."""


def judge(rows: Sequence[RootRow], cases: Sequence[CaseRow], eps: float, device: str, threads: int) -> list[Gate]:
    """All gates against what was measured.

    Args:
        rows: times and errors.
        cases: what breaks solvers.
        eps: damping of all of them.
        device: cpu or cuda.
        threads: CPU threads.
    """
    return [
        *(gate for speed in SPEEDS for gate in _speed_gates(speed, rows, device, threads)),
        *(gate for error in ERRORS for gate in _error_gates(error, rows, eps)),
        _robust_gate(cases, eps),
        _scale_gate(cases),
    ]


def _speed_gates(speed: Speed, rows: Sequence[RootRow], device: str, threads: int) -> Iterator[Gate]:
    if device != speed.device or speed.threads not in (None, threads):
        return
    where = device if speed.threads is None else f"{threads} thread{'s' * (threads > 1)}"
    for size, least in speed.least.items():
        what = f"{speed.root}: faster than {speed.rival}, k = {size}, {where}"
        found = _ratio(speed, size, rows)
        if found is None:
            yield Gate(what, f">= {least:g} x", "-", NOT_MEASURED)
        else:
            yield Gate(what, f">= {least:g} x", f"{found:.2f} x", verdict(found >= least))


def _ratio(speed: Speed, size: int, rows: Sequence[RootRow]) -> float | None:
    """How many times faster, on real matrices if there are, else on drawn ones, in the largest batch."""
    for kind in ("real", "signal"):
        some = [row for row in rows if (row.matrices, row.size) == (kind, size) and row.batch >= speed.batch]
        largest = max((row.batch for row in some), default=0)
        products = {row.root: row for row in some if row.batch == largest}
        root, rival = products.get(speed.root), products.get(speed.rival)
        if root and rival and root.products and rival.products:
            return root.speedup if speed.rival == "reference" else rival.products / root.products
    return None


def _error_gates(error: Error, rows: Sequence[RootRow], eps: float) -> Iterator[Gate]:
    required = f"<= {error.most:g}" + ("" if error.cos is None else f", cosine >= {error.cos:g}")
    some = [row for row in rows if row.matrices == "real" and re.fullmatch(error.pattern, row.root)]
    names = sorted({row.root for row in some})
    if not names or not math.isclose(eps, error.eps):
        yield Gate(f"{error.what}: error, real, eps {error.eps:g}", required, "-", NOT_MEASURED)
        return
    for name in names:
        own = [row for row in some if row.root == name]
        worst = max(math.inf if row.max_error is None else row.max_error for row in own)
        cos = min(-1.0 if row.min_cos is None else row.min_cos for row in own)
        good = worst <= error.most and (error.cos is None or cos >= error.cos)
        found = f"{worst:.2g}, cosine {cos:.6f}"
        yield Gate(f"{error.what}: error of {name}, real, eps {eps:g}", required, found, verdict(good))


def _robust_gate(cases: Sequence[CaseRow], eps: float) -> Gate:
    own = [row for row in cases if row.root == PRODUCT_PATH]
    what, required = f"{PRODUCT_PATH}: robustness", f"finite, told, error <= {ROBUST_ERROR:g}"
    if not own or not math.isclose(eps, 1e-6):
        return Gate(what, required, "-", NOT_MEASURED)
    worst = max(math.inf if row.max_error is None else row.max_error for row in own)
    bad = [row.case for row in own if not (row.finite and row.told)]
    good = worst <= ROBUST_ERROR and not bad
    return Gate(what, required, f"{worst:.2g}" + (f"; {', '.join(bad)}" if bad else ""), verdict(good))


def _scale_gate(cases: Sequence[CaseRow]) -> Gate:
    own = {row.case: row.max_error for row in cases if row.root == PRODUCT_PATH and row.case.startswith(SCALED)}
    base = own.pop(f"{SCALED}1", None)
    what, required = f"{PRODUCT_PATH}: error of scaled gradients", f"<= {UNCHANGED:g} x unscaled"
    if base is None or not own:
        return Gate(what, required, "-", NOT_MEASURED)
    worst = max(math.inf if error is None else error for error in own.values())
    return Gate(what, required, f"{worst / base:.3g} x", verdict(worst <= UNCHANGED * base))


def verdict(good: bool) -> str:
    """A gate's answer."""
    return "pass" if good else "FAIL"
