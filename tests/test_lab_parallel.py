"""The harness on several processes: started by torchrun, continued on another number, measured by a benchmark."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("asgo.lab.cli")

from asgo.lab import cli
from asgo.lab.bench.config import DistributedConfig
from asgo.lab.bench.distributed import bench_distributed
from asgo.lab.errors import LabError
from asgo.lab.parallel import lost, shares
from asgo.lab.sampling import Draw, TrainBatches

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


def test_what_says_that_a_process_is_gone():
    assert lost(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"))
    assert not lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_bench_distributed(tmp_path):
    config = DistributedConfig(("tiny-gpt2",), ("fsdp2",), (2,), layers=1, repeats=1, warm=10, out=tmp_path / "out")
    alone, shards = bench_distributed(config, Console(quiet=True))
    assert (alone.processes, alone.sent, alone.slowdown) == (1, 0, 1.0)
    assert alone.state / 2 <= shards.state < alone.state
    # AdamW's flags aside, both ranks together send twice what owners do not hold: half of each matrix, back and forth.
    assert shards.gathered <= 2 * shards.sent
    assert {path.name for path in config.out.iterdir()} == {"table.md", "table.csv", "plot.png", "results.json"}
