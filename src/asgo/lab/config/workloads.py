"""Small runs with a name: what ``--workload`` starts `asgo train` and `asgo compare` from.

Each takes from ten seconds to a minute or two on one core, and is long enough that AdamW trains properly.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from asgo.lab.config.runs import CadenceConfig, CompareConfig, MachineConfig, ModelConfig, RunConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.data.tokenization import TokenizerConfig

ONE_THREAD = MachineConfig(device="cpu", threads=1)


def _every(steps: int, blocks: int) -> CadenceConfig:
    """Validation every so many steps, all at the end on four times the blocks."""
    return CadenceConfig(eval_every=steps, eval_blocks=blocks, final_eval_blocks=4 * blocks, checkpoint_every=400)


WORKLOADS: dict[str, RunConfig] = {
    "shakespeare": RunConfig(
        data=DataConfig(block_size=64, batch_size=8),
        model=ModelConfig(layers=2, heads=2, width=64),
        machine=ONE_THREAD,
        cadence=_every(50, 128),
        steps=1200,
    ),
    "shakespeare-128": RunConfig(
        data=DataConfig(block_size=128, batch_size=16),
        model=ModelConfig(preset="demo"),
        cadence=CadenceConfig(log_every=10, eval_every=25, eval_blocks=128, final_eval_blocks=0, checkpoint_every=150),
        steps=300,
    ),
    "bpe": RunConfig(
        data=DataConfig(
            CorpusConfig("botocore", validation_fraction=0.05),
            TokenizerConfig("bpe", 1024),
            block_size=64,
            batch_size=8,
        ),
        model=ModelConfig("llama-tiny", heads=4, kv_heads=2, width=64),
        machine=ONE_THREAD,
        cadence=_every(50, 128),
        steps=800,
    ),
    "experts": RunConfig(
        data=DataConfig(block_size=64, batch_size=8),
        model=ModelConfig("olmoe-tiny"),
        machine=ONE_THREAD,
        cadence=_every(50, 128),
        steps=500,
    ),
    "vit": RunConfig(
        data=DataConfig(CorpusConfig("fashion-mnist"), batch_size=32),
        model=ModelConfig("vit"),
        machine=ONE_THREAD,
        cadence=_every(25, 500),
        steps=400,
    ),
    "resnet": RunConfig(
        data=DataConfig(CorpusConfig("fashion-mnist"), batch_size=32),
        model=ModelConfig("resnet"),
        machine=ONE_THREAD,
        cadence=_every(25, 500),
        steps=300,
    ),
    "finetune": RunConfig(
        data=DataConfig(block_size=64, batch_size=8),
        model=ModelConfig(pretrained="runs/pretrained/model"),
        machine=ONE_THREAD,
        cadence=_every(25, 128),
        steps=300,
    ),
}
"""By name: characters of Shakespeare with a GPT-2 of width 64 and with one of width 128, byte pairs of botocore's
documentation with a Llama, characters of Shakespeare with 32 experts in each of two layers (OLMoE), Fashion-MNIST with
a ViT and a ResNet, and Shakespeare again with what ``asgo train --workload bpe --optimizer.name adamw --steps 1500
--save-model --out runs/pretrained`` has made."""

_shakespeare = WORKLOADS["shakespeare"]
DEMO = CompareConfig(
    **{field.name: getattr(_shakespeare, field.name) for field in fields(RunConfig)},
    optimizers=(
        "asgo:lr=0.0198769,weight_decay=0.0789324,adamw_lr=0.0103499,betas=0.912507/0.2,name=asgo",
        "adamw:lr=0.00444062,weight_decay=0.442577,betas=0.637877/0.95,steps_factor=2,name=adamw",
        "muon:lr=0.0283957,weight_decay=0.0789324,adamw_lr=0.0103499,momentum=0.912507,name=muon",
    ),
    seeds=(0, 1, 2),
    target="2.03",
    jobs=2,
    out=Path("runs/demo"),
)
"""The comparison of ``asgo demo``: three optimizers with what a search of the same budget chose for each, recorded in
``benchmarks/evidence/shakespeare-16``. AdamW has twice the steps, as it is far from done after those of the others.

The target is the loss of a trigram model of the same text, in nats per character.
"""
