"""Gradients ahead of the weights: the recursion of the paper, in a loop of its own, and in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig, TrainConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import LabError
from asgo.lab.optimizers.spec import parse_entry
from asgo.lab.training.lookahead import EMANesterov
from asgo.lab.training.train import Trainer, train


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return TrainConfig(
        data=DataConfig(corpus=CorpusConfig(name=str(tmp_path / "text.txt")), block_size=16, batch_size=2),
        model=ModelConfig(preset="tiny"),
        machine=MachineConfig(device="cpu", threads=1),
        cadence=CadenceConfig(eval_every=100, eval_blocks=4, checkpoint_every=5),
        steps=8,
        out=tmp_path / "run",
        lookahead=0.6,
    )


def test_steps_are_those_of_the_paper():
    """On a quadratic with gradient descent, against scalars in plain Python."""
    curvature, steps, lr, beta = [3.0, 0.5, 0.01], 64, 0.1, 0.7
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64))
    lookahead = EMANesterov([weight], beta, steps)
    seen = []
    for step in range(steps):
        factor = 1 - step / steps
        lookahead.before(step, factor)
        weight.data -= lr * factor * torch.tensor(curvature) * weight.data
        lookahead.after()
        seen.append(weight.tolist())
    for coordinate, a in enumerate(curvature):
        x, m = [1.0, -2.0, 5.0][coordinate], 0.0
        for step in range(steps):
            factor = 1 - step / steps
            ahead = beta * factor if steps / 6 <= step < 0.75 * steps else 0.0
            y = x + ahead * m
            after = y - lr * factor * a * y
            m, x = 0.5 * m + 0.5 * (after - x), after
            assert seen[step][coordinate] == pytest.approx(x, rel=1e-6, abs=1e-12)


def test_a_run_with_it_differs_and_goes_on_bit_for_bit(config, tmp_path, monkeypatch):
    whole = train(config)["val_loss"]
    assert whole != train(replace(config, out=tmp_path / "plain", lookahead=0.0))["val_loss"]
    original = Trainer._train_step

    def stops(self):
        if self.step == 6:
            raise KeyboardInterrupt
        original(self)

    config = replace(config, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert train(replace(config, resume=True))["val_loss"] == whole


def test_it_is_a_setting_of_an_entry_and_of_whole_weights(config):
    assert parse_entry("muon:lookahead=0.3").of_the_run() == {"lookahead": 0.3}
    assert parse_entry("muon").of_the_run() == {}
    with pytest.raises(LabError, match="lookahead must be from 0 to 1000"):
        parse_entry("muon:lookahead=-1")
    with pytest.raises(LabError, match="pass another --parallel than fsdp2"):
        Trainer(replace(config, machine=replace(config.machine, parallel="fsdp2")))
