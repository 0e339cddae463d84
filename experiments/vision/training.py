"""One small ResNet, trained with one optimizer, one learning rate and one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from asgo.lab.config.runs import ScheduleConfig
from asgo.lab.data.images import CLASSES
from asgo.lab.data.rows import Rows
from asgo.lab.models import architectures
from asgo.lab.optimizers.registry import state_bytes
from asgo.lab.training.schedule import scheduler
from asgo.presets import BAGM
from experiments.vision.images import load

Build = Callable[..., Optimizer]

METHODS: dict[str, Build] = {
    "nag": partial(SGD, momentum=0.9, nesterov=True),
    "adam": Adam,
    "bagm-b1": partial(BAGM, blocks="tensor"),
    "bagm-b2": partial(BAGM, blocks="row"),
    "bagm-b3": partial(BAGM, blocks="kernel"),
    "bagm-b4": partial(BAGM, blocks="column"),
}
"""Nesterov's momentum, Adam, and BAGM with the paper's four kinds of blocks; decay rates are the usual ones."""

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Training:
    """A job: one run.

    Args:
        data: name of the data set.
        folder: where Fashion-MNIST is.
        images: most training images.
        method: in `METHODS`.
        lr: peak learning rate.
        seed: of the first weights and the order of the images.
        final: measure errors on training and test images; else only on the validation images.
        epochs: passes over the training images.
        batch: images per step.
        widths: channels of the stages.
        depths: blocks of the stages.
        schedule: learning rate over the run.
    """

    data: str
    folder: Path
    images: int
    method: str
    lr: float
    seed: int
    final: bool
    epochs: int
    batch: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    schedule: ScheduleConfig

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        return f"{'seed' if self.final else 'tune'}-{self.seed}/{self.method}/lr-{self.lr:g}"

    @property
    def weight(self) -> float:
        """All runs take about the same time."""
        return 1.0

    def run(self) -> dict[str, Any]:
        """Train, then measure."""
        data = load(self.data, self.folder, self.images)
        model = resnet(self.widths, self.depths, self.seed)
        optimizer = METHODS[self.method](model.parameters(), lr=self.lr)
        begun = time.perf_counter()
        losses = self._train(model, optimizer, data.train)
        seconds = time.perf_counter() - begun
        steps = self.epochs * (len(data.train.targets) // self.batch)
        found = {"losses": losses, "seconds_per_step": seconds / steps, "state_bytes": state_bytes(optimizer)}
        if not self.final:
            return found | {"validation": measure(model, data.validation)}
        return found | {"train": measure(model, data.train), "test": measure(model, data.test)}

    def _train(self, model: nn.Module, optimizer: Optimizer, part: Rows) -> list[float]:
        """The mean loss of each epoch, while it was being trained; infinite, and no more, after divergence."""
        generator = torch.Generator().manual_seed(self.seed)
        steps = len(part.targets) // self.batch
        schedule = scheduler(optimizer, self.schedule, self.epochs * steps)
        losses: list[float] = []
        model.train()
        for _ in range(self.epochs):
            total = torch.zeros(())
            order = torch.randperm(len(part.targets), generator=generator)
            for rows in order[: steps * self.batch].view(steps, self.batch):
                loss = F.cross_entropy(logits(model, part.inputs[rows]), part.targets[rows])
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += loss.detach()
            losses.append(float(total) / steps)
            if not math.isfinite(losses[-1]):
                return [*losses[:-1], math.inf]
        return losses


def resnet(widths: tuple[int, ...], depths: tuple[int, ...], seed: int) -> nn.Module:
    """A ResNet of basic blocks for one channel and ten classes; the seed decides the weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return architectures.resnet(widths, depths, CLASSES, channels=1, layer_type="basic")


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's predictions."""
    return model(pixel_values=images).logits


@torch.no_grad()
def measure(model: nn.Module, part: Rows) -> dict[str, float]:
    """Mean loss and share of wrong answers, with the statistics of batch normalisation that training left."""
    model.eval()
    loss = wrong = 0.0
    for images, labels in zip(part.inputs.split(EVALUATION_BATCH), part.targets.split(EVALUATION_BATCH), strict=True):
        found = logits(model, images)
        loss += float(F.cross_entropy(found, labels, reduction="sum"))
        wrong += float((found.argmax(1) != labels).sum())
    return {"loss": loss / len(part.targets), "error": wrong / len(part.targets)}
