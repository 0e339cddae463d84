"""`asgo lr`: loss against learning rate, the same number of runs for every optimizer, and nothing repeated."""

import json
import math
from dataclasses import replace

import pytest

from asgo.lab.cli import parse
from asgo.lab.compare import learning_rates as module
from asgo.lab.compare.learning_rates import RatesConfig, draw_rates, learning_rates
from asgo.lab.compare.tune import Tuning
from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import LabError


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return RatesConfig(
        data=DataConfig(corpus=CorpusConfig(name=str(path)), block_size=16, batch_size=2),
        model=ModelConfig(preset="tiny"),
        machine=MachineConfig(device="cpu", threads=1),
        cadence=CadenceConfig(eval_every=10**9, eval_blocks=4, checkpoint_every=10**9),
        steps=6,
        rates=3,
        out=tmp_path / "rates",
    )


def test_a_search_leaves_a_table_a_picture_and_its_runs(config, monkeypatch):
    results = learning_rates(config)
    for text in ("asgo", "adamw"):
        found = results["searches"][text]
        losses = dict(found["tried"])
        assert len(losses) == 3
        assert losses[found["lr"]] == min(losses.values())
        for lr, loss in losses.items():
            run = config.out / "runs" / text / f"lr-{lr:.6g}"
            assert json.loads((run / "result.json").read_text())["val_loss"] == loss
        assert f"| {text} | {found['lr']:.4g} | {min(losses.values()):.4f} |" in (config.out / "table.md").read_text()
    assert (config.out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((config.out / "results.json").read_text())["command"].startswith("asgo lr ")

    with pytest.raises(LabError, match="already holds a search: pass --resume"):
        learning_rates(config)
    with pytest.raises(LabError, match="another configuration"):
        learning_rates(replace(config, resume=True, steps=7))
    seen = []
    trained = module.train
    monkeypatch.setattr(module, "train", lambda run, *rest: seen.append(run.steps) or trained(run, *rest))
    assert learning_rates(replace(config, resume=True))["searches"] == results["searches"]
    assert seen == [6] * 6


def test_a_rate_that_diverges_is_no_point_and_no_end(config, monkeypatch):
    def train(run, *rest):
        if run.optimizer.lr > 0.005:
            raise module.Diverged("too large")
        return {"val_loss": abs(math.log2(run.optimizer.lr / 0.004))}

    monkeypatch.setattr(module, "train", train)
    for found in learning_rates(replace(config, rates=6))["searches"].values():
        assert 0.002 < found["lr"] <= 0.005


def test_a_picture_without_points():
    assert draw_rates({"asgo": Tuning(0.1, ((0.1, math.inf),), False)})[:4] == b"\x89PNG"


def test_the_command(tmp_path):
    config = parse(["lr", "--model.preset", "tiny", "--rates", "5", "--out", str(tmp_path / "x")])
    assert (type(config), config.rates, config.optimizers) == (RatesConfig, 5, ("asgo", "adamw"))
    with pytest.raises(LabError, match="rates"):
        learning_rates(replace(config, rates=0))
