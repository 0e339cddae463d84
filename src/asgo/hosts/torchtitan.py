"""torchtitan: ``default_asgo(lr=1e-2)`` in place of ``default_adamw``, or groups with ``optimizer_name="asgo"``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asgo.diagnostics.reports import report
from asgo.hosts.common import BY_NAME, needed, optimizer_named
from asgo.optimizer.step import StructuredOptimizer
from asgo.views.routing import route

titan = needed("torchtitan.components.optimizer", extra="torchtitan")
logging = needed("torchtitan.tools.logging", extra="torchtitan")


class OptimizersContainer(titan.OptimizersContainer):
    """torchtitan's container, which knows the optimizers of this library by their names in lower case too.

    Every parameter has the view that `asgo.route` gives it, unless the options of its group say otherwise (``view``).
    `asgo.report` goes to torchtitan's log.
    Checkpoints are torchtitan's own: its flat, name-keyed form.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """The fields of torchtitan's own ``Config``; it builds this class."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name in ("Adam", "AdamW", "DistMuon"):
            return titan.OptimizersContainer._resolve_optimizer_factory(name)
        return optimizer_named(name)

    @staticmethod
    def _build_param_groups(model: nn.Module, param_group_configs: Any, impl_kwargs: Any) -> Any:
        groups, patterns = titan.OptimizersContainer._build_param_groups(model, param_group_configs, impl_kwargs)
        views = {
            param: view
            for group in route(model)
            for (_, param), view in zip(group["params"], group["views"], strict=True)
        }
        for name, alike in groups.items():
            for group in alike if name in BY_NAME else ():
                if "view" not in group:
                    group["views"] = [views[param] for param in group["params"]]
        return groups, patterns

    def _log_optimizer(self, optimizer: Optimizer, part_idx: int, patterns: list[str]) -> None:
        super()._log_optimizer(optimizer, part_idx, patterns)
        if isinstance(optimizer, StructuredOptimizer):
            logging.logger.info(f"\n{report(optimizer)}")


def default_asgo(lr: float = 1e-2, **options: Any) -> OptimizersContainer.Config:
    """One group of all parameters for `ASGO`, as torchtitan's ``default_adamw`` is for AdamW.

    Args:
        lr: of the peak; the default of `ASGO`.
        options: of `ASGO`.
    """
    group = titan.ParamGroupConfig(pattern=".*", optimizer_name="asgo", optimizer_kwargs={"lr": lr, **options})
    return OptimizersContainer.Config(param_groups=[group])
