"""One training run, from a config to a finished run folder; stopped and resumed at any step, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from asgo.lab.config.checks import validate
from asgo.lab.config.codec import command
from asgo.lab.config.runs import TrainConfig
from asgo.lab.data.batches import open_data
from asgo.lab.data.rows import IGNORED, in_batches
from asgo.lab.data.sampling import Batches, Pair
from asgo.lab.data.tokenization import BpeTokenizer
from asgo.lab.errors import Diverged, LabError
from asgo.lab.figures import draw_run
from asgo.lab.files import writing
from asgo.lab.inspection.routing import routing_text
from asgo.lab.models.language import (
    build_model,
    check_model,
    count_parameters,
    cross_entropy,
    model_fingerprint,
    token_loss,
)
from asgo.lab.optimizers.registry import build_optimizer, resolve, state_bytes
from asgo.lab.pretrained import as_pretrained, load_tokenizer
from asgo.lab.training import environment
from asgo.lab.training.lookahead import EMANesterov
from asgo.lab.training.machine import accelerator
from asgo.lab.training.meter import Meter
from asgo.lab.training.parallel import Parallel, reporting, shares
from asgo.lab.training.progress import RunProgress
from asgo.lab.training.run_folder import RunFolder, check_out
from asgo.lab.training.schedule import factor, scheduler
from asgo.lab.training.snapshot import FORMAT, check_identity, random_state, set_random_state
from asgo.lab.training.stopping import Stopped, StopSignal
from asgo.optimizer.step import structured


def train(config: TrainConfig, console: Console | None = None, title: str | None = None) -> dict[str, Any]:
    """Train one model and return what ``result.json`` holds; a finished run is only read.

    Args:
        config: the run.
        console: where progress is shown; None: nowhere.
        title: what progress is called; None: optimizer and seed.

    Raises:
        LabError: for a config, corpus, folder or checkpoint that does not fit, for a disk that refuses, and where
            another process of the run has ended.
        Diverged: when the loss is NaN or infinite; the last checkpoint stays as it is.
        Stopped: after SIGINT or SIGTERM, with a checkpoint of the step just finished.
    """
    validate(config)
    check_model(config)
    config = replace(config, optimizer=resolve(config.optimizer))
    check_out(config, "config.json", "run", ("machine.parallel",))
    done = RunFolder(config.out).result()
    if done is not None:
        if done["status"] == "diverged":
            raise Diverged(f"the run in {config.out} diverged: {done['message']}")
        return done
    stop = StopSignal()
    with reporting(config.out, stop):
        trainer = Trainer(config)
    shown = console if console is not None and trainer.accelerator.is_main_process else Console(quiet=True)
    title = title or f"{config.optimizer.name} seed {config.seed}"
    with stop, reporting(config.out, stop), RunProgress(shown, title, config.steps) as progress:
        return trainer.run(stop, progress)


class Trainer:
    """The parts of one run and the loop over its steps.

    Args:
        config: the run; its optimizer has no open fields.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = accelerator(config.machine)
        self.device = self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        self.data = open_data(config.model_data, config.seed, rank, world)
        model = build_model(config.model, self.data.vocab_size, config.data.block_size, config.seed)
        self.fingerprint = model_fingerprint(model)
        self.parallel = Parallel(self.accelerator, config.machine)
        self.raw = self.parallel.place(model)
        self.optimizer = self.parallel.share(build_optimizer(self.raw, config.optimizer))
        self.scheduler = scheduler(self.optimizer, config.schedule, config.steps)
        self.model = self.parallel.wrap(torch.compile(self.raw) if config.machine.compile else self.raw)  # pyright: ignore[reportArgumentType]
        self.stepper = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self.folder = RunFolder(config.out, writes=self.accelerator.is_main_process)
        self.meter, self.step = Meter(self.device), 0
        self._divide(config.grad_accumulation, world)
        self.grad_norm = torch.zeros(())
        self.average = self._new_average(config)
        self.lookahead = self._new_lookahead(config)

    def _new_average(self, config: TrainConfig) -> AveragedModel | None:
        """The mean of the last weights, where one is asked for."""
        if not config.tail_average:
            return None
        if config.machine.parallel == "fsdp2":
            raise LabError("--tail-average is of whole weights: pass another --parallel than fsdp2, or leave it out.")
        return AveragedModel(self.raw)

    def _new_lookahead(self, config: TrainConfig) -> EMANesterov | None:
        """What moves the weights ahead before each step, where that is asked for."""
        if not config.lookahead:
            return None
        if config.machine.parallel == "fsdp2":
            raise LabError("--lookahead is of whole weights: pass another --parallel than fsdp2, or leave it out.")
        return EMANesterov(self.raw.parameters(), config.lookahead, config.steps)

    def run(self, stop: StopSignal, progress: RunProgress) -> dict[str, Any]:
        """Train from the last checkpoint, or from the start, to the last step."""
        self._begin(progress)
        while self.step < self.config.steps:
            self._train_step()
            self._after_step(stop, progress)
        return self._finish()

    # ---- one step --------------------------------------------------------------------------------

    def _train_step(self) -> None:
        self.model.train()
        if self.lookahead is not None:
            self.lookahead.before(self.step, factor(self.config.schedule, self.step, self.config.steps))
        total = torch.zeros((), device=self.device)
        tokens, count = 0, len(self.shares)
        for number, (part, batches) in enumerate(self.shares, 1):
            inputs, targets = self._batch(batches, self.step * self.parts + part)
            with self.parallel.collecting(self.model, number == count):
                loss = token_loss(self.model, inputs, targets) / count
                self.accelerator.backward(loss)
            total += loss.detach()
            tokens += targets.numel() * self.accelerator.num_processes
        self.grad_norm = self.parallel.clip(self.model, self.config.clip or math.inf)
        every = self.config.cadence.metrics_every
        recorder = structured(self.optimizer) if every else None
        if recorder is not None:
            recorder.record_metrics(int((self.step + 1) % every == 0))
        self.meter.clock.start()
        self.stepper.step()
        self.meter.clock.stop()
        if self.lookahead is not None:
            self.lookahead.after()
        if recorder is not None and (self.step + 1) % every == 0:
            self._add_metrics(recorder.metrics())
        self.scheduler.step()
        self.stepper.zero_grad()
        self.meter.add(self.accelerator.reduce(total, "mean"), tokens)  # pyright: ignore[reportArgumentType]
        self.step += 1
        if self.average is not None and self.step > (1 - self.config.tail_average) * self.config.steps:
            self.average.update_parameters(self.raw)

    def _add_metrics(self, found: dict[str, dict[str, float]]) -> None:
        self.folder.board.add(
            {f"{key}/{name}": x for name, row in found.items() for key, x in row.items()}, self.step + 1
        )

    def _batch(self, batches: Batches, number: int) -> tuple[Tensor, Tensor]:
        return self._to_device(batches.batch(number))

    def _to_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    # ---- between steps ---------------------------------------------------------------------------

    def _after_step(self, stop: StopSignal, progress: RunProgress) -> None:
        cadence, last = self.config.cadence, self.step == self.config.steps
        stopping = self._agree(stop.asked)
        log = last or self.step % cadence.log_every == 0
        evaluate = last or self.step % cadence.eval_every == 0
        save = last or stopping or self.step % cadence.checkpoint_every == 0
        if not (log or evaluate or save):
            return
        self.meter.pause()
        self._check_loss(self.meter.loss(), "training")
        line = (self._log() if log else {}) | (self._evaluate() if evaluate else {})
        progress.update(self.step, line)
        if save:
            self._save()
        if stopping and not last:
            processes = self.accelerator.num_processes
            asgo = "asgo" if processes == 1 else f"torchrun --nproc_per_node {processes} -m asgo.lab"
            raise Stopped(
                f"stopped after step {self.step} of {self.config.steps}; a checkpoint is written. Continue "
                f"with: {asgo} train --out {self.config.out} --resume"
            )
        self.meter.start()

    def _agree(self, asked: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return asked
        if asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _log(self) -> dict[str, Any]:
        line = {
            "step": self.step,
            "loss": self.meter.loss(),
            "lr": (self.config.optimizer.lr or 0.0) * factor(self.config.schedule, self.step - 1, self.config.steps),
            "grad_norm": float(self.grad_norm),
            "tokens": self.meter.tokens,
            "seconds": self.meter.seconds,
            "optimizer_seconds": self.meter.clock.seconds,
            "tokens_per_second": self.meter.lap(),
            "failed_roots": self.parallel.failed_roots(self.optimizer),
        }
        self.folder.log(line)
        return line

    def _evaluate(self) -> dict[str, Any]:
        found = self._validate(self.config.cadence.eval_blocks)
        self.meter.val_losses.append(found["val_loss"])
        line = {"step": self.step, **found, "tokens": self.meter.tokens, "seconds": self.meter.seconds}
        self.folder.log(line)
        return line

    def _validate(self, blocks: int) -> dict[str, float]:
        found = self._measure(self.data.validation(self.config.data.batch_size, blocks or None), "val")
        self._check_loss(found["val_loss"], "validation")
        return found

    def _final_losses(self) -> dict[str, float]:
        cadence, test = self.config.cadence, getattr(self.data, "test", None)
        if cadence.final_eval_blocks is None and test is None:
            return {"val_loss": self.meter.val_losses[-1]}
        blocks = cadence.eval_blocks if cadence.final_eval_blocks is None else cadence.final_eval_blocks
        found = self._validate(blocks)
        if test is not None:
            found |= self._measure(in_batches(test, self.config.data.batch_size, blocks or None), "test")
        return found

    @torch.no_grad()
    def _measure(self, pairs: Iterable[Pair], name: str) -> dict[str, float]:
        """Mean loss, and of images the share of right answers."""
        model = self.model if self.average is None or not self.average.n_averaged else self.average
        model.eval()
        total, right, count = torch.zeros((), dtype=torch.float64), 0, 0
        for pair in pairs:
            inputs, targets = self._to_device(pair)
            logits = model(inputs).logits
            counted = int((pair[1] != IGNORED).sum())
            total += cross_entropy(logits, targets).double().cpu() * counted
            count += counted
            if targets.ndim == 1:
                right += int((logits.argmax(1) == targets).sum())
        accuracy = {f"{name}_accuracy": right / count} if self.config.data.corpus.images else {}
        return {f"{name}_loss": float(total) / count} | accuracy

    def _check_loss(self, loss: float, which: str) -> None:
        if math.isfinite(loss):
            return
        saved = self.folder.saved()
        kept = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        message = (
            f"the {which} loss is {loss} at step {self.step} ({self.config.optimizer.name}, lr "
            f"{self.config.optimizer.lr:g}); {kept}. Start again with a smaller --optimizer.lr."
        )
        self.folder.finish({"status": "diverged", "step": self.step, "message": message})
        raise Diverged(message)

    # ---- beginning, saving, end ------------------------------------------------------------------

    def _begin(self, progress: RunProgress) -> None:
        torch.manual_seed(self.config.seed + self.accelerator.process_index)
        state = self.folder.load() if self.config.resume else None
        if state is not None:
            self._restore(state)
        self.accelerator.wait_for_everyone()
        session = environment.describe(self.device, self.accelerator.num_processes, self.step)
        self.folder.create(self.config, session, routing_text(self.raw, self.optimizer))
        self.folder.rewind(self.step if state is not None else -1)
        progress.begin(self.step)
        if state is None:
            progress.update(0, self._evaluate())
        self.meter.start()

    def _save(self) -> None:
        self._check_loss(0.0 if self.parallel.all_finite(self.raw) else math.nan, "next")
        local = {"data": self.data.batches.state_dict(), "rng": random_state(self.device)}
        ranks = [local] if self.accelerator.num_processes == 1 else gather_object([local])
        scaler = self.accelerator.scaler
        state = {
            **self._identity(),
            "step": self.step,
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": self.meter.state_dict(),
            "ranks": ranks,
            "world": self.world,
            "average": None if self.average is None else self.average.state_dict(),
            "lookahead": None if self.lookahead is None else self.lookahead.state_dict(),
        }
        self.parallel.save(self.folder, state, self.raw, self.optimizer)

    def _restore(self, state: dict[str, Any]) -> None:
        check_identity(state, self._identity(), self.folder.saved()[-1])
        self._divide(self.parts, state.get("world", len(state["ranks"])))
        self.parallel.restore(self.folder, state, self.raw, self.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.lookahead is not None:
            self.lookahead.load_state_dict(state["lookahead"])
        if len(state["ranks"]) == self.accelerator.num_processes:
            local = state["ranks"][self.accelerator.process_index]
            self.data.batches.load_state_dict(local["data"])
            set_random_state(local["rng"], self.device)
        self.step = state["step"]

    def _divide(self, parts: int, world: int) -> None:
        """Divide the batches of a step, which were made for `world` processes."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.parts, self.world = parts, world
        self.shares = shares(self.data.batches, parts, world, rank, processes)

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_fingerprint": self.fingerprint,
            "data_fingerprint": self.data.fingerprint,
            "optimizer_name": self.config.optimizer.name,
        }

    def _finish(self) -> dict[str, Any]:
        meter, losses = self.meter, self.meter.val_losses
        result = {
            "status": "finished",
            "optimizer": self.config.optimizer.name,
            "seed": self.config.seed,
            **self._final_losses(),
            "best_val_loss": min(losses),
            "steps": self.step,
            "tokens": meter.tokens,
            "seconds": meter.seconds,
            "seconds_per_step": meter.seconds / self.step,
            "tokens_per_second": meter.tokens / meter.seconds,
            "optimizer_share": meter.clock.seconds / meter.seconds,
            "failed_roots": self.parallel.failed_roots(self.optimizer),
            "state_bytes": state_bytes(self.optimizer),
            "parameters": count_parameters(self.raw),
            "data": self.data.description,
            "command": command("asgo train", replace(self.config, resume=False)),
            "date": environment.now(),
        }
        if self.config.save_model:
            self._export(self.config.out / "model")
        self.folder.finish(result, draw_run(self.folder.metrics()))
        return result

    def _export(self, path: Path) -> None:
        self.parallel.export(self.raw, path)
        name, tokenizer = self.config.model.pretrained, getattr(self.data, "tokenizer", None)
        if not self.accelerator.is_main_process:
            return
        with writing(path):
            if name is not None:
                load_tokenizer(name).save_pretrained(path)
            elif isinstance(tokenizer, BpeTokenizer):
                as_pretrained(tokenizer.serialized).save_pretrained(path)
