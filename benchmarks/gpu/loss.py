"""GPT-2 124M over bytes: two forms of ASGO, Muon and AdamW in turns, for as many steps as there is time."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon

from asgo import ASGO, View
from benchmarks.gpu.device import Device
from benchmarks.gpu.model import GPT, GPT2, TINY, Size, make_model
from benchmarks.gpu.part import Part
from benchmarks.gpu.peers import BETAS, Together, with_adamw
from benchmarks.gpu.record import describe
from benchmarks.gpu.text import Text, read

MATRIX_LR, REST_LR, ADAMW_LR, DECAY, MOMENTUM = 3.6e-3, 1e-3, 1e-3, 0.1, 0.95
"""Peak learning rates of ASGO and Muon, whose updates have one size, of what they leave to AdamW, and of AdamW alone.

3.6e-3 times 0.2 is what a rate of 0.02 makes of Muon's own scale at width 768; 1e-3 is usual for AdamW at this size.
None was tuned here.
"""
WARMUP, BLOCK, RESERVE = 20, 20, 0.9
"""Steps of rising lr; steps of one turn; the share of the time that is planned for."""


@dataclass(frozen=True)
class Job:
    """What is trained on what.

    Args:
        size: of the model.
        text: bytes, in batches.
        most: steps.
    """

    size: Size
    text: Text
    most: int


def split(model: GPT) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights of linear layers, which every optimizer sees as its matrices, and the rest."""
    linear = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    matrices = [param for param in model.parameters() if id(param) in linear]
    return matrices, [param for param in model.parameters() if id(param) not in linear]


def asgo_for(model: GPT, root: str = "auto") -> Any:
    """ASGO on the matrices, AdamW within it on the rest."""
    matrices, rest = split(model)
    groups = [{"params": matrices, "view": View("m n -> 1 m n")}, {"params": rest, "view": None, "lr": REST_LR}]
    return ASGO(groups, lr=MATRIX_LR, betas=(MOMENTUM, 0.2), weight_decay=DECAY, root=root)


def muon_for(model: GPT) -> Any:
    """`torch.optim.Muon` on the same matrices, AdamW on the rest."""
    matrices, rest = split(model)
    options: dict[str, Any] = {"momentum": MOMENTUM, "weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"}
    return with_adamw(Muon(matrices, lr=MATRIX_LR, **options), rest, REST_LR)


def adamw_for(model: GPT) -> Any:
    """AdamW on everything, without decay where there is no matrix."""
    matrices, rest = split(model)
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    return AdamW(groups, lr=ADAMW_LR, betas=BETAS, fused=True)


CONTENDERS: dict[str, Callable[[GPT], Any]] = {
    "ASGO": asgo_for,
    "ASGO, square root": partial(asgo_for, root="square_root"),
    "Muon": muon_for,
    "AdamW": adamw_for,
}


@dataclass
class Trainer:
    """One optimizer with its own copy of the model.

    Args:
        name: of `CONTENDERS`.
        device: where.
        job: on what.
    """

    name: str
    device: Device
    job: Job
    step: int = 0
    seconds: float = 0.0
    model: GPT = field(init=False)
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.model = make_model(self.job.size, 0, self.device.torch)
        self.optimizer = CONTENDERS[self.name](self.model)
        self._rates = [(group, group["lr"]) for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        parts = self.optimizer.parts if isinstance(self.optimizer, Together) else [self.optimizer]
        return [group for part in parts for group in part.param_groups]

    def advance(self, steps: int, total: int) -> float:
        """Some steps of a plan of `total`; the mean loss of them. Their time is added up, synchronised at both ends."""
        self.device.synchronize()
        start, losses = time.perf_counter(), []
        for _ in range(steps):
            for group, lr in self._rates:
                group["lr"] = lr * rate(self.step, total)
            losses.append(self._loss(self.job.text.batch(self.step)))
            losses[-1].backward()
            self.optimizer.step()
            for param in self.model.parameters():
                param.grad = None
            losses[-1] = losses[-1].detach()
            self.step += 1
        self.device.synchronize()
        self.seconds += time.perf_counter() - start
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def evaluate(self) -> float:
        """The loss in nats per byte of what is held out."""
        return float(torch.stack([self._loss(tokens) for tokens in self.job.text.held_out_batches()]).mean())

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.torch.type, dtype=torch.bfloat16):
            return self.model(tokens)


def rate(step: int, total: int) -> float:
    """The share of the peak learning rate: up over `WARMUP` steps, level, and down to 0 over the last third."""
    return min(1.0, (step + 1) / WARMUP, max(0.0, 3 * (total - step) / total))


def run(part: Part) -> None:
    """A row for the text, then one for every turn of each optimizer; what has been trained before is trained anew."""
    part.attempt("text", partial(_describe, part))
    if part.wanted("training"):
        part.attempt("training", partial(_train, part))


def _job(part: Part) -> Job:
    size, rows, most = (TINY, 4, 6) if part.tiny else (GPT2, 16, 20_000)
    text = read(400_000 if part.tiny else 2**25, part.device.torch)
    return Job(size, Text.of(text, rows, size.context, most), most)


def _describe(part: Part) -> Mapping[str, Any]:
    job = _job(part)
    shape = {"rows": job.text.rows, "context": job.size.context, "layers": job.size.layers, "width": job.size.width}
    rates = {"matrices": MATRIX_LR, "rest": REST_LR, "AdamW": ADAMW_LR, "momentum": MOMENTUM, "weight_decay": DECAY}
    return {"bytes": len(job.text.train), "held_out": len(job.text.held_out), **shape, **rates}


def _train(part: Part) -> Mapping[str, Any]:
    """In turns; how many steps fit is planned after two turns of each, and then kept to. One that fails drops out."""
    job, block = _job(part), 2 if part.tiny else BLOCK
    trainers = [Trainer(name, part.device, job) for name in CONTENDERS]
    total, turn = job.most, 0
    while trainers and trainers[0].step < total:
        start = time.perf_counter()
        for trainer in trainers[turn % len(trainers) :] + trainers[: turn % len(trainers)]:
            if not _one_turn(part, trainer, block, total):
                trainers.remove(trainer)
        turn += 1
        took = time.perf_counter() - start
        if turn == 2:
            total = min(total, (turn + max(1, int(RESERVE * part.left / took))) * block)
        if part.left < 1.1 * took:
            break
    final = {each.name: each.evaluate() for each in trainers}
    return {"steps": trainers[0].step if trainers else 0, "planned": total, "final": final}


def _one_turn(part: Part, trainer: Trainer, block: int, total: int) -> bool:
    """One turn of an optimizer and a point of its curve; False if it failed."""
    try:
        loss = trainer.advance(min(block, total - trainer.step), total)
        data = {"optimizer": trainer.name, "step": trainer.step, "train": loss, "held_out": trainer.evaluate()}
    except Exception as error:
        data = {"error": describe(error), "traceback": traceback.format_exc()}
        part.record.write(f"training: {trainer.name}", "failed", data)
        return False
    part.record.write(f"{trainer.name} at step {trainer.step}", "point", {**data, "seconds": trainer.seconds})
    return True
