"""The optimizers that can be trained and compared, by name.

All of them share one routing (`asgo.routing.route`): the named optimizer has the hidden matrices, AdamW has
embeddings, vectors and the output head. Peers are torch's own classes, not copies. A row's ``lr`` is the
default of ``--optimizer.lr``.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from asgo.lab.config import OptimizerConfig
from asgo.lab.errors import LabError
from asgo.presets import ASGO
from asgo.routing import route

Named = list[tuple[str, nn.Parameter]]
Build = Callable[[nn.Module, dict[str, Any], float], Optimizer]

_ADAMW_BETAS = (0.9, 0.95)
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
        about: what it is, and where it is from.
        routing: further options, which go to `asgo.route`.
    """

    build: Build
    constructor: Callable[..., Optimizer]
    lr: float
    adamw_lr: float | None
    weight_decay: float
    about: str
    routing: frozenset[str] = frozenset()


class Composite(Optimizer):
    """Several optimizers, each with its own parameters, as one.

    Groups are shared with the parts, so schedulers and gradient scaling work on the whole.

    Args:
        optimizers: the parts; together they should have every parameter once.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for part in self.optimizers for g in part.param_groups for p in g["params"]], {})
        self._share()

    def _share(self) -> None:
        self.param_groups = [group for part in self.optimizers for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The parts' state by parameter."""
        return {param: state for part in self.optimizers for param, state in part.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Nothing: torch's constructor assigns an empty state, and the parts keep their own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of every part; `closure`, if any, is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' state, in their order."""
        return {"optimizers": [part.state_dict() for part in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        for part, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            part.load_state_dict(state)
        self._share()


def split(model: nn.Module) -> tuple[Named, Named]:
    """The named hidden matrices of a model, and everything else, by the routing that ASGO uses."""
    groups = route(model)
    matrices = [pair for group in groups if group.get("view") is not None for pair in group["params"]]
    return matrices, [pair for group in groups if group.get("view") is None for pair in group["params"]]


def _asgo(constructor: Callable[..., Optimizer]) -> Build:
    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        groups = route(model, per_head=arguments.pop("per_head", False))
        for group in groups:
            if group.get("view") is None:
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


def _fused(named: Named) -> bool:
    return all(p.device.type in ("cpu", "cuda") for _, p in named)


# The learning rates of asgo, adamw and muon are those of the recorded search in benchmarks/shakespeare.
PEERS: dict[str, Peer] = {
    "asgo": Peer(_asgo(ASGO), ASGO, 1.4e-2, None, 0.1, "ASGO with this library's defaults", frozenset({"per_head"})),
    "asgo-paper": Peer(
        _asgo(ASGO.paper),
        ASGO.paper,
        1e-2,
        None,
        0.1,
        "ASGO's practical form (ASGO: Adaptive Structured Gradient Optimization, An et al., 2025)",
        frozenset({"per_head"}),
    ),
    "adamw": Peer(
        _adamw, AdamW, 5.7e-3, None, 0.1, "Decoupled Weight Decay Regularization, Loshchilov and Hutter, 2019"
    ),
    "muon": Peer(
        _beside_adamw(Muon, {"momentum": 0.95, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}),
        Muon,
        2e-2,
        None,
        0.1,
        "Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024",
    ),
    "sgd": Peer(
        _beside_adamw(SGD, {"momentum": 0.9, "nesterov": True}), SGD, 1e-1, 3e-3, 0.0, "SGD with Nesterov momentum"
    ),
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
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay} | parse_options(config)
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
    peer = PEERS[config.name]
    takes = set(inspect.signature(peer.constructor).parameters) | peer.routing
    if config.betas is not None and "betas" not in takes:
        raise LabError(f"optimizer {config.name} has no betas: leave --optimizer.betas out.")
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


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def failed_roots(optimizer: Optimizer) -> int:
    """How many inverse roots have failed so far (each keeps the last good one); 0 for optimizers without."""
    return sum(optimizer.failures().values()) if isinstance(optimizer, ASGO) else 0


def tensor_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors among `tensors`."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state, in all devices together."""
    return sum(tensor_bytes(state.values()) for state in optimizer.state.values())
