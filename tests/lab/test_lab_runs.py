"""A run folder explains itself, and a run that is stopped, killed or starved goes on to the same numbers."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from asgo import checkpoint
from asgo.lab.config.codec import command, from_json, to_json
from asgo.lab.config.runs import CadenceConfig, MachineConfig, ModelConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import Diverged, LabError
from asgo.lab.models.architectures import PRESETS
from asgo.lab.models.language import build_model, count_parameters, model_fingerprint, token_loss
from asgo.lab.optimizers.composite import Composite
from asgo.lab.optimizers.factories import split
from asgo.lab.optimizers.registry import OPTIMIZERS, build_optimizer, resolve, state_bytes
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.schedule import factor
from asgo.lab.training.stopping import Stopped
from asgo.lab.training.train import Trainer, train

TIMES = ("seconds", "optimizer_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A text file of 20,000 characters that a model can learn something from."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps"]
    text = " ".join(random.Random(0).choices(words, k=4500))[:20_000]
    path = tmp_path_factory.mktemp("corpus") / "fox.txt"
    path.write_text(text)
    return path


@pytest.fixture
def config(corpus, tmp_path):
    return TrainConfig(
        data=DataConfig(corpus=CorpusConfig(name=str(corpus)), block_size=16, batch_size=2),
        model=ModelConfig(preset="tiny", dropout=0.1),
        machine=MachineConfig(device="cpu", threads=1),
        cadence=CadenceConfig(log_every=2, eval_every=4, eval_blocks=4, checkpoint_every=3),
        steps=8,
        out=tmp_path / "run",
    )


def numbers(folder):
    """The metrics of a run without those that a clock decides."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(folder).metrics()]


def weights(folder):
    state = RunFolder(folder).load()
    assert state is not None
    return state["step"], state["model"], state["optimizer"]


def assert_same_run(one, other):
    assert numbers(one) == numbers(other)
    assert same(weights(one), weights(other))


def same(a, b):
    """Equal structure and equal bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what a run leaves ------------------------------------------------------------------------------


def curves(folder):
    """What TensorBoard shows of a run: the steps and values of every curve."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_metrics(config):
    pytest.importorskip("tensorboard")
    config = replace(config, cadence=replace(config.cadence, metrics_every=4))
    train(config)
    found = curves(config.out)
    lines = RunFolder(config.out).metrics()
    assert found["loss"] == pytest.approx({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert found["val_loss"] == pytest.approx({line["step"]: line["val_loss"] for line in lines if "val_loss" in line})
    ratios = {tag: points for tag, points in found.items() if tag.startswith("ratio/")}
    model = Trainer(replace(config, out=config.out / "other")).raw
    assert set(ratios) == {f"ratio/{name}" for name, _ in model.named_parameters()}
    assert all(set(points) == {4, 8} for points in ratios.values())


def test_an_optimizer_of_torch_has_no_metrics_of_parameters(config):
    pytest.importorskip("tensorboard")
    train(replace(config, optimizer=OptimizerConfig("adamw"), cadence=replace(config.cadence, metrics_every=4)))
    assert not any("/" in tag for tag in curves(config.out))


def test_metrics_change_no_run(config):
    watched = replace(config, cadence=replace(config.cadence, metrics_every=1), out=config.out.parent / "watched")
    train(config)
    train(watched)
    assert_same_run(config.out, watched.out)


def test_run_folder_explains_itself(config):
    result = train(config)
    names = {p.name for p in config.out.iterdir()}
    expected = {"config.json", "environment.json", "routing.txt", "metrics.jsonl", "checkpoints", "curve.png"}
    assert names - {"tensorboard"} == expected | {"result.json"}
    assert from_json(TrainConfig, json.loads((config.out / "config.json").read_text())) == replace(
        config, optimizer=resolve(config.optimizer)
    )
    environment = json.loads((config.out / "environment.json").read_text())
    (session,) = environment["sessions"]
    assert session["packages"]["torch"] == torch.__version__
    assert session["threads"] == 1
    assert environment["command"].startswith("asgo train --")
    assert "transformer.h.1.mlp.c_fc.weight" in (config.out / "routing.txt").read_text()
    assert (config.out / "curve.png").read_bytes().startswith(b"\x89PNG")
    saved = [p.name for p in (config.out / "checkpoints").iterdir()]
    assert sorted(saved) == ["step-00000006.pt", "step-00000008.pt"]

    lines = RunFolder(config.out).metrics()
    training, evaluations = ([x for x in lines if key in x] for key in ("loss", "val_loss"))
    assert [x["step"] for x in training] == [2, 4, 6, 8]
    assert [x["step"] for x in evaluations] == [0, 4, 8]
    assert [x["tokens"] for x in training] == [64, 128, 192, 256]
    for line in training:
        assert line["lr"] == pytest.approx(OPTIMIZERS["asgo"].lr * factor(config.schedule, line["step"] - 1, 8))
        assert line["failed_roots"] == 0
        assert line["grad_norm"] > 0
        assert 0 < line["optimizer_seconds"] < line["seconds"]
        assert line["tokens_per_second"] > 0
    assert result == json.loads((config.out / "result.json").read_text())
    assert result["val_loss"] == evaluations[-1]["val_loss"]
    assert result["best_val_loss"] == min(x["val_loss"] for x in evaluations)
    assert result["seconds"] == training[-1]["seconds"]
    assert 0 < result["optimizer_share"] < 1


def test_a_finished_run_is_only_read(config):
    first = train(config)
    before = contents(config.out)
    assert train(replace(config, resume=True)) == first
    assert contents(config.out) == before


def test_training_learns(config):
    result = train(replace(config, steps=60, cadence=CadenceConfig(eval_every=60)))
    start = RunFolder(config.out).metrics()[0]["val_loss"]
    assert result["val_loss"] < 0.75 * start


def test_plain_progress_lines(config, capsys):
    train(config, Console(width=200), "a title")
    line = capsys.readouterr().out.splitlines()[-1]
    for part in ("a title", "step 8/8", "loss ", "val ", "tokens/s", "elapsed 0:00:", "left 0:00:00"):
        assert part in line


@pytest.mark.parametrize("name", ["sgd", "spam", "adam-mini", "soap", "torch-muon"])
def test_peers_of_every_kind_train(config, name):
    config = replace(config, optimizer=OptimizerConfig(name=name), grad_accumulation=2, clip=0.0, steps=3)
    result = train(config)
    assert result["tokens"] == 3 * 2 * 2 * 16
    assert result["state_bytes"] > 4 * result["parameters"]
    assert "transformer.wte.weight" in (config.out / "routing.txt").read_text()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_losses_at_the_mean_of_the_last_weights(config, monkeypatch, share):
    """That of an average of the weights seen, to the bit of float32; a resumed run has it from its checkpoint."""
    config = replace(config, tail_average=share, cadence=replace(config.cadence, checkpoint_every=5))
    original, seen = Trainer._train_step, []

    def train_step(self):
        original(self)
        seen.append({key: value.double().clone() for key, value in self.raw.state_dict().items()})
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", train_step)
        with pytest.raises(Stopped):
            train(config)
        result = train(replace(config, resume=True))
    last = seen[-round(share * config.steps) :]
    trainer = Trainer(replace(config, out=config.out.with_name("other"), tail_average=0.0))
    trainer.raw.load_state_dict({key: sum(each[key] for each in last) / len(last) for key in last[0]})
    assert result["val_loss"] == pytest.approx(trainer._validate(config.cadence.eval_blocks)["val_loss"], rel=1e-6)
    with pytest.raises(LabError, match="pass another --parallel than fsdp2"):
        Trainer(replace(config, machine=replace(config.machine, parallel="fsdp2")))


def test_llama_in_bf16(config):
    config = replace(
        config,
        model=ModelConfig(preset="llama-tiny"),
        machine=replace(config.machine, precision="bf16"),
        schedule=ScheduleConfig(kind="constant"),
    )
    assert train(config)["status"] == "finished"


# ---- stop, kill, starve, and go on ------------------------------------------------------------------


def stop_at(monkeypatch, step, act):
    """Let `act` happen in the middle of step number `step`."""
    original = Trainer._train_step

    def train_step(self):
        original(self)
        if self.step == step:
            act()

    monkeypatch.setattr(Trainer, "_train_step", train_step)


@pytest.mark.parametrize(("name", "number"), [("asgo", signal.SIGINT), ("adamw", signal.SIGTERM)])
def test_stopped_by_a_signal_and_resumed(config, tmp_path, monkeypatch, name, number):
    config = replace(config, optimizer=OptimizerConfig(name=name))
    train(config)
    stopped = replace(config, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Stopped, match=r"after step 5 of 8; .* asgo train --out .*stopped --resume"):
            train(stopped)
    assert RunFolder(stopped.out).saved()[-1].name == "step-00000005.pt"
    train(replace(stopped, resume=True))
    assert_same_run(config.out, stopped.out)
    sessions = json.loads((stopped.out / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 5]


class Killed(BaseException):
    """Stands for a process that is gone: nothing in the harness may catch it."""


@pytest.mark.parametrize("step", [1, 4])
def test_killed_between_checkpoints_and_resumed(config, tmp_path, monkeypatch, step):
    train(config)
    killed = replace(config, out=tmp_path / "killed", resume=True)

    def act():
        raise Killed

    with monkeypatch.context() as patch:
        stop_at(patch, step, act)
        with pytest.raises(Killed):
            train(killed)
    with (killed.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a line that was being written
    train(killed)
    assert_same_run(config.out, killed.out)


def test_killed_while_a_checkpoint_is_written(config, tmp_path, monkeypatch):
    train(config)
    killed = replace(config, out=tmp_path / "killed", resume=True)
    replaced = os.replace

    def killing(source, target):
        if "step-00000006" in str(target):
            raise Killed
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            train(killed)
    assert RunFolder(killed.out).saved()[-1].name == "step-00000003.pt"
    train(killed)
    assert_same_run(config.out, killed.out)


@pytest.mark.slow
def test_sigkill_at_a_random_moment_and_resumed(config, tmp_path):
    cadence = CadenceConfig(log_every=1, eval_every=50, eval_blocks=4, checkpoint_every=7)
    config = replace(config, steps=45, cadence=cadence)
    killed = replace(config, out=tmp_path / "killed")
    words = [sys.executable, "-m", "asgo.lab", *command("asgo train", killed).split()[1:]]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wanted = random.randrange(3, 36)
    while len(RunFolder(killed.out).metrics()) < wanted and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (killed.out / "result.json").exists()
    train(replace(killed, resume=True))
    train(config)
    assert_same_run(config.out, killed.out)


def test_full_disk_keeps_the_last_checkpoint(config, monkeypatch):
    def full(state, path):
        if state["step"] > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    save = checkpoint.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(LabError, match=r"cannot write .*step-00000006\.pt: No space left .*--resume"):
            train(config)
    assert weights(config.out)[0] == 3
    assert train(replace(config, resume=True))["steps"] == 8


def test_a_file_system_that_refuses_large_files(config, tmp_path):
    train(replace(config, out=tmp_path / "whole"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(LabError, match=r"cannot write .*step-00000003\.pt: File too large.*--resume"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((config.out / "checkpoints").iterdir())
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", config.out)


def test_a_folder_that_cannot_be_written(config, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LabError, match=r"cannot write .*run: Permission denied"):
        train(config)


# ---- what is refused --------------------------------------------------------------------------------


def test_a_used_folder_is_refused_and_kept(config):
    train(config)
    before = contents(config.out)
    with pytest.raises(LabError, match="already holds a run: pass --resume to continue it, or another --out"):
        train(config)
    assert contents(config.out) == before


def test_a_folder_of_something_else_is_refused(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(LabError, match="is not empty and holds no run"):
            train(replace(config, resume=resume))
    assert contents(config.out) == {"thesis.txt": b"precious"}
    with pytest.raises(LabError, match="is a file: pass a folder"):
        train(replace(config, out=config.out / "thesis.txt"))


def test_resuming_with_another_configuration_names_the_fields(config):
    train(config)
    before = contents(config.out)
    other = replace(config, steps=9, seed=1, resume=True)
    with pytest.raises(LabError, match=r"steps \(there 8, asked 9\), seed \(there 0, asked 1\)"):
        train(other)
    assert contents(config.out) == before


@pytest.mark.parametrize("what", ["model", "corpus", "optimizer"])
def test_a_checkpoint_of_something_else_is_refused(config, tmp_path, corpus, what):
    train(config)
    text = tmp_path / "other.txt"
    text.write_text(corpus.read_text()[::-1])
    other = {
        "model": replace(config, model=ModelConfig(preset="llama-tiny")),
        "corpus": replace(config, data=replace(config.data, corpus=CorpusConfig(name=str(text)))),
        "optimizer": replace(config, optimizer=OptimizerConfig(name="adamw")),
    }[what]
    other = replace(other, out=tmp_path / "other")
    train(other)
    foreign = RunFolder(config.out).saved()[-1]
    (other.out / "result.json").unlink()
    (other.out / "checkpoints" / "step-00000099.pt").write_bytes(foreign.read_bytes())
    before = contents(other.out)
    with pytest.raises(LabError, match=rf"step-00000099\.pt is of another {what}"):
        train(replace(other, resume=True))
    assert contents(other.out) == before


def test_a_damaged_checkpoint_is_named(config):
    train(config)
    (config.out / "result.json").unlink()
    last = RunFolder(config.out).saved()[-1]
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(LabError, match=r"cannot read the checkpoint .*step-00000008\.pt: .*Delete it"):
        train(replace(config, resume=True))
    last.unlink()
    assert train(replace(config, resume=True))["steps"] == 8


def test_a_loss_that_is_not_finite_stops_the_run(config):
    config = replace(
        config,
        optimizer=OptimizerConfig(name="sgd", lr=1e30),
        cadence=replace(config.cadence, log_every=1, checkpoint_every=1),
        schedule=ScheduleConfig(warmup_fraction=0.5),
        steps=40,
    )
    with pytest.raises(Diverged, match=r"loss is (nan|inf) at step \d+ \(sgd, lr 1e\+30\);.*smaller --optimizer.lr"):
        train(config)
    saved = RunFolder(config.out).load()
    assert saved is None or all(t.isfinite().all() for t in saved["model"].values())
    with pytest.raises(Diverged, match="diverged"):
        train(replace(config, resume=True))


# ---- parts ------------------------------------------------------------------------------------------


def test_config_survives_json(config):
    config = replace(config, optimizer=OptimizerConfig(betas=(0.9, 0.99), options=("nesterov=False",)))
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(LabError, match="unknown field 'colour' in a saved TrainConfig"):
        from_json(TrainConfig, {"colour": "red"})


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10, 999])
def test_schedule_rises_to_one_and_falls_to_its_end(kind, steps):
    schedule = ScheduleConfig(kind=kind)
    factors = [factor(schedule, step, steps) for step in range(steps)]
    peak = factors.index(max(factors))
    assert max(factors) == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if kind != "constant" and steps > 1:
        assert factors[-1] == pytest.approx(0.02)


@pytest.mark.parametrize("preset", ["tiny", "llama-tiny"])
def test_models_are_decided_by_the_seed(preset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build_model(ModelConfig(preset=preset), 50, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one.state_dict(), two.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    assert model_fingerprint(one) == model_fingerprint(other)
    tokens = torch.randint(50, (4, 8))
    loss = token_loss(one, tokens, tokens.roll(-1, 1))
    assert loss.item() == pytest.approx(torch.tensor(50.0).log().item(), abs=0.2)


def test_presets_have_the_sizes_they_are_named_for():
    with torch.device("meta"):
        assert count_parameters(build_model(ModelConfig(preset="gpt2-124m"), 50257, 1024, 0)) == 124_439_808
        for preset in PRESETS:
            build_model(ModelConfig(preset=preset), 100, 16, 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(width=30, heads=4), "--model.width 30 is not a multiple of --model.heads 4"),
        (ModelConfig(preset="llama-tiny", kv_heads=3), "--model.kv-heads 3 does not divide --model.heads 4"),
        (ModelConfig(kv_heads=2), "--model.kv-heads is for llama"),
        (ModelConfig(preset="llama-tiny", width=12), "needs? an even size|heads of odd size 3"),
        (ModelConfig(preset="huge"), "model preset 'huge' does not exist: choose from tiny, demo"),  # pyright: ignore
    ],
)
def test_models_that_do_not_fit(model, message):
    with pytest.raises(LabError, match=message):
        build_model(model, 50, 8, 0)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (OptimizerConfig(name="adam"), "'adam' does not exist: choose from " + ", ".join(OPTIMIZERS)),
        (OptimizerConfig(options=("beta=1",)), "asgo has no option 'beta': it has .*cross_normalize"),
        (OptimizerConfig(options=("nesterov",)), "'nesterov' is not key=value"),
        (OptimizerConfig(name="muon", betas=(0.9, 0.9)), "muon has no betas"),
        (OptimizerConfig(options=("eps=-1",)), "optimizer asgo: .*eps"),
        (OptimizerConfig(name="adamw", betas=(0.9, 2.0)), "optimizer adamw: .*beta"),
    ],
)
def test_optimizers_that_do_not_exist(optimizer, message):
    with pytest.raises(LabError, match=message):
        build_optimizer(build_model(ModelConfig(preset="tiny"), 50, 8, 0), optimizer)


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_fused_torch_muon_is_torch_muon_beside_adamw():
    ours, theirs = (build_model(ModelConfig(preset="tiny"), 50, 8, 0) for _ in range(2))
    optimizer = build_optimizer(ours, OptimizerConfig(name="torch-muon-fused", lr=0.01, adamw_lr=0.002))
    assert isinstance(optimizer, Composite)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    matrices, rest = split(theirs)
    muon = Muon(matrices, lr=0.01, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(rest, lr=0.002, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = (0.01 if group in muon.param_groups else 0.002) / (1 + step)
        optimizer.step()
        schedule.step()
        muon.step()
        adamw.step()
    assert same(ours.state_dict(), theirs.state_dict())
    assert state_bytes(optimizer) == sum(map(state_bytes, (muon, adamw)))


def test_composite_state_survives():
    model, twin = (build_model(ModelConfig(preset="tiny"), 50, 8, 0) for _ in range(2))
    one, two = (build_optimizer(m, OptimizerConfig(name="torch-muon")) for m in (model, twin))
    gradients(model, 0)
    one.step()
    twin.load_state_dict(model.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for m, optimizer in ((model, one), (twin, two)):
        optimizer.zero_grad()
        assert all(p.grad is None for p in m.parameters())
        gradients(m, 1)
        optimizer.step()
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_routes_alike(name):
    model = build_model(ModelConfig(preset="tiny"), 50, 8, 0)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.5, adamw_lr=0.25))
    rate = {
        parameter: group["lr"]
        for group in optimizer.param_groups
        for parameter in group.get("param_names", group["params"])
    }
    rate = {key.partition("#")[0] if isinstance(key, str) else key: lr for key, lr in rate.items()}
    matrices, rest = split(model)
    assert rate == {key: 0.5 for key, _ in matrices} | {key: 0.25 for key, _ in rest}
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    gradients(model, 0)
    optimizer.step()
    for key, param in model.named_parameters():
        assert param.isfinite().all(), key
        assert not torch.equal(param, before[key]), key
