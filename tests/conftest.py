import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a hub

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side; results do not depend on the schedule of threads


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision and device for the whole process; each test begins anew, whichever ran before it."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def repeatable_eigh(monkeypatch):
    """``torch.linalg.eigh`` as a function of the bits of a matrix: LAPACK's result may also depend on where it lies."""
    solve, known = torch.linalg.eigh, {}

    def by_bits(A):
        key = (A.dtype, tuple(A.shape), A.contiguous().numpy().tobytes())
        if key not in known:
            known[key] = solve(A)
        return tuple(tensor.clone() for tensor in known[key])

    monkeypatch.setattr(torch.linalg, "eigh", by_bits)
