"""The harness on several processes: started by torchrun, continued on another number, measured by a benchmark."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

pytest.importorskip("asgo.lab.cli")

from asgo import ASGO
from asgo.lab import cli
from asgo.lab.data.sampling import Draw, TrainBatches
from asgo.lab.errors import LabError
from asgo.lab.training.parallel import lost, own_failures, shares
from benchmarks.distributed import bench_distributed
from benchmarks.speed.config import DistributedConfig
from worlds import World

RUN = [
    "train", "--device", "cpu", "--threads", "1", "--corpus.name", "pydoc", "--model.preset", "tiny", "--steps", "6",
    "--eval-every", "6", "--eval-blocks", "4", "--checkpoint-every", "3", "--block-size", "16", "--batch-size", "2",
]  # fmt: skip


def torchrun(words, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, "-m", "asgo.lab", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_in_shards_continues_on_one_process(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    printed = torchrun([*RUN, "--parallel", "fsdp2", "--out", str(together)])
    assert printed.count("validation loss") == 1
    assert printed.count("step 6/6") == 1
    assert sorted(path.name for path in (together / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    shutil.copytree(together, alone)
    (alone / "result.json").unlink()
    shutil.rmtree(alone / "checkpoints" / "step-00000006")
    assert cli.main(["train", "--out", str(alone), "--resume"]) == 0
    losses = [json.loads((folder / "result.json").read_text())["val_loss"] for folder in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_step_takes_the_same_blocks_on_any_number_of_processes():
    ids = np.arange(500, dtype=np.uint16)

    def blocks(processes, step):
        found = []
        for rank in range(processes):
            here = TrainBatches(ids, Draw(4, 2, 0, rank, processes))
            for part, batches in shares(here, 3, 4, rank, processes):
                found += batches.batch(step * 3 + part)[0].tolist()
        return sorted(found)

    assert blocks(4, 5) == blocks(1, 5) == blocks(2, 5) == blocks(6, 5) == blocks(12, 5)
    with pytest.raises(LabError, match="12 batches over 4 processes, which 5 processes cannot share"):
        blocks(5, 0)


def poisoned(kind):
    """Failures that this rank counts, after gradients with NaN: of matrices, of a stack, of a vector, one is whole."""
    shapes = {"long": (20, 2), "square": (6, 6), "experts": (2, 4, 4), "vector": (4,), "whole": (3, 3)}
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        named = [(name, nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))) for name, param in named]
    views = {"experts": "e m n -> e m n", "vector": None}
    optimizer = ASGO([{"params": [pair], "view": views.get(pair[0], "m n -> 1 m n")} for pair in named])
    if kind == "zero1":
        optimizer.distribute(shard_state=True)
    for _ in range(2):
        for name, param in named:
            grad = torch.full(shapes[name], 1.0 if name == "whole" else torch.nan)
            param.grad = (
                distribute_tensor(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad
            )
        optimizer.step()
    return own_failures(optimizer, not dist.is_initialized() or dist.get_rank() == 0)


@pytest.mark.slow
def test_a_failed_matrix_counts_once_whoever_keeps_it():
    world = World(2)
    try:
        assert poisoned("alone") == 2 * (1 + 1 + 2 + 1)
        for kind in ("zero1", "fsdp2"):
            assert sum(world(poisoned, kind)) == poisoned("alone"), kind
    finally:
        world.end()
    assert own_failures(torch.optim.AdamW([nn.Parameter(torch.ones(2))]), True) == 0


def test_what_says_that_a_process_is_gone():
    assert lost(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
def test_bench_distributed(tmp_path):
    config = DistributedConfig(("tiny-gpt2",), ("fsdp2",), (2,), layers=1, repeats=1, warm=10, out=tmp_path / "out")
    alone, shards = bench_distributed(config, Console(quiet=True))
    assert (alone.processes, alone.sent, alone.slowdown) == (1, 0, 1.0)
    assert alone.state / 2 <= shards.state < alone.state
    # AdamW's flags aside, both ranks together send twice what owners do not hold: half of each matrix, back and forth.
    assert shards.gathered <= 2 * shards.sent
    assert {path.name for path in config.out.iterdir()} == {"table.md", "table.csv", "plot.png", "results.json"}
