"""Parameters and gradients with the shapes of real models, without the models.

The models of `transformers` are built on the meta device, which needs no memory, and routed there; only then
do the parameters come to be, with random values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from asgo.lab.models.architectures import GPT2_BLOCK, GPT2_VOCABULARY, PRESETS, PUBLISHED, Shape, build, resnet
from asgo.optimizer.param_groups import with_views
from asgo.views.routing import route

Named: TypeAlias = tuple[str, nn.Parameter]
Group: TypeAlias = dict[str, Any]

RANK, SIGNAL, NOISE, RMS = 16, 0.8, 0.6, 1e-3
"""Of a drawn gradient: rank and share of its signal, share of its noise, root mean square."""
WEIGHT = 0.02
"""Standard deviation of the weights, GPT-2's."""


@dataclass(frozen=True)
class WorkloadSpec:
    """One row of `WORKLOADS`.

    Args:
        build: makes the module from a number of layers.
        layers: their default; None: it has no such number.
        about: what it is.
    """

    build: Callable[[int], nn.Module]
    layers: int | None
    about: str


def _all_of(shape: Shape, vocabulary: int) -> Callable[[int], nn.Module]:
    return lambda layers: build(replace(shape, layers=layers), vocabulary, GPT2_BLOCK)


def _layers_of(shape: Shape) -> Callable[[int], nn.Module]:
    """The blocks alone, without embedding and head."""

    def layers_alone(layers: int) -> nn.Module:
        model: Any = build(replace(shape, layers=layers), vocab_size=8, block_size=GPT2_BLOCK)
        return model.model.layers

    return layers_alone


def _resnet(widths: Sequence[int], depths: Sequence[int], classes: int) -> Callable[[int], nn.Module]:
    return lambda layers: resnet(widths, depths, classes, channels=3, layer_type="bottleneck")


_LLAMA_1B, _OLMOE = PUBLISHED["llama-1b"].shape, PUBLISHED["olmoe-7b"].shape
_QUARTER = replace(_OLMOE, width=512, inner=256, heads=8, kv_heads=8)
_TINY_LLAMA = Shape("llama", 1, 4, 2, 32, False, 64)
_TINY_OLMOE = Shape("olmoe", 1, 2, 2, 16, False, 8, experts=4)

WORKLOADS: dict[str, WorkloadSpec] = {
    "gpt2-124m": WorkloadSpec(
        _all_of(PRESETS["gpt2-124m"], GPT2_VOCABULARY), 12, "GPT-2 124M: fused attention, tied embedding"
    ),
    "llama-1b": WorkloadSpec(_layers_of(_LLAMA_1B), 2, "layers of Llama 3.2 1B, without its embedding"),
    "resnet-50": WorkloadSpec(_resnet((256, 512, 1024, 2048), (3, 4, 6, 3), 1000), None, "ResNet-50 for 1,000 classes"),
    "olmoe": WorkloadSpec(_layers_of(_OLMOE), 1, "a layer of OLMoE 1B-7B: 64 experts, without embedding"),
    "olmoe-small": WorkloadSpec(_layers_of(_QUARTER), 1, "the same with all widths divided by four"),
    "tiny-gpt2": WorkloadSpec(_all_of(PRESETS["tiny"], 64), 2, "GPT-2, width 32"),
    "tiny-llama": WorkloadSpec(_layers_of(_TINY_LLAMA), 1, "Llama, width 32"),
    "tiny-resnet": WorkloadSpec(_resnet((16, 32), (1, 1), 4), None, "a bottleneck ResNet, widths 16 and 32"),
    "tiny-olmoe": WorkloadSpec(_layers_of(_TINY_OLMOE), 1, "a layer of 4 experts, width 16"),
}


@dataclass(frozen=True)
class Workload:
    """Parameters that optimizers step in turn, and the gradients that they all see.

    Args:
        name: one of `WORKLOADS`.
        about: what it is, how many layers, and what is left out.
        whole: groups of `asgo.route`.
        heads: the same with ``per_head=True``.
        matrices: every matrix as a 2-D parameter on the same memory, for optimizers that know no views. Fused
            projections are whole, a convolution is (out, in x kernel), each expert one matrix.
        rest: the parameters without a view.
        seed: of weights and gradients.
        shared: parameters, and those of `matrices` that are not among them, with their gradients.
    """

    name: str
    about: str
    whole: list[Group]
    heads: list[Group]
    matrices: list[Named]
    rest: list[Named]
    seed: int
    shared: list[tuple[nn.Parameter, Tensor]] = field(repr=False)

    @property
    def params(self) -> list[nn.Parameter]:
        """All parameters, without the 2-D ones of `matrices` that stand for them."""
        return [param for group in self.whole for _, param in group["params"]]

    @property
    def gradients(self) -> list[Tensor]:
        """The gradients of `params`."""
        own = {id(param) for param in self.params}
        return [gradient for param, gradient in self.shared if id(param) in own]

    @property
    def numel(self) -> int:
        """How many numbers the parameters hold."""
        return sum(param.numel() for param in self.params)

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return sum(param.numel() * param.element_size() for param in self.params)

    def attach(self) -> None:
        """Give every parameter its gradient: optimizers may have taken it away."""
        for param, gradient in self.shared:
            param.grad = gradient

    @torch.no_grad()
    def reset(self) -> None:
        """Draw the weights, the same ones each time."""
        dice = self._dice(0)
        for param in self.params:
            param.normal_(std=WEIGHT, generator=dice)

    @torch.no_grad()
    def draw(self, number: int) -> None:
        """Draw the gradients of step `number`: noise, and in matrices a low-rank signal that drifts with it."""
        noise, fixed = self._dice(number + 1), self._dice(0)
        for gradient in self.gradients:
            gradient.normal_(std=RMS, generator=noise)
        gradients = {id(param): gradient for param, gradient in self.shared}
        for _, param in self.matrices:
            gradient = gradients[id(param)]
            gradient.mul_(NOISE).add_(_signal(gradient, 0.3 * number, fixed).mul_(SIGNAL * RMS))

    def _dice(self, number: int) -> torch.Generator:
        return torch.Generator(self.params[0].device).manual_seed(self.seed * 1_000_003 + number)


def _signal(like: Tensor, angle: float, dice: torch.Generator) -> Tensor:
    """A matrix of rank 16 and root mean square 1 whose singular values fall as 1/i and whose rows turn with `angle`."""
    m, n = like.shape
    fall = 1 / torch.arange(1, min(RANK, m, n) + 1, device=like.device)
    left, other, right = (torch.randn(k, len(fall), generator=dice, device=like.device) for k in (m, m, n))
    return ((left * math.cos(angle) + other * math.sin(angle)) * (fall / fall.norm()) @ right.mT).to(like.dtype)


def make_workload(
    name: str, layers: int | None, matrices_only: bool, device: torch.device, dtype: torch.dtype, seed: int
) -> Workload:
    """The parameters of a model, on a device; `Workload.reset` and `Workload.draw` fill them and their gradients.

    Args:
        name: one of `WORKLOADS`.
        layers: number of blocks; None: the row's own.
        matrices_only: leave out what has no view.
        device: where.
        dtype: of parameters and gradients.
        seed: of both.
    """
    row = WORKLOADS[name]
    count = layers if layers is not None and row.layers is not None else row.layers
    with torch.device("meta"):
        model = row.build(count or 0)
    routed = (route(model, per_head=per_head) for per_head in (False, True))
    whole, heads = ([group for group in groups if any(group["views"]) or not matrices_only] for groups in routed)
    real = {id(p): nn.Parameter(torch.empty(p.shape, dtype=dtype, device=device)) for p in model.parameters()}
    for group in (*whole, *heads):
        group["params"] = [(given, real[id(param)]) for given, param in group["params"]]
    chosen = [(named, view is not None) for group in whole for named, view in with_views(group)]
    gradients = {id(param): torch.zeros_like(param) for (_, param), _ in chosen}
    shared = [(param, gradients[id(param)]) for (_, param), _ in chosen]
    matrices: list[Named] = []
    for (given, param), is_matrix in chosen:
        if is_matrix and param.ndim == 2:
            matrices.append((given, param))
        elif is_matrix:
            flat = [_rows(tensor.detach()) for tensor in (param, gradients[id(param)])]
            pieces = [(nn.Parameter(weight), gradient) for weight, gradient in zip(*flat, strict=True)]
            matrices += [(f"{given}.{i}", weight) for i, (weight, _) in enumerate(pieces)]
            shared += pieces
    about = row.about + ("" if count is None else f"; {count} layer{'s' if count > 1 else ''}")
    about += "; matrices only" if matrices_only else ""
    rest = [named for named, is_matrix in chosen if not is_matrix]
    return Workload(name, about, whole, heads, matrices, rest, seed, shared)


def _rows(tensor: Tensor) -> list[Tensor]:
    """The matrices in a stack of experts ``(e, m, n)`` or a convolution ``(o, i, ...)``, on the same memory."""
    return list(tensor) if tensor.ndim == 3 else [tensor.flatten(1)]
