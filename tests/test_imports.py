"""What a fresh process imports: on one process nothing of sharded tensors and of sharded checkpoints."""

import subprocess
import sys

import pytest

HEAVY = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp")

STEP = """
import sys, types
import torch
# Building any torch optimizer imports torch._dynamo, which imports sharded tensors itself; here it finds this instead.
stub = types.ModuleType("torch._dynamo")
stub.disable = lambda function, recursive=True, wrapping=True: function
sys.modules["torch._dynamo"] = torch._dynamo = stub
before = set(sys.modules)

import asgo
imported = set(sys.modules) - before
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
for optimizer in (asgo.ASGO(asgo.route(model)), asgo.SPAM(asgo.BAGM(model.named_parameters()))):
    for _ in range(2):
        model(torch.ones(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    asgo.checkpoint.load_named_state_dict(optimizer, asgo.checkpoint.named_state_dict(optimizer))
print(" ".join(sorted(imported)))
print(" ".join(sorted(set(sys.modules) - before)))
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def names():
    return run(STEP)


def test_a_step_on_one_process_imports_nothing_of_sharded_tensors(names):
    imported, used = names
    assert "asgo.optimizer.step" in imported
    assert not [name for name in used if name.startswith(HEAVY)]


def test_the_import_adds_this_library_and_einops_alone(names):
    imported, _ = names
    assert {name.split(".")[0] for name in imported} == {"asgo", "einops"}
    assert not [name for name in imported if name.startswith(("asgo.lab", "asgo.hosts", "asgo.diagnostics"))]


def test_names_of_diagnostics_are_there_when_asked_for():
    (found,) = run(
        "import asgo; print(asgo.report.__name__, asgo.Advice.__name__, asgo.diagnostics.GradientProbe.__name__)"
    )
    assert found == {"report", "Advice", "GradientProbe"}
