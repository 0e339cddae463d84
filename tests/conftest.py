import os
import random
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import pytest
import torch

from worlds import World

# Tests run side by side, so one thread unless the environment asks for more, as benchmarks/machines.py does.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


SLOW = (
    *("test_lab_*", "test_plan_*", "test_distributed*", "test_docs.py", "test_examples.py", "experiments/*"),
    *(
        "test_cost.py",
        "test_packed.py",
        "test_rows.py",
        "test_torch_contract.py",
        "test_folders.py",
        "test_gpu_benchmark.py",
        "test_hosts.py",
        "test_hosts_sharded.py",
        "test_benchmarks.py",
        "test_layouts_traced.py",
        "test_packaging.py",
        "test_step_memory.py",
    ),
)
"""Files whose tests take minutes: processes, models, training runs, every block of the documentation."""


def is_slow(path):
    return any(path.match(pattern) for pattern in SLOW)


def pytest_ignore_collect(collection_path, config):
    """Files of slow tests are not imported where fast ones are asked for: that alone takes as long as those."""
    return True if "not slow" in config.option.markexpr and is_slow(collection_path) else None


def pytest_collection_modifyitems(items):
    for item in items:
        if is_slow(item.path):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision and device for the whole process; each test begins anew, whichever ran before it."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def worlds():
    """A world of any size, made on first use."""
    made = {}

    def world(size):
        if size not in made:
            made[size] = World(size)
        return made[size]

    yield world
    for each in made.values():
        each.end()


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A text of 3,000 words, of which there are five."""
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(["red", "green", "blue", "yellow", "black"], k=3000)))
    return path


@pytest.fixture
def repeatable_lapack(monkeypatch):
    """Decompositions as functions of the bits of their matrices: LAPACK's may also depend on where a matrix lies.

    So what is asserted to the bit holds on every machine, and says something of this library alone.
    """
    for name in ("eigh", "qr", "svd"):
        monkeypatch.setattr(torch.linalg, name, by_bits(getattr(torch.linalg, name)))


def by_bits(solve):
    known = {}

    def solved(A, **options):
        if A.device.type != "cpu" or torch.compiler.is_compiling():
            return solve(A, **options)
        key = (A.dtype, A.shape, A.detach().contiguous().numpy().tobytes(), *options.items())
        if key not in known:
            known[key] = solve(A, **options)
        return tuple(tensor.clone() for tensor in known[key])

    return solved
