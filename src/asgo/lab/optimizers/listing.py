"""What optimizers there are: their papers, and what they cost on a given model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.optim import SGD, Muon, Optimizer

from asgo.diagnostics.reports import report, text_table
from asgo.lab.config.ranges import TOKENS, check_ranges
from asgo.lab.config.runs import ModelConfig, OptimizerConfig
from asgo.lab.models.language import build_model, count_parameters
from asgo.lab.optimizers.composite import Composite
from asgo.lab.optimizers.registry import OPTIMIZERS, build_optimizer, state_bytes
from asgo.lab.optimizers.slices import Sliced
from asgo.optimizer.param_groups import with_views
from asgo.optimizer.step import StructuredOptimizer, structured
from asgo.structures import Structure
from asgo.views import View

ENTRYWISE = 2.0
"""Multiplications per entry of a method with one number per entry: a square and a quotient."""
MUON_STEPS = 5
"""Newton-Schulz steps of `torch.optim.Muon`, each of three products."""
ABOUT = """\
Memory and cost are of one matrix of m x n, with d = m n, sides k <= o, rank r and block size s. State bytes and
operations are of the whole model with the optimizer's defaults, on a CPU. Operations leave out momentum, decay
and addition to the weights, which all have. Vectors, embeddings and output head are on AdamW in all but adam-mini."""


@dataclass(frozen=True)
class OptimizersConfig:
    """List the optimizers with paper, year, memory and cost per step on a model.

    Args:
        model: the language model.
        vocab_size: number of tokens; 84 are the characters of Shakespeare.
        block_size: longest sequence, in tokens.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    vocab_size: Annotated[int, TOKENS] = 84
    block_size: Annotated[int, TOKENS] = 128


def list_optimizers(config: OptimizersConfig) -> str:
    """The table of all optimizers as text. No memory is needed for the model: its tensors are on the meta device.

    Raises:
        LabError: for a model that does not exist, or sizes that do not fit.
    """
    check_ranges(config)
    head = ("name", "year", "memory", "state bytes", "cost", "operations", "paper")
    rows = [_row(name, _model(config)) for name in OPTIMIZERS]
    model = _model(config)
    return f"{type(model).__name__}, {count_parameters(model):,} parameters\n\n{text_table([head, *rows])}\n\n{ABOUT}"


def _model(config: OptimizersConfig) -> nn.Module:
    with torch.device("meta"):
        return build_model(config.model, config.vocab_size, config.block_size, seed=0)


def _row(name: str, model: nn.Module) -> tuple[str, ...]:
    spec, optimizer = OPTIMIZERS[name], build_optimizer(model, OptimizerConfig(name=name))
    size, work = f"{held_bytes(optimizer, model):,}", f"{operations(optimizer):.3g}"
    return name, str(spec.year), spec.memory, size, spec.cost, work, spec.paper


def held_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Bytes of the state after a step. Those of torch make it in the first step, so one is taken, with no values."""
    if structured(optimizer) is None:
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    return state_bytes(optimizer)


def operations(optimizer: Optimizer) -> float:
    """Operations of one step: two for each multiplication of statistics, roots and directions."""
    if isinstance(optimizer, Composite):
        return sum(operations(part) for part in optimizer.optimizers)
    own = structured(optimizer)
    if own is not None:
        return _structured(own) + 2 * ENTRYWISE * len(own.step_hooks) * _entries(own)
    if isinstance(optimizer, Sliced):
        return operations(optimizer.inner)
    if isinstance(optimizer, Muon):
        shapes = [sorted(param.shape) for group in optimizer.param_groups for param in group["params"]]
        return sum(2.0 * MUON_STEPS * (2 * k * k * o + k**3) for k, o in shapes)
    return 0.0 if isinstance(optimizer, SGD) else 2 * ENTRYWISE * _entries(optimizer)


def _entries(optimizer: Optimizer) -> int:
    return sum(param.numel() for group in optimizer.param_groups for param in group["params"])


def _structured(optimizer: StructuredOptimizer) -> float:
    roots = iter(report(optimizer).rows)
    total = 0.0
    for group in optimizer.param_groups:
        structure = optimizer.structure(group)
        for param, view in with_views(group):
            refresh = next(roots).root_flops / group.get("precondition_frequency", 1)
            total += refresh + 2 * _work(structure, view, param)
    return total


def _work(structure: Structure, view: View | None, param: Tensor) -> float:
    if view is None:
        return ENTRYWISE * param.numel()
    return sum(b * structure.step_flops(m, n) for b, m, n in view.shapes(param.shape))
