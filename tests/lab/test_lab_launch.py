"""Runs of real launchers: a process that dies, Ctrl-C, another launcher and number of processes, and who prints."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("asgo.lab.cli")

from asgo.lab import cli
from asgo.lab.config.runs import MachineConfig
from asgo.lab.errors import LabError
from asgo.lab.training.machine import accelerator
from asgo.lab.training.run_folder import RunFolder
from asgo.lab.training.train import Trainer

WAIT = 300
"""Seconds after which a test takes something for a hang: far beyond what a slow machine needs."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
RUN = [
    "train", "--device", "cpu", "--threads", "1", "--corpus.name", "pydoc", "--model.preset", "tiny", "--steps",
    "1000000", "--eval-every", "1000000", "--eval-blocks", "4", "--log-every", "1", "--checkpoint-every", "3",
    "--block-size", "16", "--batch-size", "2",
]  # fmt: skip


@pytest.fixture
def launch(tmp_path):
    """Starts a launcher in a session of its own, of which nothing is left after the test."""
    started = []

    def start(*words):
        path = tmp_path / f"said-{len(started)}.txt"
        with path.open("w") as said:
            process = subprocess.Popen(
                words, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
            )
        started.append((process, family(process.pid)))
        return process, path

    yield start
    for process, _ in started:
        for pid in [*family(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def family(pid):
    """The processes below a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(words[1]) == pid:
            child = int(path.parent.name)
            found += [child, *family(child)]
    return found


def ranks(launcher):
    """The processes of a run by their rank."""
    found = {}
    for pid in family(launcher.pid):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {int(each[5:]): pid for each in variables if each.startswith(b"RANK=")}
    return found


def until(condition, launcher, said):
    end = time.monotonic() + WAIT
    while not condition():
        assert launcher.poll() is None, said.read_text()
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.02)


def saved(out):
    return len(RunFolder(out).saved())


def told(said):
    """The lines of the command itself: what torchrun adds is its own."""
    return [line for line in said.read_text().splitlines() if line.startswith("asgo: ")]


def resume(out, monkeypatch, capsys, words=()):
    """Continue here, on one process, and stop after two steps: the code, what was said, and where it began."""
    train_step, done = Trainer._train_step, []

    def counted(trainer):
        train_step(trainer)
        done.append(trainer.step)
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    code = cli.main(["train", "--out", str(out), "--resume", *words])
    sessions = json.loads((out / "environment.json").read_text())["sessions"]
    return code, capsys.readouterr().err, done, [(each["processes"], each["from_step"]) for each in sessions]


def steps(out):
    return [line["step"] for line in RunFolder(out).metrics() if "loss" in line]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("parallel", "victim"), [("ddp", 0), ("fsdp2", 1)])
def test_a_process_that_dies_ends_the_run_with_a_message(launch, tmp_path, monkeypatch, capsys, parallel, victim):
    out = tmp_path / "run"
    launcher, said = launch(*TORCHRUN, "-m", "asgo.lab", *RUN, "--parallel", parallel, "--out", str(out))
    until(lambda: saved(out) == 2, launcher, said)
    processes = ranks(launcher)
    assert sorted(processes) == [0, 1]
    os.kill(processes[victim], signal.SIGKILL)
    assert launcher.wait(WAIT) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes.values())
    (message,) = told(said)  # of the process that is left
    last = RunFolder(out).saved()[-1]
    assert message.startswith("asgo: error: another process of this run has ended (")
    assert message.endswith(
        f"); the last checkpoint is {last}. Repeat the command with --resume to go on, on as many processes or fewer."
    )
    step = int(last.stem.removeprefix("step-"))
    code, error, done, sessions = resume(out, monkeypatch, capsys, RUN[1:])
    assert (code, done, sessions) == (130, [step + 1, step + 2], [(2, 0), (1, step)])
    assert f"stopped after step {step + 2}" in error
    assert steps(out) == list(range(1, step + 3))


def by_rank(folder):
    """What each rank wrote to standard output and to standard error."""
    return {
        (int(path.parent.name), path.stem): path.read_text().strip() for path in folder.rglob("*.log") if path.is_file()
    }


def ctrl_c(launcher):
    """As a terminal does it: to all processes of its group."""
    os.killpg(launcher.pid, signal.SIGINT)


@pytest.mark.slow
def test_ctrl_c_and_on_with_another_launcher_and_division(launch, tmp_path, monkeypatch, capsys):
    out, logs = tmp_path / "run", tmp_path / "logs"
    launcher, said = launch(*ACCELERATE, "-m", "asgo.lab", *RUN, "--parallel", "fsdp2", "--out", str(out))
    until(lambda: saved(out) == 2, launcher, said)
    ctrl_c(launcher)
    assert launcher.wait(WAIT) != 0
    stopped = f"Continue with: torchrun --nproc_per_node 2 -m asgo.lab train --out {out} --resume"
    (line,) = told(said)
    first = steps(out)[-1]
    assert line == f"asgo: stopped after step {first} of 1000000; a checkpoint is written. {stopped}"
    assert int(RunFolder(out).saved()[-1].name.removeprefix("step-")) == first

    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    again = ["train", "--out", str(out), "--resume", "--parallel", "zero1"]
    launcher, said = launch(*TORCHRUN, "--redirects", "3", "--log-dir", str(logs), "-m", "asgo.lab", *again)
    until(lambda: steps(out)[-1] > first + 5, launcher, said)
    ctrl_c(launcher)
    assert launcher.wait(WAIT) != 0
    spoken = by_rank(logs)
    assert "tokens/s" in spoken.pop((0, "stdout"))
    second = steps(out)[-1]
    stop = f"asgo: stopped after step {second} of 1000000; a checkpoint is written. {stopped}"
    assert spoken == {(0, "stderr"): stop, (1, "stdout"): "", (1, "stderr"): ""}

    monkeypatch.delenv("FORCE_COLOR")
    code, _, done, sessions = resume(out, monkeypatch, capsys)
    assert (code, done) == (130, [second + 1, second + 2])
    assert sessions == [(2, 0), (2, first), (1, second)]
    assert steps(out) == list(range(1, second + 3))


@pytest.mark.slow
def test_resuming_another_run_is_refused_by_every_process(launch, tmp_path, monkeypatch, capsys):
    out, logs = tmp_path / "run", tmp_path / "logs"
    resume(out, monkeypatch, capsys, RUN[1:])  # begins it
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = ["train", "--out", str(out), "--resume", "--model.preset", "demo", "--optimizer.options", "nesterov=False"]
    launcher, _ = launch(*TORCHRUN, "--redirects", "3", "--log-dir", str(logs), "-m", "asgo.lab", *words)
    assert launcher.wait(WAIT) != 0
    spoken = by_rank(logs)
    messages = {text for (_, stream), text in spoken.items() if stream == "stderr" and text}
    assert messages == {
        f"asgo: error: --out {out} was made with another configuration: model.preset (there 'tiny', asked 'demo'), "
        "optimizer.options (there (), asked ('nesterov=False',)). Leave those flags out to continue it, or pass "
        "another --out."
    }
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_only_the_processes_are_taken_from_accelerate(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # accelerate would divide every loss by it
    loss = torch.ones((), requires_grad=True)
    accelerator(MachineConfig(device="cpu")).backward(loss)
    assert loss.grad == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LabError, match="divide the model by FSDP, .* --multi_gpu and pass --parallel fsdp2"):
        accelerator(MachineConfig(device="cpu"))


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(LabError, match="2 processes were started here, and there are 1 devices: start one for each"):
        accelerator(MachineConfig())
    assert accelerator(MachineConfig(device="cpu")).device.type == "cpu"
