"""An optimizer from its name and options: see the rows of `asgo.lab.optimizers.table`."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from asgo.lab.config.runs import OptimizerConfig
from asgo.lab.errors import LabError
from asgo.lab.optimizers.table import OPTIMIZERS
from asgo.optimizer.step import structured

_OWN_FLAGS = {"self", "params", "lr", "betas", "weight_decay"}


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
    if "weight_decay" in takes(config.name):
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
    known = takes(config.name)
    if config.betas is not None and "betas" not in known:
        raise LabError(f"optimizer {config.name} has no betas: leave --optimizer.betas out.")
    if config.weight_decay and "weight_decay" not in known:
        raise LabError(f"optimizer {config.name} has no weight decay: leave --optimizer.weight-decay out.")
    options = {}
    for entry in config.options:
        key, equals, value = entry.partition("=")
        if not equals:
            raise LabError(f"optimizer option {entry!r} is not key=value: write it as in nesterov=False.")
        if key not in known - _OWN_FLAGS:
            has = ", ".join(sorted(known - _OWN_FLAGS))
            raise LabError(f"optimizer {config.name} has no option {key!r}: it has {has}.")
        options[key] = _value(value)
    return options


def takes(name: str) -> set[str]:
    """The arguments that an optimizer takes: the constructor's and the routing's."""
    return set(inspect.signature(OPTIMIZERS[name].constructor).parameters) | OPTIMIZERS[name].routing


def _value(text: str) -> Any:
    """A Python value, or two numbers joined by ``/`` as a tuple; else the text."""
    first, _, second = text.partition("/")
    try:
        return float(first), float(second)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def failed_roots(optimizer: Optimizer) -> int:
    """How many inverse roots have failed so far (each keeps the last good one); 0 for optimizers without."""
    own = structured(optimizer)
    return 0 if own is None else sum(own.failures().values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of optimizer state, in all devices together."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
