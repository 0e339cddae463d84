"""asgo inspect gradients and asgo inspect advise: what they leave, what they refuse, how they go on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from asgo.diagnostics import Sample
from asgo.lab.cli import main
from asgo.lab.compare.compare import compare
from asgo.lab.config.runs import CadenceConfig, CompareConfig, MachineConfig, ModelConfig, OptimizerConfig, TrainConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import Diverged, LabError
from asgo.lab.inspection.advice import AdviceConfig, inspect_advise
from asgo.lab.inspection.gradient_tables import kind_of, kinds, mean, notes
from asgo.lab.inspection.gradients import GradientsConfig, Inspector, inspect_gradients, read_samples
from asgo.lab.models.language import build_model, count_parameters
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Trainer, train

NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
FILES = {"by-layer.png", "by-step.png", "spectra.png", "gradients.csv", "spectra.npz", "table.md", "gradients.json"}


@pytest.fixture
def drawn():
    """Asked for by the tests whose pictures are drawn; they cost more than the rest together."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        for module in ("gradient_tables", "advice"):
            monkeypatch.setattr(f"asgo.lab.inspection.{module}.png", lambda figure: bytes(300))


@pytest.fixture
def shared(colours, tmp_path):
    return {
        "data": DataConfig(corpus=CorpusConfig(name=str(colours)), block_size=16, batch_size=4),
        "model": ModelConfig(preset="tiny", dropout=0.1),
        "machine": MachineConfig(device="cpu", threads=1),
        "cadence": CadenceConfig(log_every=2, eval_every=4, eval_blocks=4, checkpoint_every=2),
        "steps": 6,
        "out": tmp_path / "run",
    }


@pytest.fixture
def config(shared):
    return GradientsConfig(**shared, sample_every=2, microbatches=2)


@pytest.mark.slow
def test_a_run_is_sampled_and_trains_as_without(config, tmp_path, capsys, drawn):
    samples = inspect_gradients(config, Console(width=80))
    shown = " ".join(capsys.readouterr().out.split())
    assert {p.name for p in config.out.iterdir()} >= FILES
    assert all((config.out / name).stat().st_size > 200 for name in FILES)
    for word in ("attn.c_attn[0]", "mlp.c_proj", "4 samples took", "by-layer.png"):
        assert word in shown
    assert sorted({s.step for s in samples}) == [1, 2, 4, 6]
    assert len(samples) == 4 * 2 * 6  # steps, layers, matrices
    assert all(s.note == "" and s.noise is not None and s.residual < 0.1 for s in samples)

    rows = list(csv.DictReader((config.out / "gradients.csv").open()))
    for row, sample in zip(rows, samples, strict=True):
        assert (row["name"], int(row["step"]), int(row["part"])) == (sample.name, sample.step, sample.part)
        assert float(row["stable_rank"]) == sample.stable_rank
    arrays = np.load(config.out / "spectra.npz")
    assert arrays["steps"].tolist() == [1, 2, 4, 6]
    values = arrays["transformer.h.1.mlp.c_fc.weight[0]"]
    assert values.shape == (4, 1, 32)
    for row, sample in zip(values[:, 0], (s for s in samples if "1.mlp.c_fc" in s.name), strict=True):
        assert tuple(row) == sample.singular_values
        assert sample.stable_rank == pytest.approx((row**2).sum() / row[0] ** 2)

    plain = TrainConfig(**{f: getattr(config, f) for f in ("data", "model", "machine", "cadence", "steps")})
    result = train(replace(plain, out=tmp_path / "plain"))
    assert result["val_loss"] == RunFolder(config.out).result()["val_loss"]


def test_interrupted_and_resumed_is_as_if_never_stopped(config, tmp_path, monkeypatch):
    whole = inspect_gradients(replace(config, out=tmp_path / "whole"))
    step = Trainer._train_step

    def stopping(self):
        step(self)
        if self.step == 5:
            raise KeyboardInterrupt  # between checkpoints, as kill does

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            inspect_gradients(config)
    assert len(read_samples(config.out)[0]) == 3 * 12
    with pytest.raises(LabError, match="already holds a set of samples: pass --resume"):
        inspect_gradients(config)
    resumed = inspect_gradients(replace(config, resume=True))
    for a, b in zip(whole, resumed, strict=True):
        assert a == b
    # what is finished is only drawn again
    (config.out / "by-step.png").unlink()
    monkeypatch.setattr(Inspector, "__init__", None)
    assert inspect_gradients(replace(config, resume=True)) == resumed
    assert (config.out / "by-step.png").exists()
    with pytest.raises(LabError, match="sample_every"):
        inspect_gradients(replace(config, resume=True, sample_every=3))


def test_stopped_says_how_to_go_on(config, monkeypatch):
    monkeypatch.setattr("asgo.lab.training.train.Trainer._agree", lambda self, asked: self.step == 3)
    with pytest.raises(Stopped, match=rf"Continue with: asgo inspect gradients --out {config.out} --resume"):
        inspect_gradients(config)


def test_what_was_sampled_before_a_divergence_is_kept(config, monkeypatch):
    step = Trainer._train_step

    def spoiled(self):
        if self.step == 3:
            next(self.raw.parameters()).data.fill_(float("nan"))
        step(self)

    monkeypatch.setattr(Trainer, "_train_step", spoiled)
    with pytest.raises(Diverged, match="loss is nan at step 4"):
        inspect_gradients(config)
    assert {p.name for p in config.out.iterdir()} >= FILES
    samples, _ = read_samples(config.out)
    by_step = {step: [s for s in samples if s.step == step] for step in (1, 2, 4)}
    assert all(s.note == "" for s in by_step[2])
    assert all(s.note == "gradient not finite" and s.stable_rank is None for s in by_step[4])
    assert all(s.failed_share == 0.25 for s in by_step[4])
    assert len(notes(samples)) == 8
    values = np.load(config.out / "spectra.npz")["transformer.h.0.mlp.c_fc.weight[0]"]
    assert np.isnan(values[2]).all()
    assert not np.isnan(values[:2]).any()


def test_gradient_accumulation_measures_noise_without_splitting(config, monkeypatch):
    monkeypatch.setattr("asgo.diagnostics.GradientProbe.split", None)
    samples = inspect_gradients(replace(config, grad_accumulation=3, steps=2, microbatches=3))
    assert all(s.noise > 0 for s in samples)


@pytest.mark.parametrize("name", ["shampoo", "bag", "asgo-paper"])
def test_other_optimizers(config, name):
    samples = inspect_gradients(replace(config, optimizer=OptimizerConfig(name=name), steps=2))
    assert all((s.residual is None) == (name == "bag") for s in samples)
    assert all(s.update_rms > 0 for s in samples if s.step == 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_every": 0}, "--sample-every 0 is out of range"),
        ({"microbatches": 0}, "--microbatches 0 is out of range"),
        ({"microbatches": 3}, "--microbatches 3 does not divide --batch-size 4: pass a divisor, or 1"),
        ({"optimizer": OptimizerConfig(name="torch-muon")}, "--optimizer.name torch-muon is not of this library"),
        ({"optimizer": OptimizerConfig(name="spam")}, "has no matrices, all of its parameters go to AdamW"),
        ({"optimizer": OptimizerConfig(name="asgo", lr=-1)}, "--optimizer.lr -1"),
        ({"optimizer": OptimizerConfig(options=("rules=nowhere.json",))}, "rules=nowhere.json cannot be read"),
        ({"model": ModelConfig(config=Path("nowhere"))}, "nowhere gives no causal language model: there is no such"),
        ({"model": ModelConfig(config=Path("x"), width=3)}, "leave the other --model flags out"),
    ],
)
def test_what_is_refused_leaves_nothing(config, change, message):
    with pytest.raises(LabError, match=message):
        inspect_gradients(replace(config, **change))
    assert not config.out.exists()


def test_a_model_without_matrices(config, tmp_path):
    rules = [{"match": "*", "view": None, "options": {}}]
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    options = (f"rules={tmp_path / 'rules.json'}",)
    with pytest.raises(LabError, match="has no matrices, all of its parameters go to AdamW"):
        inspect_gradients(replace(config, optimizer=OptimizerConfig(options=options)))
    assert not config.out.exists()


def test_kinds_and_layers():
    def sample(name, part=0, **values):
        return Sample(1, name, part, 0, 4, 4, **values)

    assert kind_of(sample("transformer.h.11.attn.c_attn.weight", 2)) == ("attn.c_attn[2]", 11)
    assert kind_of(sample("head.weight")) == ("head[0]", 0)
    assert kind_of(sample("net.2.weight")) == ("net.2[0]", 0)
    some = [sample("h.0.a.weight"), sample("h.0.b.weight"), sample("h.0.b.weight", 1), sample("h.1.a.weight")]
    assert {name: len(own) for name, own in kinds(some).items()} == {"a": 2, "b[0]": 1, "b[1]": 1}
    assert mean([sample("a", noise=1.0), sample("b"), sample("c", noise=3.0)], "noise") == 2
    assert mean(some, "noise") is None


# ---- models from a file --------------------------------------------------------------------------------------


def test_any_causal_model_of_hugging_face(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEOX))
    for place in (tmp_path, tmp_path / "config.json"):
        models = [build_model(ModelConfig(config=place), 11, 16, seed) for seed in (0, 0, 1)]
        first, again, other = ([p.detach() for p in model.parameters()] for model in models)
        assert all(map(torch.equal, first, again))
        assert not all(map(torch.equal, first, other))
        assert type(models[0]).__name__ == "GPTNeoXForCausalLM"
        assert count_parameters(models[0]) == sum(p.numel() for p in first)
    samples = inspect_gradients(replace(config, model=ModelConfig(config=tmp_path), steps=2))
    assert {kind_of(s)[0] for s in samples} >= {"attention.dense[0]", "mlp.dense_h_to_4h[0]"}
    with pytest.raises(LabError, match="it reads 64 tokens, --block-size is 65"):
        build_model(ModelConfig(config=tmp_path), 11, 65, 0)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(LabError, match="gives no causal language model"):
        build_model(ModelConfig(config=tmp_path), 11, 16, 0)


# ---- advice --------------------------------------------------------------------------------------------------


def test_advice_is_written_and_can_be_compared(shared, tmp_path, capsys, drawn):
    curvature = tmp_path / "curvature.json"
    curvature.write_text(json.dumps({"transformer.h.0.mlp.c_fc.weight": {"left": 3.0, "right": 1.5}}))
    config = AdviceConfig(**shared | {"out": tmp_path / "advice"}, after=3, batches=4, curvature=curvature)
    advice = inspect_advise(config, Console(width=200))
    shown = capsys.readouterr().out
    assert {p.name for p in config.out.iterdir()} == {
        *("advice.json", "rules.json", "against.json", "table.md", "table.csv", "results.json", "plot.png"),
    }
    assert len(advice.lines) == 8
    assert "statistic: " in shown
    assert "3.00/1.50" in shown
    rows = list(csv.DictReader((config.out / "table.csv").open()))
    for row, line in zip(rows, advice.lines, strict=True):
        assert (row["name"], row["view"], row["side"]) == (line.name, line.word, line.side)
        assert float(row["bound_whole_left"]) == line.evidence.bound["whole", "left"]
        assert float(row["noise_share"]) == line.evidence.noise_share
    with pytest.raises(LabError, match="is not empty, and nothing is overwritten"):
        inspect_advise(config)

    spec = f"asgo:rules={config.out / 'rules.json'}"
    shared = shared | {"out": tmp_path / "comparison", "steps": 2}
    results = compare(CompareConfig(**shared, optimizers=("asgo", spec), seeds=(0,)))
    assert [row["optimizer"] for row in results["rows"]] == ["asgo", spec]
    again = inspect_advise(replace(config, out=tmp_path / "again"))
    assert str(again) == str(advice)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": 1}, "--batches 1 is out of range"),
        ({"after": 7}, "--after 7 is more than --steps 6"),
        ({"curvature": Path("nowhere.json")}, "--curvature nowhere.json cannot be read"),
    ],
)
def test_advice_that_is_refused_leaves_nothing(shared, change, message):
    config = replace(AdviceConfig(**shared, after=1, batches=2), **change)
    with pytest.raises(LabError, match=message):
        inspect_advise(config)
    assert not config.out.exists()


def test_curvature_of_another_model(shared, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"lm_head.weight": {"left": 1, "right": 1}}))
    config = AdviceConfig(**shared, after=1, batches=2, curvature=tmp_path / "c.json")
    with pytest.raises(LabError, match="curvature names 'lm_head.weight', which is no matrix of the model"):
        inspect_advise(config)
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(LabError, match="holds no object"):
        inspect_advise(config)
    assert not config.out.exists()


def test_the_commands(colours, tmp_path, capsys):
    flags = f"--corpus.name {colours} --model.preset tiny --block-size 16 --batch-size 4 --steps 2 --device cpu"
    words = [*flags.split(), "--threads", "1", "--out", str(tmp_path / "run")]
    assert main(["inspect", "gradients", *words, "--microbatches", "2"]) == 0
    assert main(["inspect", "gradients", "--out", str(tmp_path / "run"), "--resume"]) == 0  # its own configuration
    assert main(["inspect", "advise", *words[:-1], str(tmp_path / "a"), "--after", "1", "--batches", "2"]) == 0
    capsys.readouterr()
    assert main(["inspect", "gradients", *words, "--microbatches", "3"]) == 2
    assert "asgo: error: --microbatches 3" in capsys.readouterr().err
