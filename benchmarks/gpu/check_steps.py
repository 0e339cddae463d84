"""One step of every preset and form, against the same step in float64 on the CPU.

**The bound.** Let u be the unit roundoff of float32. A statistic that is a sum of n products, a root of it from P
products of inner length k (an eigendecomposition errs by about ``k u`` and takes one more), and one product with the
direction err by at most ``(n + (P + 1) k) u`` relative to their largest entries; a function of the statistic makes of
this at most its condition, here 9 by the choice of gradients, as much in the direction (`Preset.gain` where a statistic
has not full rank). To that comes what the root itself may err (`Form.error`). Dividing by a norm of what errs by e
makes ``2 e``; there are two such divisions, by the mean square of each index of the other side and by that of the whole
update, hence a factor of 4. Last, the parameters are rounded three times at most, with the unit roundoff of their own
dtype: when they are decayed, the update, and the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asgo import ASGO, View
from asgo.linalg.inverse_root import ROOTS
from benchmarks.gpu.forms import EIGH_PRODUCTS, FORMS, PRESETS, STATED, Form, Groups, Preset, interval_of, unavailable
from benchmarks.gpu.matrices import CONDITION, generator, gentle
from benchmarks.gpu.part import CheckError, Part, check

LR = 0.5


@dataclass(frozen=True)
class Allowed:
    """What a step may err: `error`, `products` and `gain` of `Form` and `Preset`."""

    error: float
    products: int
    gain: float = CONDITION


@dataclass(frozen=True)
class Given:
    """A parameter of the check: its view, the shapes ``(b, m, n)`` and whether that is square."""

    name: str
    shape: tuple[int, ...]
    view: View | None

    @property
    def is_square(self) -> bool:
        """Whether all its matrices are square, or it has none."""
        return self.view is None or all(m == n for _, m, n in self.view.shapes(self.shape))


MATRIX = View("m n -> 1 m n")
GIVEN = (
    Given("wide", (32, 64), MATRIX),
    Given("tall", (64, 32), MATRIX),
    Given("square", (48, 48), MATRIX),
    Given("fused", (96, 32), View("m n -> 1 m n", split=(32, 32, 32))),
    Given("heads", (48, 24), View("(h d) n -> h d n", {"h": 4})),
    Given("convolution", (16, 8, 3, 3), View("o i a b -> 1 o (i a b)")),
    Given("experts", (3, 24, 24), View("e m n -> e m n")),
    Given("vector", (7,), None),
)


def run(part: Part) -> None:
    """A row for each preset, each form, and each dtype of parameters."""
    for preset in PRESETS:
        part.attempt(f"step {preset.name}", partial(_preset, part, preset))
    for form in FORMS:
        why = unavailable(form, part.device)
        if why:
            part.skip(f"step form {form.name}", why)
        else:
            part.attempt(f"step form {form.name}", partial(_form, part, form))
    for dtype in (torch.bfloat16, torch.float16):
        for packed in (False, True):
            row = f"step {str(dtype).removeprefix('torch.')} parameters{', packed' if packed else ''}"
            part.attempt(row, partial(_low_precision, part, dtype, packed))
    part.attempt("step gradients of any size", partial(_any_size, part))
    part.attempt("step retry of a failed root", partial(_retry, part))


def _preset(part: Part, preset: Preset) -> Mapping[str, Any]:
    given = [each for each in GIVEN if each.is_square or not preset.square]
    return compare(part, preset.make, given, Allowed(preset.error, preset.products, preset.gain))


def _form(part: Part, form: Form) -> Mapping[str, Any]:
    allowed = Allowed(form.error, form.products or EIGH_PRODUCTS)
    return compare(part, lambda groups: form.make(interval_of(form, groups)), GIVEN, allowed)


def _low_precision(part: Part, dtype: torch.dtype, packed: bool) -> Mapping[str, Any]:
    make = partial(ASGO, lr=LR, root="minimax", packed_state=packed)
    found = compare(part, make, GIVEN, Allowed(STATED["minimax"], 21), dtype)
    optimizer = make(groups_of(parameters(GIVEN, part.device.torch, dtype)))
    kept = {t.dtype for state in optimizer.state.values() for t in state.values() if t.is_floating_point()}
    if kept != {torch.float32}:
        raise CheckError(f"the state of {dtype} parameters is in {kept}, not in float32")
    return found


Named = list[tuple[Given, nn.Parameter]]


def parameters(given: tuple[Given, ...] | list[Given], device: torch.device, dtype: torch.dtype) -> Named:
    """Parameters of standard deviation 0.2 with `gentle` gradients, the same numbers whatever device and dtype."""
    named: Named = []
    for i, each in enumerate(given):
        weight = 0.2 * torch.randn(each.shape, generator=generator(100 + i))
        param = nn.Parameter(weight.to(device, dtype))
        param.grad = gradient(each, i).to(device, dtype)
        named.append((each, param))
    return named


def gradient(each: Given, seed: int) -> Tensor:
    """A gradient whose matrices are `gentle`, in float64, no entry larger than about 1."""
    if each.view is None:
        return torch.randn(each.shape, generator=generator(seed)).double()
    stacks = [gentle(*shape, seed + 10 * j) for j, shape in enumerate(each.view.shapes(each.shape))]
    return each.view.restore(stacks, each.shape)


def groups_of(named: Named) -> Groups:
    """A group for every parameter."""
    return [{"params": [(each.name, param)], "view": each.view} for each, param in named]


def compare(
    part: Part,
    make: Callable[[Groups], Optimizer],
    given: tuple[Given, ...] | list[Given],
    allowed: Allowed,
    dtype: torch.dtype = torch.float32,
) -> Mapping[str, Any]:
    """The distance of a step on the device from that in float64, in units of its bound; the row of a check.

    Raises:
        CheckError: a step is farther than its bound.
    """
    here = parameters(given, part.device.torch, dtype)
    wide = parameters(given, torch.device("cpu"), torch.float64)
    for (_, param), (_, exact) in zip(here, wide, strict=True):
        exact.data.copy_(param.detach())
        exact.grad = None if param.grad is None else param.grad.cpu().double()
    before = [exact.detach().clone() for _, exact in wide]
    for named in (here, wide):
        make(groups_of(named)).step()
    shares = {}
    for (each, param), (_, exact), old in zip(here, wide, before, strict=True):
        bound = _bound(each, exact.detach(), old, allowed, dtype)
        distance = float((param.detach().cpu().double() - exact.detach()).norm())
        check(distance, bound, f"the distance of {each.name!r} from float64")
        shares[each.name] = distance / bound
    return {"share of the bound": shares, "largest": max(shares.values())}


def _bound(each: Given, exact: Tensor, old: Tensor, allowed: Allowed, dtype: torch.dtype) -> float:
    """The bound of this module's docstring, as a distance."""
    k, n = 1, each.shape[0]
    if each.view is not None:
        k, n = (pick(pick(shape[1:]) for shape in each.view.shapes(each.shape)) for pick in (min, max))
    rounding = allowed.gain * (n + (allowed.products + 1) * k) * torch.finfo(torch.float32).eps / 2
    change, unit = float((exact - old).norm()), torch.finfo(dtype).eps / 2
    return 4 * (allowed.error + rounding) * change + 3 * unit * (float(old.norm()) + change)


SIZES = {"as drawn": 1.0, "times 1e15": 1e15, "times 1e-15": 1e-15, "zero": 0.0, "NaN": math.nan}


def _any_size(part: Part) -> Mapping[str, Any]:
    """A step depends on the direction of a gradient alone; zeros and NaN leave their matrix, and no other, unmoved."""
    each, device = GIVEN[0], part.device.torch
    named = [(name, nn.Parameter(torch.ones(each.shape, device=device))) for name in SIZES]
    for name, param in named:
        param.grad = (gradient(each, 0) * SIZES[name]).float().to(device)
    optimizer = ASGO([{"params": named, "view": each.view}], lr=LR, root="minimax", weight_decay=0.0)
    optimizer.step()
    moved = {name: (param.detach() - 1).double().cpu() for name, param in named}
    size = float(moved["as drawn"].norm())
    shares = {}
    for name in ("times 1e15", "times 1e-15"):
        shares[name] = float((moved[name] - moved["as drawn"]).norm()) / size
        bound = _bound(each, moved["as drawn"] + 1, torch.ones(each.shape).double(), Allowed(0.0, 21), torch.float32)
        check(shares[name], 2 * bound / size, f"the difference that {name!r} makes")
    still = [name for name in ("zero", "NaN") if bool((moved[name] != 0).any())]
    if still or optimizer.failures() != {"NaN": 1}:
        raise CheckError(f"{still} moved, and failures() is {optimizer.failures()}, not {{'NaN': 1}}")
    return {"differences": shares}


def _retry(part: Part) -> Mapping[str, Any]:
    """A root that fails is found again in float64, on a device by the step after the one that finds its flag arrived.

    With eps of 1e-9, below the rounding of float32, `minimax` cannot find the root of a statistic of low rank. The
    retried step has to be nearer to that of a CPU than to a step without a preconditioner, which is what a root that
    never came would leave.
    """
    k, n, rank, eps = 64, 128, 8, 1e-9
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=generator(size)).double())[0] for size in (k, n))
    grad = ((left * torch.logspace(0, 2, rank, dtype=torch.float64)) @ right.mT).float()
    here = grad.to(part.device.torch)
    if bool(ROOTS["minimax"]((here @ here.mT)[None], eps)[1].any()):
        raise CheckError(f"minimax found a root at eps {eps:g}, so that none was retried")
    moved, failures = _last_of_three_steps(part, here, eps)
    wanted, _ = _last_of_three_steps(part, grad, eps)
    plain = -grad.double() * float(wanted.norm() / grad.norm())
    distance, without = (float((wanted - other).norm() / wanted.norm()) for other in (moved, plain))
    check(distance, without / 2, "the distance of the retried step from that of a CPU")
    return {"distance": distance, "without a preconditioner": without, "failures": failures}


def _last_of_three_steps(part: Part, grad: Tensor, eps: float) -> tuple[Tensor, Mapping[str, int]]:
    param = nn.Parameter(torch.zeros_like(grad))
    options: dict[str, Any] = {"lr": LR, "weight_decay": 0.0, "cross_normalize": False}
    optimizer = ASGO([{"params": [("weight", param)], "view": MATRIX}], eps=eps, root="minimax", **options)
    before = param.detach().clone()
    for _ in range(3):
        before.copy_(param.detach())
        param.grad = grad.clone()
        optimizer.step()
        part.device.synchronize()
    return (param.detach() - before).double().cpu(), optimizer.failures()
