"""What a run is: frozen dataclasses whose fields are the command's flags and the lines of ``config.json``.

`RunConfig` holds what all runs of a comparison share; `TrainConfig` adds one optimizer and one seed,
`CompareConfig` several of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from asgo.lab.config.ranges import BLOCKS, NOT_NEGATIVE, SEED, STEPS, THREADS, Range
from asgo.lab.data.batches import DataConfig
from asgo.lab.errors import LabError
from asgo.lab.models.architectures import Preset


@dataclass(frozen=True)
class ModelConfig:
    """The model; a field left at None keeps the preset's value.

    Args:
        preset: shape to start from; layers x width: tiny 2x32, demo 4x128, small 6x384, 124m 12x768; olmoe-tiny
            2x64 with 32 experts a layer; for images vit 3x64 and resnet 3x64.
        family: architecture: gpt2 (learned positions, GELU) or llama (rotary positions, gated MLP); for images vit
            (patches of 7 x 7 pixels) or resnet (batch normalisation).
        layers: number of transformer blocks; resnet: of stages, each with twice the channels of the one before.
        heads: attention heads; must divide width.
        kv_heads: key and value heads of llama's grouped-query attention; must divide heads.
        width: size of the residual stream; resnet: channels of the last stage.
        dropout: probability of dropping an activation (llama: an attention weight) while training.
        tie_embeddings: use the embedding matrix as output head too.
        config: a config.json of Hugging Face, or a folder with one, of any causal language model, instead of
            preset and fields; weights are random, and the size of the vocabulary comes from the data.
        pretrained: a causal language model of Hugging Face with its weights and its tokenizer: a folder, a .gguf
            file, or OWNER/NAME of the hub. layers, lora_rank and dtype go with it: only the first so many layers.
        lora_rank: with pretrained, train a pair of factors of this rank beside every linear layer (package peft), and
            nothing else; 0: train everything.
        dtype: of the weights; bfloat16 halves their memory. See --precision for the arithmetic.
    """

    preset: Preset = "demo"
    family: Literal["gpt2", "llama", "vit", "resnet"] | None = None
    layers: Annotated[int | None, Range(1, 1e4, "a number of blocks")] = None
    heads: Annotated[int | None, Range(1, 1e4, "a number of heads")] = None
    kv_heads: Annotated[int | None, Range(1, 1e4, "a number of heads")] = None
    width: Annotated[int | None, Range(1, 1e6, "the size of the residual stream")] = None
    dropout: Annotated[float, Range(0, 0.99, "a probability below 1")] = 0.0
    tie_embeddings: bool | None = None
    config: Path | None = None
    pretrained: str | None = None
    lora_rank: Annotated[int, Range(0, 1e5, "the rank of the factors; 0 means to train everything")] = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of the hidden matrices; embeddings, vectors and output head go to AdamW in all but adam-mini.

    Args:
        name: one of the names that asgo optimizers lists.
        lr: peak learning rate; None: the recorded default of that optimizer.
        weight_decay: decoupled decay of the hidden matrices; None: the optimizer's recorded default.
        betas: decay rates of the two moments, for optimizers that have both; None: the optimizer's default.
        adamw_lr: peak learning rate of embeddings, vectors and head; None: the recorded default.
        options: other constructor arguments as key=value, as in nesterov=False precondition_frequency=2.
    """

    name: str = "asgo"
    lr: Annotated[float | None, NOT_NEGATIVE] = None
    weight_decay: Annotated[float | None, NOT_NEGATIVE] = None
    betas: tuple[float, float] | None = None
    adamw_lr: Annotated[float | None, NOT_NEGATIVE] = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: a linear rise to its peak, then a fall.

    Args:
        kind: how it falls from the peak: cosine, linear, or constant (not at all).
        warmup_fraction: share of the steps that rise linearly from zero.
        final_lr_fraction: learning rate of the last step, as a share of the peak.
    """

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Annotated[float, Range(0, 1, "a share of the steps")] = 0.1
    final_lr_fraction: Annotated[float, Range(0, 1, "a share of the peak")] = 0.02


@dataclass(frozen=True)
class MachineConfig:
    """Where and in what arithmetic a run computes.

    Args:
        device: auto: what accelerate finds (a GPU before the CPU); cpu: the CPU whatever there is.
        precision: mixed precision of forward and backward; parameters and optimizer state stay in fp32.
        compile: compile the model with torch.compile.
        threads: CPU threads of torch; None: torch's choice. Bit-exact resume needs the same number.
        parallel: how the processes of torchrun or accelerate launch divide a run. ddp: all hold everything and share
            the roots; zero1: they also divide the optimizer's state; fsdp2: and parameters and gradients.
    """

    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    threads: Annotated[int | None, THREADS] = None
    parallel: Literal["ddp", "zero1", "fsdp2"] = "ddp"


@dataclass(frozen=True)
class CadenceConfig:
    """How often a run reports, measures and saves, in steps.

    Args:
        log_every: steps between lines of training metrics; each carries the mean loss since the last.
        eval_every: steps between validation losses; the start and the last step always have one.
        eval_blocks: validation blocks, or images, per measurement, the same ones each time; 0: all of them.
        final_eval_blocks: as many for the final validation loss, and of test images; None: as eval_blocks.
        checkpoint_every: steps between checkpoints, the most that kill -9 can lose; the last step has one.
        metrics_every: steps between metrics of every parameter (sizes of updates, weights and gradients) in the
            run's TensorBoard files, for optimizers of this library; 0: none.
    """

    log_every: Annotated[int, STEPS] = 10
    eval_every: Annotated[int, STEPS] = 100
    eval_blocks: Annotated[int, BLOCKS] = 128
    final_eval_blocks: Annotated[int | None, BLOCKS] = None
    checkpoint_every: Annotated[int, STEPS] = 200
    metrics_every: Annotated[int, Range(0, 1e9, "a number of steps; 0 means no metrics")] = 0


@dataclass(frozen=True)
class RunConfig:
    """What every run of a comparison has in common.

    Args:
        data: corpus, tokens and batches.
        model: the model.
        schedule: learning rate over the run.
        machine: device, precision, threads.
        cadence: how often to log, evaluate and save.
        steps: optimizer steps.
        grad_accumulation: batches whose gradients are averaged into one step.
        clip: largest norm of the whole gradient; 0: no clipping.
        tail_average: share of the steps, at the end, whose weights are averaged; losses are measured at the mean of
            those so far. 0: no average.
        lookahead: gradients are taken this many times the mean change of the weights ahead of them (EMA-Nesterov), at
            the largest learning rate; less as it falls, and not in the first sixth and the last quarter of the steps.
            0: at the weights.
    """

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)
    model: ModelConfig = ModelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    machine: Annotated[MachineConfig, tyro.conf.arg(name="")] = MachineConfig()
    cadence: Annotated[CadenceConfig, tyro.conf.arg(name="")] = CadenceConfig()
    steps: Annotated[int, STEPS] = 600
    grad_accumulation: Annotated[int, Range(1, 1e6, "a number of batches per step")] = 1
    clip: Annotated[float, Range(0, 1e12, "the largest gradient norm; 0 means no clipping")] = 1.0
    tail_average: Annotated[float, Range(0, 1, "a share of the steps")] = 0.0
    lookahead: Annotated[float, Range(0, 1e3, "a number of mean changes of the weights")] = 0.0

    @property
    def model_data(self) -> DataConfig:
        """The data with the tokenizer of a pretrained model.

        Raises:
            LabError: if another one is asked for.
        """
        name, tokenizer = self.model.pretrained, self.data.tokenizer
        if name is None:
            return self.data
        if tokenizer.kind not in ("auto", f"model:{name}"):
            raise LabError(
                f"--tokenizer.kind {tokenizer.kind}: the tokenizer of --model.pretrained is its own; leave it out."
            )
        return replace(self.data, tokenizer=replace(tokenizer, kind=f"model:{name}"))


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train one model with one optimizer; ``--workload NAME`` starts from the settings of a named small run.

    Args:
        optimizer: which optimizer, with which hyperparameters.
        seed: seed of the initial weights, the order of the data and dropout.
        out: run folder to write; must be new or empty, or a run to --resume.
        resume: continue the run in that folder, with its own configuration, from its last checkpoint.
        save_model: keep the trained model and its tokenizer in out/model as Hugging Face does, for
            --model.pretrained and from_pretrained; with lora_rank, the factors alone.
    """

    optimizer: OptimizerConfig = OptimizerConfig()
    seed: Annotated[int, SEED] = 0
    out: Path = Path("runs/train")
    resume: bool = False
    save_model: bool = False


@dataclass(frozen=True)
class CompareConfig(RunConfig):
    """Compare optimizers over seeds: one seed gives all of them the same initial weights and batches.

    ``--workload NAME`` starts from the settings of a named small run.

    Args:
        optimizers: names, or name:key=value,... as in adamw:lr=0.003,weight_decay=0.1,betas=0.9/0.95; steps_factor=2
            runs one for twice the steps, name=tuned is what reports call it.
        seeds: seeds of the runs that are compared.
        tune: learning rates tried per optimizer before the comparison, the same number for each; 0: none.
        search: trials per optimizer, the same number for each, over lr, momentum, weight decay and AdamW's lr: short
            runs of a quarter of the steps, the best quarter of them again in full; 0: no search. 24 is a fair start.
        tune_seed: seed of the runs of tune and search; keep it out of seeds.
        reference: the entry of optimizers that all others are tested against; None: every two are.
        target: validation loss for steps-to-target; auto: the worst final loss of the finished runs, so
            that each of them reaches it.
        jobs: runs at once, each in a process of its own with one thread; 1: in this process.
        out: folder of the comparison; must be new or empty, or a comparison to --resume.
        resume: continue an interrupted comparison; finished runs are not repeated.
    """

    optimizers: tuple[str, ...] = ("asgo", "adamw", "muon")
    seeds: Annotated[tuple[int, ...], SEED] = (0, 1, 2)
    tune: Annotated[int, Range(0, 1000, "a number of learning rates; 0 means no tuning")] = 0
    search: Annotated[int, Range(0, 10000, "a number of trials; 0 means no search")] = 0
    tune_seed: Annotated[int, SEED] = 1000
    reference: str | None = None
    target: str = "auto"
    jobs: Annotated[int, Range(1, 4096, "a number of processes")] = 1
    out: Path = Path("runs/compare")
    resume: bool = False
