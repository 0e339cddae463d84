"""Every root on the robustness matrices, against eigendecompositions in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS
from benchmarks.gpu.forms import EPS, STATED
from benchmarks.gpu.matrices import CONDITION, Case, cases, exact
from benchmarks.gpu.part import CheckError, Part, check

ABSOLUTE = ("outside", "inside")
"""Roots whose damping is absolute: checked where it does not matter, on matrices of condition 9."""
REFERENCE_PRODUCTS = 40


def run(part: Part) -> None:
    """Two rows for each root: as it is called in a script that asks for exact products and in one that does not."""
    for name in ROOTS:
        part.attempt(f"root {name}", partial(_root, part, name, nullcontext()))
        part.attempt(f"root {name}, loose products", partial(_root, part, name, _loose_products(part.device.torch)))


def _root(part: Part, name: str, setting: AbstractContextManager[None]) -> Mapping[str, Any]:
    size = 32 if part.tiny else 128
    some = [case for case in cases(size) if case.is_gentle or name not in (*ABSOLUTE, "reference")]
    eps, bound = EPS.get(name, 1e-6), _bound(name, size)
    stack = torch.stack([case.gram for case in some]).to(part.device.torch)
    with setting:
        errors = _errors(name, stack, some, eps)
    for case, error in errors.items():
        check(error, bound, f"{name}: the relative error of {case!r}")
    return {"bound": bound, "eps": eps, "k": size, "errors": errors}


def _bound(name: str, k: int) -> float:
    """What `asgo.linalg.inverse_root` states, and for roots outside that table what rounding explains at condition 9.

    An error of ``e`` in each of p products of inner length k is at most ``p k e`` in the result, times the condition of
    the root, 3; the float64 roots have one product in float32, with the momentum.
    """
    rounding = k * torch.finfo(torch.float32).eps * CONDITION**0.5
    if name == "auto":
        return max(STATED.values())
    return STATED[name] if name in STATED else rounding * (REFERENCE_PRODUCTS if name == "reference" else 2)


def _errors(name: str, stack: Tensor, some: list[Case], eps: float) -> dict[str, float]:
    roots, ok = ROOTS[name](stack, eps)
    found, reported = roots.cpu(), ok.cpu()
    wrong = [case.name for case, well in zip(some, reported.tolist(), strict=True) if well == case.is_broken]
    if wrong:
        raise CheckError(f"{name} reports {wrong} wrongly")
    if not bool(found.isfinite().all()):
        raise CheckError(f"{name} returns what is not finite")
    sound = [(case, root) for case, root in zip(some, found, strict=True) if not case.is_broken]
    return {case.name: _error(root, case, _target(name, case.gram, eps)) for case, root in sound}


def _target(name: str, gram: Tensor, eps: float) -> Tensor:
    if name not in (*ABSOLUTE, "reference"):
        return exact(gram, eps)
    values, vectors = torch.linalg.eigh(gram.double())
    damped = values.sqrt() + eps if name == "outside" else (values + eps * (name == "inside")).sqrt()
    return (vectors / damped) @ vectors.mT


def _error(root: Tensor, case: Case, wanted: Tensor) -> float:
    """Of the step ``Z M``, with the momentum brought to size 1 so that it stays in range."""
    momentum = case.momentum / case.momentum.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    right = wanted @ momentum.double()
    size = float(right.norm())
    distance = float((root.double() @ momentum.double() - right).norm())
    return distance / size if size else distance


@contextmanager
def _loose_products(device: torch.device) -> Iterator[None]:
    """TF32 and autocast to bfloat16, as many training scripts have them: neither may reach a root."""
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")
