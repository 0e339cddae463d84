"""``asgo inspect gradients``: a training run whose gradients, statistics and updates are sampled on the way.

Beside what `asgo train` leaves in a run folder::

    gradients.json      the configuration            by-layer.png  by-step.png  spectra.png
    samples/            a file for each sampled step  gradients.csv  every matrix at every sampled step
    table.md            what the last sample says    spectra.npz    every singular value
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from torch import Tensor

from asgo.diagnostics import GradientProbe, Sample
from asgo.lab import tables
from asgo.lab.config.codec import command, to_json
from asgo.lab.config.ranges import STEPS, Range
from asgo.lab.config.runs import OptimizerConfig, RunConfig, TrainConfig
from asgo.lab.data.sampling import Batches
from asgo.lab.errors import Diverged, LabError
from asgo.lab.files import finite, make_folder, read_json, write_json, write_results
from asgo.lab.inspection.gradient_tables import COLUMNS, Series, cells, csv_text, notes, spectra
from asgo.lab.inspection.run import run_of
from asgo.lab.models.language import token_loss
from asgo.lab.terminal import say
from asgo.lab.training.progress import RunProgress
from asgo.lab.training.run_folder import RunFolder, check_out
from asgo.lab.training.stopping import Stopped, StopSignal
from asgo.lab.training.train import Trainer
from asgo.optimizer.step import structured

MARKER = "gradients.json"


@dataclass(frozen=True)
class GradientsConfig(RunConfig):
    """Train a model and sample its gradients: spectra, ranks, noise, roots and updates, by layer and by step.

    Args:
        steps: optimizer steps.
        optimizer: which optimizer of this library, with which hyperparameters.
        seed: seed of the initial weights, the order of the data and dropout.
        sample_every: steps between samples; the first step is sampled too.
        microbatches: parts of a batch, by which noise is separated from signal; with --grad-accumulation above 1 the
            accumulated batches are taken instead. 1: no noise is measured.
        out: run folder to write; must be new or empty, or one to --resume.
        resume: continue the run in that folder, with its own configuration; what was sampled is kept.
    """

    steps: int = 300
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    sample_every: Annotated[int, STEPS] = 50
    microbatches: Annotated[int, Range(1, 1e6, "a number of parts of a batch; 1 measures no noise")] = 8
    out: Path = Path("runs/gradients")
    resume: bool = False


def inspect_gradients(config: GradientsConfig, console: Console | None = None) -> list[Sample]:
    """Run it, or what is left of it, write pictures and tables, and return all samples.

    Raises:
        LabError: for a config, corpus or folder that does not fit; nothing has been written then.
        Diverged: when the loss is NaN or infinite; what was sampled until then has been written.
        Stopped: after SIGINT or SIGTERM; samples and a checkpoint are kept.
    """
    console = console or Console(quiet=True)
    run = _check(config)
    diverged = None
    if RunFolder(config.out).result() is None:
        inspector = Inspector(config, run)
        make_folder(config.out / "samples")
        write_json(config.out / MARKER, to_json(replace(config, resume=False)))
        try:
            title = f"{run.optimizer.name} seed {run.seed}"
            with StopSignal() as stop, RunProgress(console, title, run.steps) as progress:
                inspector.run(stop, progress)
        except Diverged as error:
            diverged = error
        except Stopped as error:
            text = str(error).partition(" Continue with")[0]
            raise Stopped(f"{text} Continue with: asgo inspect gradients --out {config.out} --resume") from error
    samples = _conclude(config, console)
    if diverged is not None:
        raise diverged
    return samples


def _check(config: GradientsConfig) -> TrainConfig:
    """The training run that `config` describes, after all that can be refused beforehand."""
    run = run_of("asgo inspect gradients", config, config.optimizer, config.seed, config.out, config.resume)
    if config.grad_accumulation == 1 and config.data.batch_size % config.microbatches:
        raise LabError(
            f"--microbatches {config.microbatches} does not divide --batch-size {config.data.batch_size}: pass a "
            "divisor, or 1 to measure no noise."
        )
    check_out(config, MARKER, "set of samples")
    return run


class Inspector(Trainer):
    """A run whose optimizer has a probe; it trains bit for bit as `asgo train` does."""

    def __init__(self, config: GradientsConfig, run: TrainConfig) -> None:
        super().__init__(run)
        self.settings = config
        inside = structured(self.optimizer)
        if inside is None:
            raise LabError(
                f"--optimizer.name {run.optimizer.name} is not of this library: it keeps no statistic to look at. Pass "
                "asgo, or another of the first twelve that asgo optimizers lists."
            )
        self.inside = inside
        try:
            self.probe = GradientProbe(inside, config.sample_every)
        except ValueError as error:
            raise LabError(str(error)) from error

    def _begin(self, progress: RunProgress) -> None:
        super()._begin(progress)
        self.probe.close()
        self.probe = GradientProbe(self.inside, self.settings.sample_every, done=self.step)

    def _batch(self, batches: Batches, number: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super()._batch(batches, number)
        parts = self.settings.microbatches
        if self.probe.due and self.config.grad_accumulation == 1 and parts > 1:
            pairs = zip(inputs.chunk(parts), targets.chunk(parts), strict=True)
            self.probe.split(token_loss(self.model, x, y) for x, y in pairs)
        return inputs, targets

    def _train_step(self) -> None:
        super()._train_step()
        if not self.probe.samples:
            return
        began, seconds = time.perf_counter(), self.probe.seconds
        rows = [asdict(sample) for sample in self.probe.samples]
        path = self.config.out / "samples" / f"step-{self.step:08d}.json"
        write_json(path, finite({"step": self.step, "seconds": seconds, "samples": rows}))
        self.probe.samples.clear()
        self.probe.seconds = time.perf_counter() - began  # writing counts, for the sample to come


# ---- what is left in the folder --------------------------------------------------------------------------------


def read_samples(folder: Path) -> tuple[list[Sample], float]:
    """All samples in a folder, in order, and how many seconds they took."""
    files = [read_json(path) for path in sorted((folder / "samples").glob("step-*.json"))]
    rows = [row | {"singular_values": tuple(row["singular_values"])} for file in files for row in file["samples"]]
    return [Sample(**row) for row in rows], sum(file["seconds"] for file in files)


def _conclude(config: GradientsConfig, console: Console) -> list[Sample]:
    samples, seconds = read_samples(config.out)
    if not samples:
        return []
    lines = [*notes(samples), *_share(config.out, seconds, samples)]
    table = cells(samples)
    series = Series.of(samples)
    pictures = {"by-layer.png": series.by_layer(), "by-step.png": series.by_step(), "spectra.png": series.spectra()}
    files = pictures | {"gradients.csv": csv_text(samples), "spectra.npz": spectra(samples)}
    title = f"Step {samples[-1].step}: means over layers and heads"
    words = f"`{command('asgo inspect gradients', replace(config, resume=False))}`"
    text = "\n\n".join([words, title + ".", tables.markdown(COLUMNS, table), "\n".join(f"- {line}" for line in lines)])
    write_results(config.out, files | {"table.md": text + "\n"})
    shown = [i for i, name in enumerate(COLUMNS) if name not in ("matrices", "shape")]  # as wide as a terminal
    head, rows = [COLUMNS[i] for i in shown], [[row[i] for i in shown] for row in table]
    console.print(tables.rich_table(head, rows, title))
    say(console, *lines, *(config.out / name for name in files))
    return samples


def _share(out: Path, seconds: float, samples: Sequence[Sample]) -> list[str]:
    """What sampling cost beside training, which the run's own clock includes."""
    metrics: list[dict[str, Any]] = [line for line in RunFolder(out).metrics() if "seconds" in line]
    if not metrics:
        return []
    training = metrics[-1]["seconds"] - seconds
    steps = len({sample.step for sample in samples})
    if training <= 0:
        return []
    share = f"{100 * seconds / training:.1f} %"
    return [f"{steps} samples took {seconds:.1f} s, {share} of the {training:.1f} s of the {metrics[-1]['step']} steps"]
