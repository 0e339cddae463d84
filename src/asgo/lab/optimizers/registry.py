"""The optimizers that can be trained and compared, by name.

All of them share one routing (`asgo.views.route.route`): the named optimizer has the hidden matrices, AdamW has
embeddings, vectors and the output head. Peers are torch's own classes, not copies. A row's ``lr`` is the
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
from asgo.lab.optimizers.composite import Composite
from asgo.lab.optimizers.rules import read_rules
from asgo.optimizer import StructuredOptimizer
from asgo.param_groups import with_views
from asgo.presets import AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo
from asgo.views.route import route

Named = list[tuple[str, nn.Parameter]]
Build = Callable[[nn.Module, dict[str, Any], float], Optimizer]

_ADAMW_BETAS = (0.9, 0.95)
_ROUTING = frozenset({"per_head", "rules"})
_OWN_FLAGS = {"self", "params", "lr", "betas", "weight_decay"}


@dataclass(frozen=True)
class Peer:
    """One row of `PEERS`.

    Args:
        build: makes the optimizer from a model, the constructor's arguments and AdamW's learning rate.
        constructor: the callable that the arguments go to; its signature says which options exist.
        lr: default peak learning rate of the hidden matrices.
        adamw_lr: default for everything else; None: the same as lr.
        weight_decay: default decoupled decay of the hidden matrices.
        routing: further options, which go to `asgo.route`.
    """

    build: Build
    constructor: Callable[..., Optimizer]
    lr: float
    adamw_lr: float | None
    weight_decay: float
    routing: frozenset[str] = frozenset()


def split(model: nn.Module) -> tuple[Named, Named]:
    """The named hidden matrices of a model, and everything else, by the routing that ASGO uses."""
    groups = route(model)
    pairs = [pair for group in groups for pair in with_views(group)]
    return [named for named, view in pairs if view is not None], [named for named, view in pairs if view is None]


def _asgo(constructor: Callable[..., Optimizer]) -> Build:
    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        rules = read_rules(arguments.pop("rules", None))
        groups = route(model, rules, arguments.pop("per_head", False))
        for group in groups:
            if not any(group["views"]):
                group["lr"] = adamw_lr
        return constructor(groups, **arguments)

    return build


def _adamw(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    matrices, rest = split(model)
    groups = [{"params": matrices}, {"params": rest, "lr": adamw_lr, "weight_decay": 0.0}]
    defaults = {"betas": _ADAMW_BETAS, "fused": _fused(rest)}
    return AdamW([group for group in groups if group["params"]], **(defaults | arguments))


def _beside_adamw(constructor: Callable[..., Optimizer], defaults: dict[str, Any]) -> Build:
    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        matrices, rest = split(model)
        vectors = {"lr": adamw_lr, "betas": _ADAMW_BETAS, "weight_decay": 0.0, "fused": _fused(rest)}
        parts = [(constructor, matrices, defaults | arguments), (AdamW, rest, vectors)]
        return Composite([make(named, **settings) for make, named, settings in parts if named])

    return build


def _adam_mini(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    groups = AdamMini.groups(model)
    for group in groups:
        if group["name"] == "rows":
            group["lr"] = adamw_lr
    return AdamMini(groups, **arguments)


def _spam(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    matrices, rest = split(model)
    groups = [{"params": matrices}, {"params": rest, "lr": adamw_lr, "weight_decay": 0.0}]
    return _spam_adamw([group for group in groups if group["params"]], **arguments)


def _spam_adamw(
    params: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = _ADAMW_BETAS,
    weight_decay: float = 0.1,
    threshold: float = 5000.0,
    interval: int = 500,
    warmup: int = 150,
) -> SPAM:
    """SPAM as in its paper, around AdamW: groups without a view."""
    adamw = {"view": None, "lr": lr, "betas": betas, "weight_decay": weight_decay}
    return SPAM(ASGO([{**adamw, **group} for group in params]), threshold, interval, warmup)


def _fused(named: Named) -> bool:
    return all(p.device.type in ("cpu", "cuda") for _, p in named)


# The learning rates of asgo, adamw and muon are those of the recorded search in benchmarks/shakespeare. Those of dasgo
# to agd are starting points: the best of three to eight on the tiny model, 250 steps of one seed, not recorded.
PEERS: dict[str, Peer] = {
    "asgo": Peer(_asgo(ASGO), ASGO, 1.4e-2, None, 0.1, _ROUTING),
    "asgo-paper": Peer(_asgo(ASGO.paper), ASGO.paper, 1e-2, None, 0.1, _ROUTING),
    "dasgo": Peer(_asgo(DASGO), DASGO, 5e-3, None, 0.1, _ROUTING),
    "bag": Peer(_asgo(BAG), BAG, 1e-2, 5e-3, 0.0, _ROUTING),
    "bagm": Peer(_asgo(BAGM), BAGM, 5e-3, None, 0.1, _ROUTING),
    "adagram": Peer(_asgo(AdaGram), AdaGram, 3e-1, 5e-3, 0.0, _ROUTING),
    "one-sided-shampoo": Peer(_asgo(OneSidedShampoo), OneSidedShampoo, 5e-2, 5e-3, 0.0, _ROUTING),
    "shampoo": Peer(_asgo(Shampoo), Shampoo, 1.0, 5e-3, 0.0, _ROUTING),
    "adablock": Peer(_asgo(AdaBlock), AdaBlock, 1e-2, None, 0.1, _ROUTING),
    "adam-mini": Peer(_adam_mini, AdamMini, 7e-3, None, 0.1),
    "agd": Peer(_asgo(AGD), AGD, 6e-4, 5e-3, 0.1, _ROUTING),
    "spam": Peer(_spam, _spam_adamw, 5.7e-3, None, 0.1),
    "adamw": Peer(_adamw, AdamW, 5.7e-3, None, 0.1),
    "muon": Peer(
        _beside_adamw(Muon, {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}),
        Muon,
        2e-2,
        None,
        0.1,
    ),
    "sgd": Peer(_beside_adamw(SGD, {"momentum": 0.9, "nesterov": True}), SGD, 1e-1, 3e-3, 0.0),
}


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """The config with the recorded defaults in place of None (betas stay None: the constructor's own).

    Raises:
        LabError: for an optimizer that does not exist.
    """
    if config.name not in PEERS:
        raise LabError(f"optimizer {config.name!r} does not exist: choose from {', '.join(PEERS)}.")
    peer = PEERS[config.name]
    lr = peer.lr if config.lr is None else config.lr
    adamw_lr = (lr if peer.adamw_lr is None else peer.adamw_lr) if config.adamw_lr is None else config.adamw_lr
    weight_decay = peer.weight_decay if config.weight_decay is None else config.weight_decay
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
        return PEERS[config.name].build(model, arguments, float(config.adamw_lr or 0.0))
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
    return set(inspect.signature(PEERS[name].constructor).parameters) | PEERS[name].routing


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def failed_roots(optimizer: Optimizer) -> int:
    """How many inverse roots have failed so far (each keeps the last good one); 0 for optimizers without."""
    return sum(optimizer.failures().values()) if isinstance(optimizer, (StructuredOptimizer, SPAM)) else 0


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state, in all devices together."""
    return sum(tensor_bytes(state.values()) for state in optimizer.state.values())
