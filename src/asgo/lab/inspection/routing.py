"""What an optimizer does with each parameter of a model, without training it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import nn
from torch.optim import Optimizer

from asgo.diagnostics.reports import report, text_table
from asgo.lab.config.ranges import TOKENS, check_ranges
from asgo.lab.config.runs import ModelConfig, OptimizerConfig
from asgo.lab.models.language import build_model, count_parameters
from asgo.lab.optimizers.composite import Composite
from asgo.lab.optimizers.registry import build_optimizer, state_bytes
from asgo.lab.optimizers.rules import read_rules
from asgo.optimizer.step import structured
from asgo.views.patterns import label
from asgo.views.routing import Decision, explain


@dataclass(frozen=True)
class RoutingConfig:
    """Every parameter's shape, view, structure, state bytes and root cost.

    Args:
        model: the language model.
        optimizer: which optimizer, with which hyperparameters.
        vocab_size: number of tokens; 84 are the characters of Shakespeare.
        block_size: longest sequence, in tokens.
        why: show how the view of each parameter was found instead, and what is not known, whatever the optimizer.
        per_head: with `why`, read queries and keys as one matrix per head.
        rules: with `why`, a file of rules that come first.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    vocab_size: Annotated[int, TOKENS] = 84
    block_size: Annotated[int, TOKENS] = 128
    why: bool = False
    per_head: bool = False
    rules: str | None = None


def inspect_routing(config: RoutingConfig) -> str:
    """The routing of a model as text. No memory is needed for the model: its tensors are on the meta device."""
    check_ranges(config)
    with torch.device("meta"):
        model = build_model(config.model, config.vocab_size, config.block_size, seed=0)
        if config.why:
            return decisions_text(explain(model, read_rules(config.rules), config.per_head))
        optimizer = build_optimizer(model, config.optimizer)
        return routing_text(model, optimizer)


def decisions_text(decisions: Sequence[Decision]) -> str:
    """How the view of each parameter was found; a question mark where nothing tells what it is."""
    rows = [
        (each.name, str(each.shape), label(each.view), each.how if each.known else f"? {each.how}")
        for each in decisions
    ]
    unknown = sum(not each.known for each in decisions)
    note = (
        f"\n\n{unknown} of {len(rows)} parameters (?) are read by their axes: say what they are with a rule."
        if unknown
        else ""
    )
    return text_table([("name", "shape", "view", "found by"), *rows]) + note


def routing_text(model: nn.Module, optimizer: Optimizer) -> str:
    """Which parameter is stepped how: the library's own report, or for others class, rate and decay."""
    head = f"{type(model).__name__}, {count_parameters(model):,} parameters, {type(optimizer).__name__}"
    inside = structured(optimizer)
    if inside is not None:
        return f"{head}\n\n{report(inside)}"
    parts = optimizer.optimizers if isinstance(optimizer, Composite) else [optimizer]
    rows = [
        (name, str(tuple(param.shape)), type(part).__name__, f"{group['lr']:g}", f"{group['weight_decay']:g}")
        for part in parts
        for group in part.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    ]
    table = text_table([("name", "shape", "optimizer", "lr", "weight decay"), *rows])
    return f"{head}, {state_bytes(optimizer):,} bytes of state now\n\n{table}"
