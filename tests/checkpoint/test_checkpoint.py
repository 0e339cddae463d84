"""Checkpoints by name: they survive regrouping, continue bit for bit, and are whole or not there."""

import copy
import errno
import os

import pytest
import torch
from torch import nn

from asgo import ASGO, checkpoint, route
from asgo.checkpoint import files
from asgo.views import MATRIX


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resume_is_bit_exact_through_a_file(tmp_path, dtype):
    model = net().to(dtype)
    optimizer = ASGO(route(model), lr=0.03)
    step_in = lambda m, o, n: [  # noqa: E731
        (o.zero_grad(), m(torch.ones(3, 6, dtype=dtype) * i).square().mean().backward(), o.step()) for i in range(n)
    ]
    step_in(model, optimizer, 4)
    checkpoint.save(checkpoint.named_state_dict(optimizer), tmp_path / "o.pt")
    twin = copy.deepcopy(model)
    other = ASGO(route(twin), lr=1.0)
    checkpoint.load_named_state_dict(other, checkpoint.load(tmp_path / "o.pt"))
    assert {g["lr"] for g in other.param_groups} == {0.03}
    step_in(model, optimizer, 4)
    step_in(twin, other, 4)
    assert same_weights(model, twin)
    assert {t.dtype for s in other.state.values() for k, t in s.items() if k == "gram"} <= {
        torch.float32,
        torch.float64,
    }


def test_survives_regrouping():
    model = net()
    optimizer = ASGO(route(model), lr=0.03)
    train(model, optimizer, 4)
    twin = copy.deepcopy(model)
    named = dict(twin.named_parameters())
    vectors = [(n, p) for n, p in named.items() if p.ndim == 1]
    others = [{"params": [(n, p)], "view": MATRIX, "lr": 0.03} for n, p in reversed(named.items()) if p.ndim == 2]
    regrouped = ASGO([{"params": vectors[::-1], "view": None, "lr": 0.03}, *others], lr=7.0)
    assert len(regrouped.param_groups) == 4
    checkpoint.load_named_state_dict(regrouped, checkpoint.named_state_dict(optimizer))
    train(model, optimizer, 4, start=4)
    train(twin, regrouped, 4, start=4)
    assert same_weights(model, twin)


def test_what_does_not_fit_is_refused_before_anything_changes():
    model = net()
    optimizer = ASGO(route(model))
    train(model, optimizer, 2)
    saved = checkpoint.named_state_dict(optimizer)
    before = copy.deepcopy(saved["state"])
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 2))
    longer = nn.Sequential(*net(), nn.Linear(2, 2))
    plain = ASGO(net().parameters())
    cases = [
        (
            checkpoint.named_state_dict(ASGO(route(wider))),
            r"the saved state of '.*' has a tensor \(.*build both the same",
        ),
        (
            checkpoint.named_state_dict(ASGO(route(longer))),
            r"2 parameters are not on both sides, first '5.bias', only in the c",
        ),
        ({"format": 99}, "the checkpoint has format 99, known is 1"),
        (optimizer.state_dict(), "the checkpoint has format None"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            checkpoint.load_named_state_dict(optimizer, other)
    with pytest.raises(ValueError, match="its parameters have no names"):
        checkpoint.named_state_dict(plain)
    for name, state in checkpoint.named_state_dict(optimizer)["state"].items():
        assert all(torch.equal(t, before[name][key]) for key, t in state.items())


@pytest.mark.parametrize("fault", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_previous_file_and_no_other(tmp_path, monkeypatch, fault):
    path = tmp_path / "o.pt"
    checkpoint.save({"a": torch.ones(3)}, path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fault, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"a": torch.zeros(3)}, path)
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["o.pt"]


def test_a_disk_that_is_full_while_tensors_are_written(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="cannot write|No space left"), open("/dev/full", "wb") as file:
        files._write({"a": torch.ones(1 << 16)}, file, "o.pt")


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "o.pt"
    checkpoint.save({"a": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"o.pt is not a checkpoint that can be read whole"):
            checkpoint.load(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent.pt")
