"""The optimizers that can be trained and compared, by name.

All of them share one routing (`asgo.views.routing.route`): the named optimizer has the hidden matrices, AdamW has
embeddings, vectors and the output head. Peers are torch's own classes, not copies. A row's ``lr`` is the
All of them share one routing (`asgo.routing.route`): the named optimizer has the hidden matrices, AdamW has
embeddings, vectors and the output head. Those of torch are torch's own classes, not copies. A row's ``lr`` is the
default of ``--optimizer.lr``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from asgo.lab.config.runs import OptimizerConfig
from asgo.lab.errors import LabError
from asgo.lab.optimizers.factories import Factory, adam_mini, adamw, beside_adamw, by_route, spam, spam_adamw
from asgo.optimizer.step import structured
from asgo.presets import AGD, ASGO, BAG, BAGM, DASGO, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo

ASGO_PAPER = "ASGO: Adaptive Structured Gradient Optimization (An, Liu, Pan, Ren, Ma, Goldfarb, Zhang)"
BAG_PAPER = "Blockwise Adaptivity: Faster Training and Better Generalization in Deep Learning (Zheng, Kwok)"

_ROUTING = frozenset({"per_head", "rules"})
_OWN_FLAGS = {"self", "params", "lr", "betas", "weight_decay"}


@dataclass(frozen=True)
class OptimizerSpec:
    """One row of `OPTIMIZERS`.

    Args:
        about: what has the hidden matrices, as markdown.
        build: makes the optimizer from a model, the constructor's arguments and AdamW's learning rate.
        constructor: the callable that the arguments go to; its signature says which options exist.
        lr: default peak learning rate of the hidden matrices.
        adamw_lr: default for everything else; None: the same as lr.
        weight_decay: default decoupled decay of the hidden matrices.
        paper: title and authors.
        year: of its first version.
        memory: numbers of state; ``d = m n``, k the shorter side and o the longer one, r a rank, s a block size.
        cost: leading term of the operations of a step; a root counts by its measured or known number of products.
        routing: further options, which go to `asgo.route`.
    """

    about: str
    build: Factory
    constructor: Callable[..., Optimizer]
    lr: float
    adamw_lr: float | None
    weight_decay: float
    paper: str
    year: int
    memory: str
    cost: str
    routing: frozenset[str] = frozenset()


# The learning rates of asgo, adamw and muon are those of the recorded search in benchmarks/shakespeare. Those of dasgo
# to agd are starting points: the best of three to eight on the tiny model, 250 steps of one seed, not recorded.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "asgo": OptimizerSpec(
        "`ASGO`, this library's defaults",
        by_route(ASGO),
        ASGO,
        lr=1.4e-2,
        adamw_lr=None,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=ASGO_PAPER,
        year=2025,
        memory="d + 2 k^2 + 2 o",
        cost="4 d k + root k^3",
    ),
    "asgo-paper": OptimizerSpec(
        "`ASGO.paper`",
        by_route(ASGO.paper),
        ASGO.paper,
        lr=1e-2,
        adamw_lr=None,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=ASGO_PAPER,
        year=2025,
        memory="d + 2 k^2",
        cost="4 d k + root k^3",
    ),
    "dasgo": OptimizerSpec(
        "`DASGO`",
        by_route(DASGO),
        DASGO,
        lr=5e-3,
        adamw_lr=None,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=ASGO_PAPER,
        year=2025,
        memory="d + n",
        cost="4 d",
    ),
    "bag": OptimizerSpec(
        "`BAG`",
        by_route(BAG),
        BAG,
        lr=1e-2,
        adamw_lr=5e-3,
        weight_decay=0.0,
        routing=_ROUTING,
        paper=BAG_PAPER,
        year=2019,
        memory="d + blocks",
        cost="4 d",
    ),
    "bagm": OptimizerSpec(
        "`BAGM`",
        by_route(BAGM),
        BAGM,
        lr=5e-3,
        adamw_lr=None,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=BAG_PAPER,
        year=2019,
        memory="d + blocks",
        cost="4 d",
    ),
    "adagram": OptimizerSpec(
        "`AdaGram`",
        by_route(AdaGram),
        AdaGram,
        lr=3e-1,
        adamw_lr=5e-3,
        weight_decay=0.0,
        routing=_ROUTING,
        paper=(
            "Dynamic Low-rank Approximation of Full-Matrix Preconditioner for Training Generalized Linear "
            "Models (Matveeva, Katrutsa, Frolov)"
        ),
        year=2025,
        memory="d (2 r + 2)",
        cost="16 d r^2",
    ),
    "one-sided-shampoo": OptimizerSpec(
        "`OneSidedShampoo`",
        by_route(OneSidedShampoo),
        OneSidedShampoo,
        lr=5e-2,
        adamw_lr=5e-3,
        weight_decay=0.0,
        routing=_ROUTING,
        paper=("Structured Preconditioners in Adaptive Optimization: A Unified Analysis (Xie, Wang, Reddi, Kumar, Li)"),
        year=2025,
        memory="d + 2 k^2",
        cost="4 d k + root k^3",
    ),
    "shampoo": OptimizerSpec(
        "`Shampoo`",
        by_route(Shampoo),
        Shampoo,
        lr=1.0,
        adamw_lr=5e-3,
        weight_decay=0.0,
        routing=_ROUTING,
        paper="Shampoo: Preconditioned Stochastic Tensor Optimization (Gupta, Koren, Singer)",
        year=2018,
        memory="d + 2 m^2 + 2 n^2",
        cost="4 d (m + n) + root m^3 + n^3",
    ),
    "adablock": OptimizerSpec(
        "`AdaBlock`",
        by_route(AdaBlock),
        AdaBlock,
        lr=1e-2,
        adamw_lr=None,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=("AdaBlock: SGD with Practical Block Diagonal Matrix Adaptation for Deep Learning (Yun, Lozano, Yang)"),
        year=2019,
        memory="d (1 + 2 s)",
        cost="4 d s + root d s^2",
    ),
    "adam-mini": OptimizerSpec(
        "`AdamMini`, of everything",
        adam_mini,
        AdamMini,
        lr=7e-3,
        adamw_lr=None,
        weight_decay=0.1,
        paper="Adam-mini: Use Fewer Learning Rates To Gain More (Zhang, Chen, Li, Ding, Wu, Kingma, Ye, Luo, Sun)",
        year=2024,
        memory="d + blocks",
        cost="4 d",
    ),
    "agd": OptimizerSpec(
        "`AGD`",
        by_route(AGD),
        AGD,
        lr=6e-4,
        adamw_lr=5e-3,
        weight_decay=0.1,
        routing=_ROUTING,
        paper=(
            "AGD: an Auto-switchable Optimizer using Stepwise Gradient Difference for Preconditioning Matrix"
            " (Yue, Ye, Jiang, Liu, Zhang)"
        ),
        year=2023,
        memory="3 d",
        cost="8 d",
    ),
    "spam": OptimizerSpec(
        "`SPAM` around AdamW",
        spam,
        spam_adamw,
        lr=5.7e-3,
        adamw_lr=None,
        weight_decay=0.1,
        paper=("SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training (Huang, Zhu, Jin, Liu, Wang, Liu)"),
        year=2025,
        memory="3 d",
        cost="8 d",
    ),
    "adamw": OptimizerSpec(
        "`torch.optim.AdamW`",
        adamw,
        AdamW,
        lr=5.7e-3,
        adamw_lr=None,
        weight_decay=0.1,
        paper="Decoupled Weight Decay Regularization (Loshchilov, Hutter)",
        year=2017,
        memory="2 d",
        cost="4 d",
    ),
    "muon": OptimizerSpec(
        "`torch.optim.Muon`",
        beside_adamw(Muon, {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}),
        Muon,
        lr=2e-2,
        adamw_lr=None,
        weight_decay=0.1,
        paper="Muon: An optimizer for hidden layers in neural networks (Jordan, Jin, Boza, You, Cesista, Newhouse, "
        "Bernstein)",
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


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """The config with the recorded defaults in place of None (betas stay None: the constructor's own).

    Raises:
        LabError: for an optimizer that does not exist.
    """
    if config.name not in OPTIMIZERS:
        raise LabError(f"optimizer {config.name!r} does not exist: choose from {', '.join(OPTIMIZERS)}.")
    spec = OPTIMIZERS[config.name]
    lr = spec.lr if config.lr is None else config.lr
    adamw_lr = (lr if spec.adamw_lr is None else spec.adamw_lr) if config.adamw_lr is None else config.adamw_lr
    weight_decay = spec.weight_decay if config.weight_decay is None else config.weight_decay
    return replace(config, lr=lr, adamw_lr=adamw_lr, weight_decay=weight_decay)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The named optimizer over all trainable parameters of `model`.

    Raises:
        LabError: for an unknown name or option, or a value that the optimizer refuses.
    """
    config = resolve(config)
    arguments: dict[str, Any] = {"lr": config.lr} | parse_options(config)
    if "weight_decay" in _takes(config.name):
        arguments["weight_decay"] = config.weight_decay
    if config.betas is not None:
        arguments["betas"] = tuple(config.betas)
    try:
        return OPTIMIZERS[config.name].build(model, arguments, float(config.adamw_lr or 0.0))
    except (ValueError, TypeError) as error:
        raise LabError(f"optimizer {config.name}: {error}") from error


def parse_options(config: OptimizerConfig) -> dict[str, Any]:
    """The constructor arguments in `config.options`, as Python values.

    Raises:
        LabError: for an entry that is not key=value, or a key that the optimizer does not have.
    """
    takes = _takes(config.name)
    if config.betas is not None and "betas" not in takes:
        raise LabError(f"optimizer {config.name} has no betas: leave --optimizer.betas out.")
    if config.weight_decay and "weight_decay" not in takes:
        raise LabError(f"optimizer {config.name} has no weight decay: leave --optimizer.weight-decay out.")
    options = {}
    for entry in config.options:
        key, equals, value = entry.partition("=")
        if not equals:
            raise LabError(f"optimizer option {entry!r} is not key=value: write it as in nesterov=False.")
        if key not in takes - _OWN_FLAGS:
            known = ", ".join(sorted(takes - _OWN_FLAGS))
            raise LabError(f"optimizer {config.name} has no option {key!r}: it has {known}.")
        options[key] = _value(value)
    return options


def _takes(name: str) -> set[str]:
    return set(inspect.signature(OPTIMIZERS[name].constructor).parameters) | OPTIMIZERS[name].routing


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def failed_roots(optimizer: Optimizer) -> int:
    """How many inverse roots have failed so far (each keeps the last good one); 0 for optimizers without."""
    own = structured(optimizer)
    return 0 if own is None else sum(own.failures().values())


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state, in all devices together."""
    return sum(tensor_bytes(state.values()) for state in optimizer.state.values())
