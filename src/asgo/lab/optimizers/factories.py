"""How each optimizer is built from a model: it has the hidden matrices, AdamW has everything else."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

from torch import nn
from torch.optim import AdamW, Optimizer

from asgo.lab.optimizers.composite import Composite
from asgo.lab.optimizers.rules import read_rules
from asgo.lab.optimizers.slices import Sliced
from asgo.optimizer.param_groups import with_views
from asgo.presets import ASGO, SPAM, AdamMini
from asgo.views.routing import route

Named: TypeAlias = list[tuple[str, nn.Parameter]]
Factory: TypeAlias = Callable[[nn.Module, dict[str, Any], float], Optimizer]
"""From a model, the arguments of the constructor, and AdamW's learning rate."""

ADAMW_BETAS = (0.9, 0.95)


def split(model: nn.Module) -> tuple[Named, Named]:
    """The named hidden matrices of a model, and everything else, by the routing that ASGO uses."""
    pairs = [pair for group in route(model) for pair in with_views(group)]
    return [named for named, view in pairs if view is not None], [named for named, view in pairs if view is None]


def by_route(constructor: Callable[..., Optimizer]) -> Factory:
    """An optimizer with structures: groups of `asgo.route`, those without a view at AdamW's learning rate.

    Arguments of the routing: ``rules``, ``per_head``, and ``adamw_betas`` of those without a view.
    """

    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        rules, betas = read_rules(arguments.pop("rules", None)), arguments.pop("adamw_betas", None)
        own = {"lr": adamw_lr} | ({} if betas is None else {"betas": betas})
        groups = route(model, rules, arguments.pop("per_head", False))
        for group in groups:
            if not any(group["views"]):
                group.update(own)
        return constructor(groups, **arguments)

    return build


def adamw(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    """AdamW for everything, without weight decay outside the hidden matrices."""
    matrices, rest = split(model)
    groups = [{"params": matrices}, {"params": rest, "lr": adamw_lr, "weight_decay": 0.0}]
    defaults = {"betas": ADAMW_BETAS, "fused": is_fusable(rest)}
    return AdamW([group for group in groups if group["params"]], **(defaults | arguments))


def beside_adamw(constructor: Callable[..., Optimizer], defaults: dict[str, Any]) -> Factory:
    """An optimizer of torch for the hidden matrices, AdamW for the rest, as one."""

    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        matrices, rest = split(model)
        vectors = {"lr": adamw_lr, "betas": ADAMW_BETAS, "weight_decay": 0.0, "fused": is_fusable(rest)}
        parts = [(constructor, matrices, defaults | arguments), (AdamW, rest, vectors)]
        return Composite([make(named, **settings) for make, named, settings in parts if named])

    return build


def on_matrices(make: Callable[..., Optimizer], defaults: dict[str, Any] | None = None) -> Factory:
    """Another library's optimizer for the matrices that ASGO sees, each a parameter of its own; AdamW for the rest."""

    def build(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
        pairs = [pair for group in route(model) for pair in with_views(group)]
        viewed = [pair for pair in pairs if pair[1] is not None]
        rest = [named for named, view in pairs if view is None]
        settings = (defaults or {}) | arguments
        parts: list[Optimizer] = []
        if viewed:
            named, views = zip(*viewed, strict=True)
            parts.append(Sliced(lambda matrices: make(matrices, **settings), named, views))
        if rest:
            parts.append(AdamW(rest, adamw_lr, ADAMW_BETAS, weight_decay=0.0, fused=is_fusable(rest)))
        return Composite(parts)

    return build


def installed(module: str, name: str) -> Callable[..., Optimizer]:
    """A class of another package, imported when it is built."""

    def make(
        named: Named,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.1,
        precondition_frequency: int = 10,
    ) -> Optimizer:
        kind = getattr(import_module(module), name)
        if module == "heavyball":  # it would compile and autotune for minutes, with the same results
            import_module("heavyball.utils").compile_mode = None  # pyright: ignore[reportAttributeAccessIssue]
        params = [param for _, param in named]
        made = kind(
            params, lr=lr, betas=betas, weight_decay=weight_decay, precondition_frequency=precondition_frequency
        )
        made.param_groups[0]["param_names"] = [name for name, _ in named]
        return made

    return make


def adam_mini(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    """Adam-mini for everything, with its own groups."""
    groups = AdamMini.groups(model)
    for group in groups:
        if group["name"] == "rows":
            group["lr"] = adamw_lr
    return AdamMini(groups, **arguments)


def spam(model: nn.Module, arguments: dict[str, Any], adamw_lr: float) -> Optimizer:
    """SPAM around AdamW for everything."""
    matrices, rest = split(model)
    groups = [{"params": matrices}, {"params": rest, "lr": adamw_lr, "weight_decay": 0.0}]
    return spam_adamw([group for group in groups if group["params"]], **arguments)


def spam_adamw(
    params: list[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = ADAMW_BETAS,
    weight_decay: float = 0.1,
    threshold: float = 5000.0,
    interval: int = 500,
    warmup: int = 150,
) -> SPAM:
    """SPAM as in its paper, around AdamW: groups without a view."""
    adamw = {"view": None, "lr": lr, "betas": betas, "weight_decay": weight_decay}
    return SPAM(ASGO([{**adamw, **group} for group in params]), threshold, interval, warmup)


def is_fusable(named: Named) -> bool:
    """Whether the fused AdamW runs where these parameters are."""
    return all(p.device.type in ("cpu", "cuda") for _, p in named)
