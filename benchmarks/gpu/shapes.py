"""The parameters of real models, without the models: shapes, and how their matrices are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asgo import View
from benchmarks.gpu.device import Device
from benchmarks.gpu.forms import Groups, Layout

MATRIX, CONVOLUTION = View("m n -> 1 m n"), View("o i a b -> 1 o (i a b)")
STD, RMS, RANK = 0.02, 1e-3, 16
"""Of the weights: standard deviation; of the gradients: root mean square, and the rank of the part that is no noise."""


@dataclass(frozen=True)
class Weight:
    """A parameter of a model.

    Args:
        name: its name.
        shape: its shape.
        view: how its matrices are read; None: it has none, and AdamW takes it.
        heads: the same with queries and keys by head.
    """

    name: str
    shape: tuple[int, ...]
    view: View | None = None
    heads: View | None = None


def _fused(*rows: int) -> View:
    return View("m n -> 1 m n", split=rows)


def _fused_heads(q: int, k: int, v: int, d: int) -> View:
    head = "(h d) n -> h d n"
    return View((head, head, "m n -> 1 m n"), {"d": d}, (q, k, v))


def _by_head(h: int) -> View:
    return View("(h d) n -> h d n", {"h": h})


def gpt2(layers: int, width: int, heads: int, vocabulary: int, context: int) -> list[Weight]:
    """GPT-2 with queries, keys and values in one parameter."""
    found = [Weight("wte", (vocabulary, width)), Weight("wpe", (context, width))]
    found += [Weight("ln", (width,)), Weight("ln_b", (width,))]
    by_head = _fused_heads(width, width, width, width // heads)
    for i in range(layers):
        found += [
            Weight(f"{i}.qkv", (3 * width, width), _fused(width, width, width), by_head),
            Weight(f"{i}.out", (width, width), MATRIX),
            Weight(f"{i}.up", (4 * width, width), MATRIX),
            Weight(f"{i}.down", (width, 4 * width), MATRIX),
            *(Weight(f"{i}.{name}", (size * width,)) for name, size in (("b_qkv", 3), ("b_up", 4), ("b_out", 1))),
            *(Weight(f"{i}.{name}", (width,)) for name in ("b_down", "ln_1", "ln_2", "ln_1_b", "ln_2_b")),
        ]
    return found


def llama(layers: int, width: int, inner: int, heads: int, kv_heads: int) -> list[Weight]:
    """Layers of Llama, without its embedding."""
    found, narrow = [], width // heads * kv_heads
    for i in range(layers):
        found += [
            Weight(f"{i}.q", (width, width), MATRIX, _by_head(heads)),
            Weight(f"{i}.k", (narrow, width), MATRIX, _by_head(kv_heads)),
            Weight(f"{i}.v", (narrow, width), MATRIX),
            Weight(f"{i}.o", (width, width), MATRIX),
            Weight(f"{i}.gate", (inner, width), MATRIX),
            Weight(f"{i}.up", (inner, width), MATRIX),
            Weight(f"{i}.down", (width, inner), MATRIX),
            Weight(f"{i}.norm_1", (width,)),
            Weight(f"{i}.norm_2", (width,)),
        ]
    return found


def resnet(widths: tuple[int, ...], depths: tuple[int, ...], classes: int) -> list[Weight]:
    """A ResNet of bottleneck blocks."""
    before = widths[0] // 4
    found = [Weight("stem", (before, 3, 7, 7), CONVOLUTION), Weight("bn", (before,)), Weight("bn_b", (before,))]
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for i in range(depth):
            name, inner = f"{stage}.{i}", width // 4
            found += [
                Weight(f"{name}.1", (inner, before, 1, 1), CONVOLUTION),
                Weight(f"{name}.2", (inner, inner, 3, 3), CONVOLUTION),
                Weight(f"{name}.3", (width, inner, 1, 1), CONVOLUTION),
                *(Weight(f"{name}.bn{j}", (size,)) for j, size in enumerate((inner,) * 4 + (width,) * 2)),
            ]
            if i == 0:
                found += [Weight(f"{name}.shortcut", (width, before, 1, 1), CONVOLUTION)]
                found += [Weight(f"{name}.shortcut_bn{j}", (width,)) for j in range(2)]
            before = width
    return [*found, Weight("head", (classes, before), MATRIX), Weight("bias", (classes,))]


def experts(width: int, inner: int, heads: int, count: int) -> list[Weight]:
    """A layer of OLMoE: attention and so many experts, gate and up projection of each in one parameter."""
    return [
        Weight("q", (width, width), MATRIX, _by_head(heads)),
        Weight("k", (width, width), MATRIX, _by_head(heads)),
        Weight("v", (width, width), MATRIX),
        Weight("o", (width, width), MATRIX),
        Weight("router", (count, width), MATRIX),
        Weight("gate_up", (count, 2 * inner, width), View("e m n -> e m n", split=(inner, inner), split_dim=1)),
        Weight("down", (count, width, inner), View("e m n -> e m n")),
        Weight("norm", (width,)),
    ]


MODELS: dict[str, list[Weight]] = {
    "GPT-2 124M": gpt2(12, 768, 12, 50257, 1024),
    "Llama 3.2 1B, 4 layers": llama(4, 2048, 8192, 32, 8),
    "ResNet-50": resnet((256, 512, 1024, 2048), (3, 4, 6, 3), 1000),
    "64 experts": experts(2048, 1024, 16, 64),
}
TINY: dict[str, list[Weight]] = {
    "GPT-2 124M": gpt2(1, 16, 2, 32, 8),
    "Llama 3.2 1B, 4 layers": llama(1, 16, 32, 4, 2),
    "ResNet-50": resnet((16,), (1,), 4),
    "64 experts": experts(16, 8, 2, 4),
}
"""The same names, in shapes for a rehearsal."""


@dataclass
class Workload:
    """Parameters and gradients on a device, which optimizers share.

    Args:
        weights: the parameters' shapes.
        device: where.
        params: float32 parameters.
        grads: their gradients.
        pieces: of each parameter its matrices as 2-D parameters on the same memory, with their gradients.
    """

    weights: list[Weight]
    device: Device
    params: list[nn.Parameter] = field(init=False)
    grads: list[Tensor] = field(init=False)
    pieces: list[list[tuple[nn.Parameter, Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        dice, here = torch.Generator(self.device.torch).manual_seed(0), self.device.torch
        draws = [torch.randn(each.shape, generator=dice, device=here).mul_(STD) for each in self.weights]
        self.params, self.grads = [nn.Parameter(draw) for draw in draws], [torch.zeros_like(draw) for draw in draws]
        self.pieces = [
            [(nn.Parameter(w), g) for w, g in zip(_cut(each, param.detach()), _cut(each, grad), strict=True)]
            for each, param, grad in zip(self.weights, self.params, self.grads, strict=True)
        ]

    def draw(self, number: int) -> None:
        """New gradients: noise, and in matrices a part of rank 16; every parameter holds its own."""
        dice = torch.Generator(self.device.torch).manual_seed(number + 1)
        for grad in self.grads:
            grad.normal_(std=RMS, generator=dice)
        for _, grad in (piece for pieces in self.pieces for piece in pieces):
            m, n = grad.shape
            left, right = (torch.randn(k, RANK, generator=dice, device=grad.device) for k in (m, n))
            grad.mul_(0.6).addmm_(left, right.mT, alpha=0.8 * RMS / RANK**0.5)
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        for param, grad in (piece for pieces in self.pieces for piece in pieces):
            param.grad = grad

    def groups(self, layout: Layout) -> Groups:
        """Groups for an optimizer of this library."""
        found: Groups = []
        for each, param, pieces in zip(self.weights, self.params, self.pieces, strict=True):
            if layout == "apart" and each.view is not None and each.view.parts > 1 and len(each.shape) == 2:
                found.append({"params": [(f"{each.name}.{i}", p) for i, (p, _) in enumerate(pieces)], "view": MATRIX})
            else:
                view = each.heads or each.view if layout == "heads" else each.view
                found.append({"params": [(each.name, param)], "view": view})
        return _joined(found)

    def same_layout(self, layout: Layout) -> str | None:
        """Why a layout need not be timed: it is "fused" under another name. None if it is not."""
        if layout == "fused" or (self.is_fused if layout == "apart" else any(each.heads for each in self.weights)):
            return None
        return f"this model has no {'fused matrices' if layout == 'apart' else 'heads'}"

    def matrices(self, fused: bool) -> list[nn.Parameter]:
        """2-D parameters for optimizers that know no views: experts one by one, convolutions as (out, in x kernel), and
        what shares a parameter apart or, with `fused`, as it stands."""
        found = []
        for each, param, pieces in zip(self.weights, self.params, self.pieces, strict=True):
            undivided = fused and each.view is not None and len(each.shape) == 2
            found += [param] if undivided else [piece for piece, _ in pieces]
        return found

    @property
    def is_fused(self) -> bool:
        """Whether a 2-D parameter holds several matrices."""
        return any(each.view is not None and each.view.parts > 1 and len(each.shape) == 2 for each in self.weights)

    @property
    def rest(self) -> list[nn.Parameter]:
        """The parameters without a matrix."""
        return [param for each, param in zip(self.weights, self.params, strict=True) if each.view is None]

    def stacks(self, layout: Layout) -> dict[tuple[int, int], int]:
        """How many matrices there are of each shape, the shorter side first."""
        found: dict[tuple[int, int], int] = {}
        for each in self.weights:
            view = each.heads or each.view if layout == "heads" else each.view
            for b, m, n in view.shapes(each.shape) if view is not None else ():
                found[min(m, n), max(m, n)] = found.get((min(m, n), max(m, n)), 0) + b
        return found


def _cut(each: Weight, tensor: Tensor) -> list[Tensor]:
    """The matrices of a parameter or gradient, on its memory."""
    if each.view is None:
        return []
    return [matrix for stack in each.view.matrices(tensor) for matrix in stack]


def _joined(groups: Groups) -> Groups:
    """One group for each view."""
    found: dict[View | None, list[object]] = {}
    for group in groups:
        found.setdefault(group["view"], []).extend(group["params"])
    return [{"params": params, "view": view} for view, params in found.items()]
