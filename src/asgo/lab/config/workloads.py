"""Small runs with a name: what ``--workload`` starts `asgo train` and `asgo compare` from.

Each takes seconds to half a minute on one core, and is long enough that AdamW trains properly.
"""

from __future__ import annotations

from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig, RunConfig
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
"""By name: characters of Shakespeare with a GPT-2, byte pairs of botocore's documentation with a Llama, Fashion-MNIST
with a ViT and a ResNet, and Shakespeare again with what ``asgo train --workload bpe --optimizer.name adamw --steps 1500
--save-model --out runs/pretrained`` has made."""
