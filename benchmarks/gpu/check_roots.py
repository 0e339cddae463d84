"""Every root and the square-root form on the robustness matrices, against eigendecompositions in float64 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asgo.linalg.inverse_root import ROOTS, relative, undamped
from asgo.linalg.polar import PLANS, Plan
from asgo.structures import SquareRoot
from asgo.structures.square_root import from_gram
from benchmarks.gpu.forms import EPS, SQUARE_ROOT
from benchmarks.gpu.matrices import CONDITION, Case, cases, exact
from benchmarks.gpu.part import CheckError, Part, check

BETA2, S_KEPT = 0.2, torch.bfloat16


def run(part: Part) -> None:
    """Two rows for each root: as it is called in a script that asks for exact products and in one that does not.

    Two for the square-root form in each half precision, too.
    """
    checks = {f"root {name}": partial(_root, part, name) for name in ROOTS}
    checks |= {f"square root {precision}": partial(_square_root, part, precision) for precision in SQUARE_ROOT}
    for row, act in checks.items():
        part.attempt(row, partial(act, nullcontext()))
        part.attempt(f"{row}, loose products", partial(act, _loose_products(part.device.torch)))


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


def _square_root(part: Part, precision: str, setting: AbstractContextManager[None]) -> Mapping[str, Any]:
    """An update from the S of every statistic by its momentum, and one whose momentum holds a NaN.

    With t the tolerance and r the roundings of the plan, no matrix makes an update whose largest singular value is
    above ``(1 + t + r) / sqrt(1 - b2)``, nor an S whose square is farther from V than ``2 t + r`` and the rounding with
    which it is kept. Where V has a condition of 9, the update errs by 4 of `SQUARE_ROOT` at most, as in `check_steps`.
    """
    some = [case for case in cases(32 if part.tiny else 128) if not case.is_broken]
    D = torch.stack([case.momentum for case in (*some, some[0])])
    D[-1, 0, 0] = torch.nan
    known = from_gram({"gram": torch.stack([case.gram for case in (*some, some[0])]).double()}, S_KEPT)["sqrt"]
    structure, direction = SquareRoot("left", precision), D.to(part.device.torch)
    state = structure.init(direction)
    state["sqrt"].copy_(known)
    with setting:
        update, ok = structure.update(state, direction, direction, BETA2)
    U, S, old = update.cpu().double(), state["sqrt"].cpu().double(), known.double()
    if ok.tolist() != [True] * len(some) + [False]:
        raise CheckError(f"ok is {ok.tolist()}, where the last alone has a NaN")
    if bool(U[-1].any()) or not torch.equal(S[-1], old[-1]):
        raise CheckError("the momentum with a NaN has an update or changes its S")
    plan, shares = PLANS[precision], {}
    largest = (1 + plan.tolerance + _rounding(plan)) / (1 - BETA2) ** 0.5
    allowed = 2 * plan.tolerance + _rounding(plan) + torch.finfo(S_KEPT).eps
    for i, case in enumerate(some):
        # Brought to one size, so that products stay in range.
        size = float(case.gram.double().norm()) ** 0.5 or 1.0
        D_i, S_i, old_i = case.momentum.double() / size, S[i] / size, old[i] / size
        V = BETA2 * old_i @ old_i.mT + (1 - BETA2) * D_i @ D_i.mT
        found = {
            "singular value": (float(torch.linalg.matrix_norm(U[i], 2)), largest),
            "S": (float((S_i @ S_i.mT - V).norm()), allowed * float(V.norm())),
        }
        if case.is_gentle:
            wanted = exact(V, 1e-6) @ D_i
            found["update"] = float((U[i] - wanted).norm()), 4 * SQUARE_ROOT[precision] * float(wanted.norm())
        for what, (distance, bound) in found.items():
            check(distance, bound, f"{what} of {case.name!r}")
            shares[f"{case.name}: {what}"] = distance / bound if bound else 0.0
    return {"share of the bound": shares, "largest": max(shares.values())}


def _rounding(plan: Plan) -> float:
    """What rounding does to a singular value of the update at most: twelve roundings, twice the unit each.

    Those of the first step are magnified by all later ones, that of the Gram matrix by its condition.
    """
    unit = torch.finfo(plan.dtype).eps / 2
    return (24 + plan.condition + plan.amplification / plan.steps[0][0]) * unit


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
