"""The optimizers that can be trained and compared, by name.

All of them share one routing (`asgo.views.routing.route`): the named optimizer has the hidden matrices, AdamW has
embeddings, vectors and the output head. Muon, NorMuon, AdaMuon, SOAP and averaged Shampoo take ASGO's own step with
another preconditioner, so that they see the same matrices (queries, keys and values apart, experts apart), in the same
rescaling; `torch.optim.Muon` and classes of other packages see those matrices as parameters (`slices.Sliced`). A row's
``lr`` is the default of ``--optimizer.lr``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

from torch.optim import SGD, AdamW, Optimizer
from torch.optim import Muon as TorchMuon

from asgo import presets
from asgo.lab.optimizers.factories import (
    Factory,
    adam_mini,
    adamw,
    beside_adamw,
    by_route,
    installed,
    on_matrices,
    spam,
    spam_adamw,
)
from asgo.lab.optimizers.momenta import MomentaASGO
from asgo.lab.optimizers.muon import Muon
from asgo.lab.optimizers.soap import SOAP, AveragedShampoo
from asgo.presets import AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo

MUON_PAPER = (
    "Muon: An optimizer for hidden layers in neural networks (Jordan, Jin, Boza, You, Cesista, Newhouse, Bernstein)"
)
SOAP_PAPER = (
    "SOAP: Improving and Stabilizing Shampoo using Adam (Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, "
    "Kakade)"
)
AVERAGED_PAPER = (
    "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer (Shi, Lee, Iwasaki, "
    "Gallego-Posada, Li, Rangadurai, Mudigere, Rabbat)"
)
_ADAMUON = partial(Muon, second_moment="element", sign=True)
_TWO_SIDED_ASGO = partial(
    AveragedShampoo,
    betas=(0.95, 0.2),
    statistic="momentum",
    nesterov=True,
    cross_normalize=True,
    precondition_frequency=1,
)
TORCH_MUON = {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}

_ROUTING = frozenset({"per_head", "rules", "adamw_betas"})


@dataclass(frozen=True)
class OptimizerSpec:
    """One row of `OPTIMIZERS`.

    Args:
        about: what has the hidden matrices, as markdown.
        build: makes the optimizer from a model, the constructor's arguments and AdamW's learning rate.
        constructor: the callable that the arguments go to; its signature says which options exist.
        lr: default peak learning rate of the hidden matrices.
        paper: title and authors.
        year: of its first version.
        memory: numbers of state; ``d = m n``, k the shorter side and o the longer one, r a rank, s a block size.
        cost: leading term of the operations of a step; a root counts by its measured or known number of products.
        adamw_lr: default for everything else; None: the same as lr.
        weight_decay: default decoupled decay of the hidden matrices.
        routing: further options, which go to `asgo.route`.
    """

    about: str
    build: Factory
    constructor: Callable[..., Optimizer]
    lr: float
    paper: str
    year: int
    memory: str
    cost: str
    adamw_lr: float | None = None
    weight_decay: float = 0.1
    routing: frozenset[str] = frozenset()


def _preset(preset: type[Any], adamw_lr: float | None = None, weight_decay: float = 0.1) -> OptimizerSpec:
    """The row of a preset behind `asgo.route`, with what the class says of itself."""
    return OptimizerSpec(
        f"`{preset.__name__}`",
        by_route(preset),
        preset,
        adamw_lr=adamw_lr,
        weight_decay=weight_decay,
        routing=_ROUTING,
        **asdict(preset.info),
    )


# The learning rates of asgo, adamw and muon are from the recorded search in benchmarks/shakespeare. The rates of dasgo
# to agd are starting points: the best of three to eight on the tiny model, 250 steps of one seed, not recorded.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "asgo": replace(_preset(ASGO), about="`ASGO`, this library's defaults"),
    "asgo-paper": OptimizerSpec(
        "`ASGO.paper`",
        by_route(ASGO.paper),
        ASGO.paper,
        routing=_ROUTING,
        **asdict(replace(ASGO.info, lr=1e-2, memory="d + 2 k^2")),
    ),
    "dasgo": _preset(DASGO),
    "bag": _preset(BAG, adamw_lr=5e-3, weight_decay=0.0),
    "bagm": _preset(BAGM),
    "adagram": _preset(AdaGram, adamw_lr=5e-3, weight_decay=0.0),
    "one-sided-shampoo": _preset(OneSidedShampoo, adamw_lr=5e-3, weight_decay=0.0),
    "shampoo": _preset(Shampoo, adamw_lr=5e-3, weight_decay=0.0),
    "adablock": _preset(AdaBlock),
    "adam-mini": OptimizerSpec("`AdamMini`, of everything", adam_mini, AdamMini, **asdict(AdamMini.info)),
    "agd": _preset(AGD, adamw_lr=5e-3),
    "spam": OptimizerSpec("`SPAM` around AdamW", spam, spam_adamw, **asdict(SPAM.info)),
    "adamw": OptimizerSpec(
        "`torch.optim.AdamW`",
        adamw,
        AdamW,
        lr=5.7e-3,
        paper="Decoupled Weight Decay Regularization (Loshchilov, Hutter)",
        year=2017,
        memory="2 d",
        cost="4 d",
    ),
    "muon": OptimizerSpec(
        "`Muon` on ASGO's step",
        by_route(Muon),
        Muon,
        lr=2e-2,
        routing=_ROUTING,
        paper=MUON_PAPER,
        year=2024,
        memory="d",
        cost="20 d k + 10 k^3",
    ),
    "soap": OptimizerSpec(
        "`SOAP` on ASGO's step",
        by_route(SOAP),
        SOAP,
        lr=1e-2,
        routing=_ROUTING,
        paper=SOAP_PAPER,
        year=2024,
        memory="2 d + 2 m^2 + 2 n^2",
        cost="6 d (m + n) + (m^3 + n^3) / 10",
    ),
    "averaged-shampoo": OptimizerSpec(
        "`AveragedShampoo`",
        by_route(AveragedShampoo),
        AveragedShampoo,
        lr=1e-2,
        routing=_ROUTING,
        paper=AVERAGED_PAPER,
        year=2023,
        memory="d + 2 m^2 + 2 n^2",
        cost="4 d (m + n) + root (m^3 + n^3) / 10",
    ),
    "torch-muon": OptimizerSpec(
        "`torch.optim.Muon`, on ASGO's matrices",
        on_matrices(TorchMuon, TORCH_MUON),
        TorchMuon,
        lr=2e-2,
        paper=MUON_PAPER,
        year=2024,
        memory="d",
        cost="20 d k + 10 k^3",
    ),
    "sgd": OptimizerSpec(
        "`torch.optim.SGD` with Nesterov momentum",
        beside_adamw(SGD, {"momentum": 0.9, "nesterov": True}),
        SGD,
        lr=1e-1,
        adamw_lr=3e-3,
        weight_decay=0.0,
        paper="A method for solving the convex programming problem with convergence rate O(1/k^2) (Nesterov)",
        year=1983,
        memory="d",
        cost="0",
    ),
}


def _form(name: str, about: str, make: Callable[..., Optimizer], memory: str, cost: str = "") -> OptimizerSpec:
    """The row of `name` with other arguments."""
    spec = OPTIMIZERS[name]
    return replace(spec, about=about, build=by_route(make), constructor=make, memory=memory, cost=cost or spec.cost)


OPTIMIZERS |= {
    "normuon": replace(
        _form("muon", "`Muon(second_moment='row')`", partial(Muon, second_moment="row"), "d + m"),
        paper="NorMuon: Making Muon more efficient and scalable (Li, Liu, Liang, Zheng, Zhao)",
        year=2025,
    ),
    "adamuon": replace(
        _form("muon", "`Muon(second_moment='element', sign=True)`", _ADAMUON, "2 d"),
        paper="AdaMuon: Adaptive Muon Optimizer (Si, Zhang, Shen)",
        year=2025,
    ),
    "one-sided-soap": _form(
        "soap", "`SOAP(sides='short')`", partial(SOAP, sides="short"), "2 d + 2 k^2", "6 d k + k^3 / 10"
    ),
    "averaged-one-sided-shampoo": _form(
        "averaged-shampoo",
        "`AveragedShampoo(sides='short')`",
        partial(AveragedShampoo, sides="short"),
        "d + 2 k^2",
        "4 d k + root k^3 / 10",
    ),
    "momenta-asgo": _form(
        "asgo", "`MomentaASGO`: the mean of three momenta of different length", MomentaASGO, "4 d + 2 k^2 + 2 o"
    ),
    "two-sided-asgo": replace(
        _form(
            "averaged-shampoo",
            "`AveragedShampoo` with ASGO's statistic of the momentum, betas and second moment of the other side",
            _TWO_SIDED_ASGO,
            "d + 2 m^2 + 2 n^2",
            "4 d (m + n) + root (m^3 + n^3)",
        ),
        lr=1.4e-2,
    ),
    "torch-muon-fused": replace(
        OPTIMIZERS["torch-muon"],
        about="`torch.optim.Muon`, on whole parameters: fused queries, keys and values are one matrix",
        build=beside_adamw(TorchMuon, TORCH_MUON),
    ),
}


def _default_row(preset: type[Any]) -> OptimizerSpec:
    """The row of a preset that has none above: one learning rate for all, and the constructor's weight decay."""
    decay = signature(preset).parameters.get("weight_decay")
    return _preset(preset, None, 0.0 if decay is None else decay.default)


_MADE = {spec.constructor for spec in OPTIMIZERS.values()}
OPTIMIZERS |= {
    name.lower(): _default_row(preset)
    for name in presets.__all__
    if (preset := getattr(presets, name)) not in {*_MADE, SPAM} and name.lower() not in OPTIMIZERS
}
EXTERNAL = {"hb-soap": "heavyball", "po-soap": "pytorch_optimizer"}
"""Rows that there are where these modules are installed."""

for _name, _module in EXTERNAL.items():
    if find_spec(_module) is not None:
        _make = installed(_module, "SOAP")
        OPTIMIZERS[_name] = replace(
            OPTIMIZERS["soap"],
            about=f"`{_module}.SOAP`, on ASGO's matrices",
            build=on_matrices(_make),
            constructor=_make,
            lr=2e-3,  # their updates have a root mean square of about 1
            adamw_lr=OPTIMIZERS["adamw"].lr,
            routing=frozenset(),
        )
