"""The command ``asgo``: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asgo import checkpoint
from asgo.lab.cli import TEXTS, main, parse
from asgo.lab.config.codec import command
from asgo.lab.config.runs import CompareConfig, ModelConfig, OptimizerConfig, TrainConfig
from asgo.lab.config.workloads import DEMO
from asgo.lab.data.batches import DataConfig
from asgo.lab.data.corpora import CorpusConfig
from asgo.lab.errors import Diverged, LabError
from asgo.lab.inspection.advice import AdviceConfig
from asgo.lab.inspection.gradients import GradientsConfig
from asgo.lab.models.language import build_model
from asgo.lab.optimizers.listing import OptimizersConfig, held_bytes
from asgo.lab.optimizers.registry import OPTIMIZERS, build_optimizer, state_bytes
from asgo.lab.terminal import exit_code
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.stopping import Stopped

WORDS = [
    "to",
    "be",
    "or",
    "not",
    "to",
    "be",
    "that",
    "is",
    "the",
    "question",
    "whether",
    "it",
    "is",
    "nobler",
    "in",
    "the",
    "mind",
    "to",
    "suffer",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "hamlet.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)))
    return path


@pytest.fixture
def tiny(corpus, tmp_path):
    """Flags of a run of 6 steps."""
    return (
        f"--corpus.name {corpus} --model.preset tiny --block-size 16 --batch-size 2 --steps 6 --log-every 2 "
        f"--eval-every 3 --eval-blocks 4 --checkpoint-every 2 --device cpu --threads 1 --out {tmp_path / 'run'}"
    ).split()


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails(capsys, words, message, code=2):
    """The command ends with one line on standard error that holds `message`."""
    capsys.readouterr()
    assert main(words) == code
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("asgo: error: ")
    assert message in line
    return line


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "asgo 0.1.0\n"
    for words in ([], ["--help"], ["train", "--help"], ["compare", "--help"], ["inspect", "--help"]):
        assert main(words) == 0
        assert "usage: asgo" in capsys.readouterr().out


def test_every_flag_is_explained(capsys):
    main(["train", "--help"])
    train_help = " ".join(capsys.readouterr().out.split())
    main(["compare", "--help"])
    for shown in (train_help, " ".join(capsys.readouterr().out.split())):
        for flag in ("--steps", "--clip", "--corpus.name", "--model.preset", "--log-every", "--out"):
            assert flag in shown
    assert "largest norm of the whole gradient" in train_help
    assert "steps between lines of training metrics" in train_help


def test_train_and_resume(capsys, tiny, tmp_path):
    assert main(["train", *tiny, "--optimizer.name", "muon"]) == 0
    out = capsys.readouterr().out
    assert "validation loss" in out
    assert str(tmp_path / "run") in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["optimizer"] == "muon"
    before = contents(tmp_path / "run")
    fails(capsys, ["train", *tiny], "already holds a run: pass --resume to continue it, or another --out")
    # the folder's own configuration stands in for flags that are not given
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    fails(
        capsys,
        ["train", "--out", str(tmp_path / "run"), "--resume", "--steps", "7", "--optimizer.name", "adamw"],
        "steps (there 6, asked 7), optimizer.name (there 'muon', asked 'adamw')",
    )
    assert contents(tmp_path / "run") == before


def test_pydoc_needs_no_file(tiny, tmp_path):
    words = [*tiny, "--corpus.name", "pydoc", "--steps", "2"]
    assert main(["train", *words]) == 0
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tarin", "Unrecognized options: tarin"),
        ("train --setps 4", "Unrecognized options: --setps"),
        ("train --steps many", "--steps"),
        ("train --model.preset giant", "--model.preset"),
        ("train --steps 0", "--steps 0 is out of range: pass a number of steps, from 1"),
        ("train --clip -1", "--clip -1.0 is out of range"),
        ("train --seed -1", "--seed -1 is out of range"),
        ("train --threads 0", "--threads 0 is out of range"),
        ("train --model.layers 0", "--model.layers 0 is out of range"),
        ("train --schedule.warmup-fraction 2", "--schedule.warmup-fraction 2.0 is out of range"),
        ("train --block-size 0", "--block-size 0 is out of range"),
        ("train --optimizer.lr -1", "--optimizer.lr -1.0 is out of range"),
        ("train --optimizer.name adam", "optimizer 'adam' does not exist: choose from asgo"),
        ("train --optimizer.options foo=1", "optimizer asgo has no option 'foo': it has"),
        ("train --optimizer.name muon --optimizer.betas 0.9 0.9", "optimizer muon has no betas"),
        ("train --optimizer.options precondition_frequency=0", "precondition_frequency"),
        ("train --model.width 31", "--model.width 31 is not a multiple of --model.heads 2"),
        ("train --precision fp16", "--precision fp16 needs a GPU"),
        ("train --corpus.name no/such/file", "corpus 'no/such/file' does not exist"),
        ("train --corpus.name {empty}", "is empty"),
        ("train --corpus.name {binary}", "is not text"),
        ("train --corpus.name {short}", "one block needs 17"),
        ("train --out {empty}", "is a file: pass a folder"),
        ("train --out {full}", "is not empty and holds no run"),
        ("compare --seeds", "--seeds"),
        ("compare --seeds 1 1", "--seeds 1 1 repeats an entry"),
        ("compare --optimizers", "--optimizers"),
        ("compare --optimizers adam", "optimizer 'adam' does not exist"),
        ("compare --optimizers adamw:lr", "'lr' is not key=value"),
        ("compare --optimizers adamw:lr=x", "'lr=x' is not a number"),
        ("compare --optimizers adamw:betas=0.9", "'betas=0.9' needs two numbers"),
        ("compare --optimizers adamw:foo=1", "optimizer adamw has no option 'foo'"),
        ("compare --target low", "--target 'low' is not a loss"),
        ("compare --tune 2 --seeds 1000", "--tune-seed 1000 is also one of --seeds"),
        ("compare --corpus.name {short}", "one block needs 17"),
        ("compare --out {full}", "is not empty and holds no comparison"),
        ("inspect routing --vocab-size 0", "--vocab-size 0 is out of range"),
        ("optimizers --block-size 0", "--block-size 0 is out of range"),
        ("train --optimizer.name bag --optimizer.weight-decay 0.1", "optimizer bag has no weight decay: leave"),
        ("inspect wiring", "wiring"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(capsys, tiny, tmp_path, words, message):
    places = {name: tmp_path / name for name in ("empty", "binary", "short", "full")}
    places["empty"].touch()
    places["binary"].write_bytes(bytes(range(256)) * 8)
    places["short"].write_text("too short")
    places["full"].mkdir()
    (places["full"] / "thesis.txt").write_text("precious")
    verb, *given = words.format(**places).split() or [""]
    shared = [] if verb in ("", "tarin", "inspect", "optimizers") else tiny
    before = contents(tmp_path)
    fails(capsys, [verb, *shared, *given] if verb else [], message)
    assert contents(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_full_disk_from_the_command(capsys, tiny, tmp_path, monkeypatch):
    assert main(["train", *tiny, "--steps", "4"]) == 0
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000004.pt").unlink()

    def full(state, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    message = "No space left on device. What was saved before is intact"
    fails(capsys, ["train", "--out", str(tmp_path / "run"), "--resume"], message)
    name = "checkpoints/step-00000002.pt"
    assert contents(tmp_path / "run")[name] == before[name]


def test_checkpoint_of_another_model(capsys, tiny, tmp_path):
    other = [*tiny, "--model.preset", "llama-tiny", "--out", str(tmp_path / "other")]
    assert main(["train", *tiny]) == 0
    assert main(["train", *other]) == 0
    foreign = RunFolder(tmp_path / "run").saved()[-1]
    (tmp_path / "other" / "result.json").unlink()
    (tmp_path / "other" / "checkpoints" / foreign.name).write_bytes(foreign.read_bytes())
    before = contents(tmp_path / "other")
    fails(capsys, ["train", "--out", str(tmp_path / "other"), "--resume"], "is of another model")
    assert contents(tmp_path / "other") == before


@pytest.mark.slow
def test_ctrl_c_as_a_user_sees_it(tiny, tmp_path):
    words = [sys.executable, "-m", "asgo.lab", "train", *tiny, "--steps", "100000", "--log-every", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not RunFolder(tmp_path / "run").metrics() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert line.startswith("asgo: stopped after step ")
    assert line.endswith(f"Continue with: asgo train --out {tmp_path / 'run'} --resume")
    assert RunFolder(tmp_path / "run").saved()


def test_ctrl_c_elsewhere(capsys, tiny, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("asgo.lab.training.train.open_data", interrupt)
    assert main(["train", *tiny]) == 130
    assert capsys.readouterr().err == "asgo: interrupted. Repeat the command with --resume to go on.\n"
    monkeypatch.setitem(TEXTS, OptimizersConfig, interrupt)
    assert main(["optimizers"]) == 130
    assert capsys.readouterr().err == "asgo: interrupted.\n"


def test_optimizers_are_listed_with_paper_year_memory_and_cost(capsys):
    assert main(["optimizers", "--model.preset", "tiny"]) == 0
    model, _, head, *lines = capsys.readouterr().out.splitlines()
    assert "parameters" in model
    columns = [head.index(title) for title in ("name", "year", "memory", "state bytes", "cost", "operations", "paper")]
    for line, (name, spec) in zip(lines, OPTIMIZERS.items(), strict=False):
        cells = [line[start:stop].strip() for start, stop in zip(columns, [*columns[1:], None], strict=True)]
        assert (cells[0], cells[1], cells[2], cells[4], cells[6]) == (
            name, str(spec.year), spec.memory, spec.cost, spec.paper)  # fmt: skip
        assert int(cells[3].replace(",", "")) > 0
        assert float(cells[5]) >= 0


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "shampoo"])
def test_listed_bytes_are_those_of_a_step_with_values(name):
    config = OptimizersConfig(ModelConfig(preset="tiny"))
    with torch.device("meta"):
        empty = build_model(config.model, 84, 128, 0)
    model = build_model(config.model, 84, 128, 0)
    optimizer = build_optimizer(model, OptimizerConfig(name=name))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert held_bytes(build_optimizer(empty, OptimizerConfig(name=name)), empty) == state_bytes(optimizer)


@pytest.mark.parametrize("name", ["dasgo", "adam-mini", "spam", "asgo", "muon", "adamw"])
def test_inspect_routing(capsys, name):
    assert main(["inspect", "routing", "--model.preset", "tiny", "--optimizer.name", name]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[0] for line in shown.splitlines() if line.startswith("transformer.")]
    assert len(rows) == len(set(rows)) == 28
    assert "(32, 96)" in shown


def test_inspect_routing_of_a_large_model_needs_no_memory(capsys):
    assert main(["inspect", "routing", "--model.preset", "llama-124m", "--vocab-size", "50257"]) == 0
    assert "model.layers.11.mlp.down_proj.weight" in capsys.readouterr().out


def test_inspect_routing_says_how_each_view_was_found(capsys, tmp_path):
    rules = tmp_path / "rules.json"
    rules.write_text('[{"match": "*.mlp.c_fc.weight", "view": null, "options": {}}]')
    command = ["inspect", "routing", "--model.preset", "tiny", "--why", "--per-head", "--rules", str(rules)]
    assert main(command) == 0
    shown = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    found = {line[0]: line[1] for line in shown}
    assert "c_attn: q, k, v blocks" in found["transformer.h.0.attn.c_attn.weight"]
    assert "(d=" in found["transformer.h.0.attn.c_attn.weight"]
    assert "rule '*.mlp.c_fc.weight'" in found["transformer.h.0.mlp.c_fc.weight"]
    assert "table of Embedding" in found["transformer.wte.weight"]


@pytest.mark.parametrize(
    ("verb", "config"),
    [
        ("train", TrainConfig()),
        ("compare", DEMO),
        ("inspect gradients", GradientsConfig(microbatches=2, model=ModelConfig(config=Path("a folder")))),
        ("inspect advise", AdviceConfig(after=3, curvature=Path("c.json"))),
        (
            "train",
            replace(
                TrainConfig(seed=3, out=Path("a folder/run"), resume=True),
                machine=replace(DEMO.machine, compile=True, threads=2),
                optimizer=OptimizerConfig("adamw", 0.1, betas=(0.8, 0.9), options=("eps=1e-9", "amsgrad=True")),
            ),
        ),
        ("compare", CompareConfig(optimizers=("asgo", "adamw:lr=0.1,betas=0.9/0.99"), seeds=(4,), tune=3)),
        (
            "train",
            TrainConfig(
                data=DataConfig(corpus=CorpusConfig(name="fineweb", streaming=False)),
                model=ModelConfig(tie_embeddings=False),
            ),
        ),
    ],
)
def test_a_config_and_its_command_say_the_same(verb, config):
    assert parse(shlex.split(command(f"asgo {verb}", config))[1:]) == config


def test_demo_is_a_comparison_with_its_own_defaults():
    assert parse(["demo"]) == DEMO
    assert parse(["demo", "--steps", "5"]) == replace(DEMO, steps=5)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "package"), [("tyro", "tyro"), ("asgo.lab", "asgo-lab")])
def test_the_command_says_what_it_lacks(module, package):
    """As if it were not there: a module of that name that cannot be imported."""
    code = f"import sys; sys.modules['{module}'] = None; from asgo.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"asgo: error: the command needs {package}, which is not installed: pip install asgo-lab, or in a clone "
        "pip install -e '.[lab]', brings all it needs.\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_reader_that_leaves_early_gets_no_traceback():
    words = f"{shlex.quote(sys.executable)} -m asgo.lab train --help | head -n 1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: asgo train")
    assert done.stderr == ""


def _threads():
    tasks = Path("/proc/self/task")
    return {(task / "comm").read_text().strip() for task in tasks.iterdir()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds threads in /proc")
@pytest.mark.parametrize(
    ("ends", "code"), [(None, 0), (Stopped("stopped"), 130), (Diverged("the loss is nan"), 2)], ids=repr
)
def test_a_command_ends_its_process_group_and_the_threads_of_it(ends, code):
    def run(config):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        model = torch.nn.Linear(2, 2)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped.itself = [wrapped]  # a cycle
        wrapped(torch.ones(1, 2)).sum().backward()
        assert "pt_gloo_runloop" in _threads()
        if ends is not None:
            raise type(ends)(*ends.args)  # the one given would keep the frame

    assert exit_code(lambda: "config", run) == code
    assert not torch.distributed.is_initialized()
    assert "pt_gloo_runloop" not in _threads()


@pytest.mark.parametrize(("ends", "code"), [(LabError("one process alone"), 2), (KeyboardInterrupt(), 130)], ids=repr)
def test_a_command_that_others_may_still_wait_for_leaves_its_process_group(ends, code):
    def run(config):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        raise ends

    try:
        assert exit_code(lambda: "config", run) == code
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
