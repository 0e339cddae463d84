"""The forms of ASGO's step that are checked and timed. A later form is one more row of `FORMS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from asgo import AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo
from asgo.linalg.inverse_root import ROOTS
from benchmarks.gpu.device import Device, Precision

Groups = list[dict[str, Any]]
Make = Callable[[Groups], Optimizer]
Layout = Literal["fused", "apart", "heads"]

LR = 1e-3
"""Of every step that is timed: small, so that the parameters stay as they are drawn."""


@dataclass(frozen=True)
class Form:
    """One row of `FORMS`.

    Args:
        name: of the row.
        make: the optimizer from groups with views.
        error: the largest relative error of the direction that the root may make, see `STATED`.
        products: how many ``k x k`` products a root takes; None where it takes no products.
        precision: of those products.
        layout: "fused": several matrices in one parameter stay there and are read through a view; "apart": each is a
            parameter; "heads": as "fused", with queries and keys by head.
        interval: steps between refreshes of a root.
        graph: whether the step is captured in a CUDA graph and replayed.
        waits: whether the host waits for the device, as an eigendecomposition makes it do.
    """

    name: str
    make: Make
    error: float
    products: int | None
    precision: Precision = "float32"
    layout: Layout = "fused"
    interval: int = 1
    graph: bool = False
    waits: bool = False


STATED: dict[str, float] = {name: root.error for name, root in ROOTS.items() if root.error is not None}
"""The largest relative error of a step by each root that states one, "minimax" as on devices without fast float64."""

EIGH_PRODUCTS = 2
"""Of inner length k, whose rounding an eigendecomposition and the product of its vectors are taken for."""

EPS: dict[str, float] = {name: max(1e-6, root.min_eps) for name, root in ROOTS.items()}
"""Damping with which a root is checked and timed."""


SQUARE_ROOT: dict[str, float] = {"bf16": 3e-2, "fp16": 6e-3}
"""The largest error of a singular value of the update in the simulation of `asgo.linalg.polar.PLANS`."""


def _asgo(**options: Any) -> Make:
    return lambda groups: ASGO(groups, lr=LR, **options)


def _root(name: str) -> Make:
    return _asgo(root=name, eps=EPS[name])


def _square_root(precision: str) -> Make:
    return _asgo(root="square_root", precision=precision)


_minimax = partial(Form, error=STATED["minimax"], products=21)

FORMS: tuple[Form, ...] = (
    _minimax("asgo", _root("minimax")),
    Form("fast", _root("minimax_fast"), STATED["minimax_fast"], 17),
    Form("bf16x3", _root("minimax_bf16x3"), STATED["minimax_bf16x3"], 21, "bfloat16"),
    Form("tf32", _root("minimax_tf32"), STATED["minimax_tf32"], 21, "tf32"),
    Form("square root", _square_root("auto"), SQUARE_ROOT["bf16"], 26, "bfloat16"),
    Form("square root fp16", _square_root("fp16"), SQUARE_ROOT["fp16"], 26, "float16"),
    Form("square root bf16", _square_root("bf16"), SQUARE_ROOT["bf16"], 26, "bfloat16"),
    Form("square root heads", _square_root("auto"), SQUARE_ROOT["bf16"], 26, "bfloat16", layout="heads"),
    Form(
        "square root graph", _asgo(root="square_root", capturable=True), SQUARE_ROOT["bf16"], 26, "bfloat16", graph=True
    ),
    Form("square root b2 0", _asgo(root="square_root", betas=(0.95, 0.0)), SQUARE_ROOT["bf16"], 16, "bfloat16"),
    _minimax("heads", _root("minimax"), layout="heads"),
    _minimax("apart", _root("minimax"), layout="apart"),
    _minimax("every second step", _root("minimax"), interval=2),
    _minimax("heads, every second step", _root("minimax"), layout="heads", interval=2),
    _minimax("packed", _asgo(root="minimax", packed_state=True)),
    _minimax("graph", _asgo(root="minimax", capturable=True), graph=True),
    Form("paper", lambda groups: ASGO.paper(groups, lr=LR), STATED["minimax"], None, waits=True),
    Form("auto", _root("auto"), STATED["minimax"], None, waits=True),
    Form("eigh", _root("eigh"), 0.0, None, waits=True),
    Form("eigh64", _root("eigh64"), 0.0, None, waits=True),
)
"""Every form, in the order of its importance where time is short. "auto" and "paper" may take either kind of root, so
whether they wait is measured. `error` of the eigendecompositions is rounding alone on the matrices of the step check,
whose eigenvalues lie within a factor of 9."""


def interval_of(form: Form, groups: Groups) -> Groups:
    """The groups with the form's interval between refreshes."""
    refreshed = {"precondition_frequency": form.interval}
    return [{**group, **(refreshed if group["view"] is not None else {})} for group in groups]


@dataclass(frozen=True)
class Preset:
    """One row of `PRESETS`.

    Args:
        name: of the row.
        make: the optimizer from groups, with a step of about 1 in weights of size 1.
        gain: how much more than the statistic's relative rounding error the direction may err, see `check_step`.
        square: whether only square matrices have statistics of full rank on every side it looks at.
        error: as in `Form`.
        products: as in `Form`, or those whose rounding the computation is taken for.
    """

    name: str
    make: Callable[..., Optimizer]
    gain: float = 9.0
    square: bool = False
    error: float = 0.0
    products: int = EIGH_PRODUCTS


PRESETS: tuple[Preset, ...] = (
    Preset("ASGO", partial(ASGO, lr=0.5), error=STATED["minimax"], products=21),
    Preset("ASGO.paper", partial(ASGO.paper, lr=0.5), error=STATED["minimax"], products=21),
    Preset("ASGO.theory", partial(ASGO.theory, lr=0.5)),
    Preset("ASGO.reference", partial(ASGO.reference, lr=0.5), products=40),
    Preset("DASGO", partial(DASGO, lr=0.5)),
    Preset("BAG", partial(BAG, lr=0.5)),
    Preset("BAGM", partial(BAGM, lr=0.5)),
    Preset("BAGM by rows", partial(BAGM, lr=0.5, blocks="row")),
    Preset("OneSidedShampoo", partial(OneSidedShampoo, lr=0.5)),
    Preset("Shampoo", partial(Shampoo, lr=0.5), square=True),
    Preset("Shampoo, packed", partial(Shampoo, lr=0.5, packed_state=True), square=True),
    Preset("AdaGram", partial(AdaGram, lr=0.5)),
    Preset("AdaGram, symmetric", partial(AdaGram, lr=0.5, direction="symmetric")),
    Preset("AdamMini", partial(AdamMini, lr=0.5)),
    Preset("AdaBlock", partial(AdaBlock, lr=0.5, eps=1e-2), gain=1e2),
    Preset("AGD", partial(AGD, lr=0.5)),
    Preset("SPAM around ASGO", lambda groups: SPAM(ASGO(groups, lr=0.5)), error=STATED["minimax"], products=21),
)
"""Every preset with its defaults. A run of ten entries of AdaBlock has a statistic of rank one, so eps, 1e-2 and
outside the root, is what its rounding error is divided by: a gain of 1e2 for gradients of at most 1."""


def unavailable(form: Form, device: Device) -> str | None:
    """Why a form cannot run here; None if it can."""
    if form.precision == "tf32" and device.is_cuda and torch.cuda.get_device_capability(device.torch)[0] < 8:
        return "the device has no TF32"
    return None
