"""One column of blocks of the curvature, exactly or by probing, as a job of its own process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asgo import checkpoint
from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig, OptimizerConfig, TrainConfig
from asgo.lab.data.batches import DataConfig, open_data
from asgo.lab.errors import LabError
from asgo.lab.models.language import build_model
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Diverged, train
from experiments.hessian.config import Curvature
from experiments.hessian.curvature import Logits, NotMeasurable, Products, check_loss
from experiments.hessian.estimates import Estimate, Exact, Probed, mean, units
from experiments.hessian.matrices import Matrix, find_matrices

WEIGHTS: dict[Curvature, float] = {"hessian": 3.0, "ggn": 1.0}
"""About what a product costs; a training step costs as much as `STEP`."""
STEP = 5.0

ENTRIES = 2**25
"""Most entries of the vectors of all products at once: 128 MB each for vectors and products, more in between."""


@dataclass(frozen=True)
class Point:
    """Where the curvature is taken: weights and batch.

    Args:
        model: the model.
        data: corpus and batch.
        length: longest block that the model takes.
        weights: seed of the initial weights.
        batch: seed of the batch.
        step: training steps done.
        file: checkpoint with the weights; None: the initial ones.
    """

    model: ModelConfig
    data: DataConfig
    length: int
    weights: int
    batch: int
    step: int
    file: Path | None = None


@dataclass(frozen=True)
class Problem:
    """What is differentiated: the mean loss of `batches` as a function of the `matrices`."""

    model: Logits
    loss: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    matrices: Sequence[Matrix]

    def products(self, curvature: Curvature) -> Products:
        """The products of its Hessian or Gauss-Newton matrix."""
        params = dict(self.model.model.named_parameters())
        return Products(curvature, self.model, self.loss, params, self.matrices, self.batches)


@lru_cache(maxsize=1)
def build(point: Point) -> Problem:
    """The model with its weights, and the batch.

    Raises:
        LabError: for a model, a corpus or a checkpoint that does not fit, a model without matrices, and a loss that is
            not one finite number.
    """
    data = open_data(point.data, point.batch)
    bare = build_model(point.model, data.vocab_size, point.length, point.weights)
    state = None if point.file is None else checkpoint.load(point.file)["model"]
    if state is not None:
        try:
            bare.load_state_dict(state)
        except RuntimeError as error:
            raise LabError(f"{point.file} is of another model: {str(error).splitlines()[-1].strip()}") from error
    matrices = find_matrices(bare)
    if not matrices:
        raise LabError("the model has no matrices: there is nothing to measure. Use one with Linear layers.")
    inputs, targets = data.batches.batch(0)
    problem = Problem(Logits(bare), nn.CrossEntropyLoss(), [(inputs, targets.flatten())], matrices)
    check_loss(problem.model, problem.loss, problem.batches)
    return problem


# ---- jobs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A job: all blocks in the columns of one matrix."""

    point: Point
    curvature: Curvature
    column: int
    name: str
    size: int
    heads: int
    exact_up_to: int
    probes: int
    chunk: int

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"step {self.point.step} {self.curvature} {self.name}"

    @property
    def products(self) -> int:
        """How many products it takes."""
        per_set = 4 + (self.heads if self.heads > 1 else 0)
        return self.size if self.size <= self.exact_up_to else self.probes * per_set

    @property
    def weight(self) -> float:
        """Products, by what they cost."""
        return WEIGHTS[self.curvature] * self.products

    def run(self) -> dict[str, Any]:
        """What was found, or the reason why nothing could be."""
        began = time.perf_counter()
        try:
            problem = build(self.point)
            found = blocks(
                problem.products(self.curvature), self.column, self.exact_up_to, self.probes, self.chunk, self._seed()
            )
        except (NotMeasurable, LabError) as error:
            return {"reason": str(error)}
        return found | {"products": self.products, "seconds": time.perf_counter() - began}

    def _seed(self) -> int:
        text = f"{self.point.batch} {self.key}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Training:
    """A job: the model after some steps of training, in a run folder of its own."""

    model: ModelConfig
    optimizer: OptimizerConfig
    data: DataConfig
    steps: int
    seed: int
    out: Path

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"training {self.steps}"

    @property
    def weight(self) -> float:
        """Steps, by what they cost."""
        return STEP * self.steps

    @property
    def file(self) -> Path:
        """The checkpoint at the end."""
        return self.out / "checkpoints" / f"step-{self.steps:08d}.pt"

    @property
    def config(self) -> TrainConfig:
        """The run."""
        return TrainConfig(
            data=self.data,
            model=self.model,
            optimizer=self.optimizer,
            machine=MachineConfig(device="cpu", threads=1),
            cadence=CadenceConfig(eval_every=self.steps, checkpoint_every=self.steps),
            steps=self.steps,
            seed=self.seed,
            out=self.out,
            resume=True,
        )

    def run(self) -> dict[str, Any]:
        """The result of the run, or the reason why there is none."""
        try:
            return train(self.config)
        except Diverged as error:
            return {"reason": str(error)}
        except Stopped:
            raise Stopped("stopped while training; its checkpoint is kept") from None


def do(job: Measure | Training) -> dict[str, Any]:
    """Do one job, in this process or another."""
    return job.run()


# ---- estimates -----------------------------------------------------------------------------------


def blocks(products: Products, column: int, exact_up_to: int, sets: int, chunk: int, seed: int) -> dict[str, Any]:
    """Squared norms of all blocks in a column, and the shares of the one on the diagonal.

    Args:
        products: with the curvature.
        column: the number of the matrix whose columns they are.
        exact_up_to: a matrix of more entries is probed.
        sets: how often.
        chunk: most products at once.
        seed: of the signs.

    Returns:
        ``method``, ``squares`` (a pair of value and standard error for each matrix) and ``shares`` (the same by name).

    Raises:
        NotMeasurable: if the products cannot be had, or the block is zero.
    """
    m, n = products.matrices[column].shape
    exact = m * n <= exact_up_to
    chunk = max(1, min(chunk, ENTRIES // sum(matrix.places.numel() for matrix in products.matrices)))
    squares, shares = _exact(products, column, chunk) if exact else _probed(products, column, sets, chunk, seed)
    if not shares["norm"].value > 0:
        raise NotMeasurable("the block is zero")
    return {
        "method": "exact" if exact else "probed",
        "squares": [_pair(square) for square in squares],
        "shares": {name: _pair(share) for name, share in shares.items()},
    }


def _pair(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.error]


def _exact(products: Products, column: int, chunk: int) -> tuple[list[Estimate], dict[str, Estimate]]:
    matrix = products.matrices[column]
    m, n = matrix.shape
    block, total = Exact(m, n, matrix.groups), torch.zeros(len(products.matrices), dtype=torch.float64)
    for start in range(0, m * n, chunk):
        found = products(column, units(m, n, start, min(start + chunk, m * n)))
        block.add(start, found[column])
        total += torch.stack([product.double().square().sum() for product in found])
    return [Estimate(value) for value in total.tolist()], block.shares()


def _probed(
    products: Products, column: int, sets: int, chunk: int, seed: int
) -> tuple[list[Estimate], dict[str, Estimate]]:
    matrix = products.matrices[column]
    block = Probed(*matrix.shape, matrix.groups, torch.Generator().manual_seed(seed))
    squares = torch.zeros(sets, len(products.matrices), dtype=torch.float64)
    for number in range(sets):
        probes, own = block.draw(), []
        for start in range(0, len(probes), chunk):
            found = products(column, probes[start : start + chunk])
            own.append(found[column])
            whole = max(block.variants - start, 0)  # the others are of one group only
            squares[number] += torch.stack([part[:whole].double().square().sum() for part in found]) / block.variants
        block.add(probes, torch.cat(own))
    return [mean(samples) for samples in squares.T], block.shares()
