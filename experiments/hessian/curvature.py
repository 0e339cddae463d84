"""Products of the Hessian or the generalised Gauss-Newton matrix with matrices, by curvlinops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asgo._types import Stack
from asgo.lab.errors import LabError
from asgo.lab.packages import need
from experiments.hessian.config import Curvature
from experiments.hessian.matrices import Matrix

OPERATORS: dict[Curvature, str] = {"hessian": "HessianLinearOperator", "ggn": "GGNLinearOperator"}
INSTALL = "pip install 'asgo[experiments]', then pip install --no-deps curvlinops-for-pytorch"


class NotMeasurable(Exception):
    """A product that the model cannot do, or that is not finite; the message says why."""


class Products:
    """The rows and columns of a model's curvature that belong to its matrices.

    Args:
        curvature: which.
        model: from inputs to predictions.
        loss: from predictions and targets to the mean loss; has ``reduction`` "mean" or "sum".
        params: parameters of the model by the names that the matrices have for them.
        matrices: what is differentiated for.
        batches: inputs and targets, one after the other.
    """

    def __init__(
        self,
        curvature: Curvature,
        model: nn.Module,
        loss: nn.Module,
        params: Mapping[str, nn.Parameter],
        matrices: Sequence[Matrix],
        batches: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        library = need("curvlinops", "experiments.hessian", INSTALL)
        self.matrices = matrices
        self.names = list(dict.fromkeys(matrix.parameter for matrix in matrices))
        self.shapes = [params[name].shape for name in self.names]
        operator = getattr(library, OPERATORS[curvature])
        chosen = [params[name] for name in self.names]
        self.operator: Any = operator(model, loss, chosen, list(batches), check_deterministic=False)

    def __call__(self, column: int, probes: Stack) -> list[Stack]:
        """``H_ij V`` for every matrix i, with j = `column`: shapes (k, m_i, n_i) for probes (k, m_j, n_j).

        Raises:
            NotMeasurable: if the model has no such products, or they are not finite.
        """
        k, own, dtype = len(probes), self.matrices[column], self.operator.dtype
        inputs = [torch.zeros(shape.numel(), k, dtype=dtype) for shape in self.shapes]
        inputs[self.names.index(own.parameter)][own.places.flatten()] = probes.flatten(1).T.to(dtype)
        try:
            outputs = self.operator @ [flat.reshape(*s, k) for flat, s in zip(inputs, self.shapes, strict=True)]
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise NotMeasurable(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        flat = {name: output.reshape(-1, k) for name, output in zip(self.names, outputs, strict=True)}
        if not all(output.isfinite().all() for output in outputs):
            raise NotMeasurable("the product is not finite")
        return [flat[matrix.parameter][matrix.places.flatten()].T.reshape(k, *matrix.shape) for matrix in self.matrices]


class Logits(nn.Module):
    """A causal language model as a function from ids (blocks, length) to logits (tokens, vocabulary).

    Args:
        model: the model; it is switched to evaluation, and to attention and activations that can be differentiated
            twice.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        switch = getattr(model, "set_attn_implementation", None)
        if switch is not None:
            switch("eager")
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child).__name__ in ("SiLU", "SiLUActivation"):
                    setattr(parent, name, Swish())

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of every token, those of one block after those of the other."""
        return self.model(input_ids=inputs).logits.flatten(0, 1)


class Swish(nn.Module):
    """SiLU of operations that have forward derivatives of their backward passes; torch's has none."""

    def forward(self, x: Tensor) -> Tensor:
        """``x sigmoid(x)``."""
        return x * x.sigmoid()


def check_loss(model: nn.Module, loss: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The mean loss of the batches.

    Raises:
        LabError: if it is not one finite number.
    """
    total = 0.0
    with torch.no_grad():
        for number, (inputs, targets) in enumerate(batches):
            found = loss(model(inputs), targets)
            if found.numel() != 1:
                shape = tuple(found.shape)
                raise LabError(f"the loss has shape {shape}, a Hessian needs one number: use a mean or a sum.")
            if not found.isfinite():
                raise LabError(
                    f"the loss of batch {number} is {float(found)}, so there is no Hessian: look for NaN in the "
                    "weights or the batch."
                )
            total += float(found) / len(batches)
    return total
