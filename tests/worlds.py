"""Several processes that stay alive between tests: spawning them takes longer than what they are asked."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import time
import traceback

import torch
import torch.distributed as dist

PRELOAD = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "asgo",
]


class World:
    """`size` processes of one gloo group, which call functions together.

    >>> World(2)(function, *arguments)   # doctest: +SKIP
    """

    def __init__(self, size, backend="gloo"):
        context = multiprocessing.get_context("forkserver")  # imports torch once for all
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.size, self.pipes, self.processes = size, [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, port, backend), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function, *args, seconds=600):
        """What the function returns on every rank; all of them call it with the same arguments."""
        self.ask(function, *args)
        answers, left = {}, time.monotonic() + seconds
        while len(answers) < self.size and time.monotonic() < left:
            for pipe in multiprocessing.connection.wait(self.pipes, 0.5):
                rank = self.pipes.index(pipe)
                answers[rank] = pipe.recv()
                if not answers[rank][0]:
                    left = min(left, time.monotonic() + 5)  # the others may wait for this one
        failed = {rank: answer for rank, (ok, answer) in answers.items() if not ok}
        if failed or len(answers) < self.size:
            self.end()
            told = "".join(f"\nrank {rank}:\n{text}" for rank, text in failed.items())
            raise AssertionError(f"{sorted(answers)} of {self.size} ranks answered{told}")
        return [answers[rank][1] for rank in range(self.size)]

    def ask(self, function, *args):
        """Let all ranks begin, and wait for nobody."""
        for pipe in self.pipes:
            pipe.send((function, args))

    def end(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(pipe, rank, size, port, backend):
    torch.set_num_threads(1)
    sys.modules.pop("conftest", None)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group(backend, rank=rank, world_size=size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def on(worlds, size, function, *args):
    """What a function returns on every rank of a world of this size; on this process if it is 1."""
    return worlds(size)(function, *args) if size > 1 else [function(*args)]


class Counted:
    """Inside, the bytes that this rank gives to collectives for other ranks, by name, and those that it receives.

    `ring` has those that a ring sends for a sum over ranks, and receives.
    """

    def __enter__(self):
        self.sent, self.received, self.ring = {"all_to_all_single": 0, "all_gather": 0, "all_reduce": 0}, 0, 0
        self.originals = {name: getattr(dist, name) for name in self.sent}
        for name in self.sent:
            setattr(dist, name, getattr(self, name))
        return self

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def all_to_all_single(self, output, input, output_splits, input_splits, **how):
        me = dist.get_group_rank(how["group"], dist.get_rank())
        self.sent["all_to_all_single"] += (sum(input_splits) - input_splits[me]) * input.itemsize
        self.received += (sum(output_splits) - output_splits[me]) * output.itemsize
        return self.originals["all_to_all_single"](output, input, output_splits, input_splits, **how)

    def all_gather(self, outputs, input, **how):
        self.sent["all_gather"] += input.nbytes * (len(outputs) - 1)
        self.received += input.nbytes * (len(outputs) - 1)
        return self.originals["all_gather"](outputs, input, **how)

    def all_reduce(self, tensor, **how):
        self.sent["all_reduce"] += tensor.nbytes
        if how.get("op", dist.ReduceOp.SUM) == dist.ReduceOp.SUM:
            ranks = dist.get_world_size(how.get("group"))
            self.ring += 2 * tensor.nbytes * (ranks - 1) // ranks
        return self.originals["all_reduce"](tensor, **how)
