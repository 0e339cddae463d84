"""What the bookkeeping of an optimizer costs, counted in calls: in proportion to its groups and parameters."""

import cProfile
import pstats
from pathlib import Path

import pytest
import torch
from torch import nn

import asgo
from family import every_preset

HOME = str(Path(asgo.__file__).parent)


def calls(run):
    """How often each function of the library is called by `run`."""
    profile = cProfile.Profile()
    profile.runcall(run)
    stats = pstats.Stats(profile).stats
    return {(where, line, name): count for (where, line, name), (_, count, *_) in stats.items() if HOME in where}


def counted(make, count, grouped):
    """Calls of construction, a first and a second step, and saving, for so many matrices and vectors."""
    pairs = [
        (f"{kind}{i}", nn.Parameter(torch.ones(shape)))
        for i in range(count)
        for kind, shape in (("w", (3, 2)), ("b", 2))
    ]
    groups = [{"params": pairs[i : i + 2]} for i in range(0, len(pairs), 2)] if grouped else [{"params": pairs}]
    made = []
    found = [calls(lambda: made.append(make(groups)))]
    for _, param in pairs:
        param.grad = torch.ones_like(param)
    for run in (made[0].step, made[0].step, made[0].state_dict, lambda: made[0].load_state_dict(made[0].state_dict())):
        found.append(calls(run))
    return found


@pytest.mark.parametrize("grouped", [True, False], ids=["a group for each", "one group"])
@every_preset
def test_calls_grow_no_faster_than_groups_and_parameters(make, grouped):
    counted(make, 2, grouped)  # what is cached for the process
    few, many = counted(make, 10, grouped), counted(make, 40, grouped)
    for before, after in zip(few, many, strict=True):
        for function, count in after.items():
            assert count <= 4 * before.get(function, 0) + 40, function
