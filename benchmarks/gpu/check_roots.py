"""Every root on the robustness matrices, against eigendecompositions in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS, relative, undamped
from benchmarks.gpu.forms import EPS
from benchmarks.gpu.matrices import CONDITION, Case, cases, exact
from benchmarks.gpu.part import CheckError, Part, check


def run(part: Part) -> None:
    """Two rows for each root: as it is called in a script that asks for exact products and in one that does not."""
    for name in ROOTS:
        part.attempt(f"root {name}", partial(_root, part, name, nullcontext()))
        part.attempt(f"root {name}, loose products", partial(_root, part, name, _loose_products(part.device.torch)))


def _root(part: Part, name: str, setting: AbstractContextManager[None]) -> Mapping[str, Any]:
    size = 32 if part.tiny else 128
    # Absolute damping is checked where it does not matter, on matrices of condition 9.
    some = [case for case in cases(size) if case.is_gentle or ROOTS[name].formula is relative]
    eps, bound = EPS[name], _bound(name, size)
    stack = torch.stack([case.gram for case in some]).to(part.device.torch)
    with setting:
        errors = _errors(name, stack, some, eps)
    for case, error in errors.items():
        check(error, bound, f"{name}: the relative error of {case!r}")
    return {"bound": bound, "eps": eps, "k": size, "errors": errors}


def _bound(name: str, k: int) -> float:
    """What the root states and, of a root that states nothing, what rounding explains at condition 9.

    An error of ``e`` in each of p products of inner length k is at most ``p k e`` in the result, times the condition of
    the root, 3; the float64 roots have one product in float32, with the momentum.
    """
    root, rounding = ROOTS[name], k * torch.finfo(torch.float32).eps * CONDITION**0.5
    if root.error is not None:
        return root.error
    return rounding * (root.products(EPS[name]) if root.formula is undamped else 2)


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
    if ROOTS[name].formula is relative:
        return exact(gram, eps)
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors / ROOTS[name].formula(values, eps).sqrt()) @ vectors.mT


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
