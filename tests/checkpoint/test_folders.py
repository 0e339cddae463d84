"""Checkpoints of two ranks: killed while they are written, saved beside training, and refused by all ranks at once."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from asgo import ASGO, DASGO, View, checkpoint, route
from asgo.checkpoint import files, sharded
from worlds import World


@pytest.fixture(scope="module")
def world():
    made = World(2)
    yield made
    made.end()


class Net(nn.Module):
    """Two matrices, one of which two ranks cannot share evenly, and a vector."""

    def __init__(self, width=7):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, 4, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def build(layout, width=7, make=ASGO, **options):
    """A model, what to call and its optimizer: on two ranks divided as `layout` says."""
    torch.manual_seed(0)
    model = Net(width)
    called = fully_shard(model) if layout == "fsdp" else DistributedDataParallel(model)
    groups = [group | options if any(group["views"]) else group for group in route(model)]
    optimizer = make(groups, lr=0.02)
    if layout != "fsdp":
        optimizer.distribute(shard_state=layout == "zero1")
    return called, optimizer


def train(called, optimizer, steps, start=0):
    for step in range(start, start + steps):
        dice = torch.Generator().manual_seed(2 * step + dist.get_rank())
        called(torch.randn(3, 6, generator=dice)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def numbers(called, optimizer):
    """Copies of all parameters and state that this rank holds."""
    state = checkpoint.named_state_dict(optimizer)["state"]
    held = {"model": dict(called.named_parameters()), **{name: dict(of) for name, of in state.items()}}
    return {
        f"{name}.{key}": (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensors in held.items()
        for key, tensor in tensors.items()
    }


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)


@contextmanager
def patched(owner, name, new):
    old = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: new(old, *args, **options))
    try:
        yield
    finally:
        setattr(owner, name, old)


# ---- killed while it saves -----------------------------------------------------------------------------------

MOMENTS = {
    "the first file": (1, dcp.FileSystemWriter, "write_data"),
    "torch's index": (0, dcp.FileSystemWriter, "finish"),
    "the last file": (0, files, "save"),
}
"""After what a rank of the two stands still until it is killed."""


def save_and_stand_still(folder, moment, asynchronous):
    """A first checkpoint, a file with its numbers for each rank, and a second one that never ends."""
    rank, owner, name = MOMENTS[moment]
    called, optimizer = build("fsdp")
    train(called, optimizer, 3)
    sharded.save(folder / "one", called, optimizer, {"step": 3})
    torch.save(numbers(called, optimizer), folder.parent / f"{dist.get_rank()}.pt")
    train(called, optimizer, 2, start=3)

    def standing(old, *args, **options):
        done = old(*args, **options)
        if dist.get_rank() == rank:
            (folder.parent / "standing").touch()
            time.sleep(1000)
        return done

    with patched(owner, name, standing):
        if asynchronous:
            sharded.save_async(folder / "two", called, optimizer, {"step": 5})
            while True:  # training goes on beside it
                train(called, optimizer, 1)
        sharded.save(folder / "two", called, optimizer, {"step": 5})


def go_on(folder):
    """Whether the first checkpoint has the numbers it was saved with, and the second can be saved again and loaded."""
    called, optimizer = build("fsdp")
    extra = sharded.load(folder / "one", called, optimizer)
    whole = extra == {"step": 3} and same(
        numbers(called, optimizer), torch.load(folder.parent / f"{dist.get_rank()}.pt")
    )
    train(called, optimizer, 2, start=3)
    sharded.save(folder / "two", called, optimizer, {"step": 5})
    again, other = build("fsdp")
    return whole, sharded.load(folder / "two", again, other), same(numbers(again, other), numbers(called, optimizer))


@pytest.mark.parametrize(
    ("moment", "asynchronous"), [*((moment, False) for moment in MOMENTS), ("the first file", True)]
)
def test_a_save_that_is_killed_leaves_the_checkpoint_before(world, tmp_path, moment, asynchronous):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    killed = World(2)
    try:
        killed.ask(save_and_stand_still, folder, moment, asynchronous)
        until = time.monotonic() + 300
        while not (tmp_path / "standing").exists():
            assert time.monotonic() < until
            assert all(process.is_alive() for process in killed.processes)
            time.sleep(0.02)
    finally:
        killed.end()  # SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == [".two.tmp", "one"]
    assert any((folder / ".two.tmp").glob("*.distcp"))
    assert world(go_on, folder) == [(True, {"step": 5}, True)] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"]


# ---- beside training -----------------------------------------------------------------------------------------


def save_beside(layout, folder):
    """Whether training changed the numbers before a file was written, and whether what was saved is from before."""
    called, optimizer = build(layout)
    train(called, optimizer, 3)
    before, trained = numbers(called, optimizer), threading.Event()

    def held_up(old, *args, **options):
        assert trained.wait(100)
        return old(*args, **options)

    with patched(dcp.FileSystemWriter, "write_data", held_up):
        saving = sharded.save_async(folder, called, optimizer, {"step": 3})
        train(called, optimizer, 3, start=3)
        moved = not same(numbers(called, optimizer), before)
        early = saving.done() or folder.exists()
        trained.set()
        saving.result(100)
    dist.barrier()
    again, other = build(layout)
    sharded.load(folder, again, other)
    return moved, early, same(numbers(again, other), before)


@pytest.mark.parametrize("layout", ["fsdp", "zero1", "ddp"])
def test_an_asynchronous_save_has_the_numbers_of_its_moment(world, tmp_path, layout):
    assert world(save_beside, layout, tmp_path / "saved") == [(True, False, True)] * 2


# ---- what does not fit ---------------------------------------------------------------------------------------


def message_of(function, *args):
    with pytest.raises((OSError, ValueError)) as caught:
        function(*args)
    return str(caught.value)


def build_with_view(layout, view):
    """The model, with another view of its second matrix."""
    torch.manual_seed(0)
    model = Net()
    called = fully_shard(model) if layout == "fsdp" else DistributedDataParallel(model)
    groups = [
        group | {"views": [view if name == "second.weight" else old for name, old in _named_views(group)]}
        for group in route(model)
    ]
    optimizer = ASGO(groups, lr=0.02)
    if layout != "fsdp":
        optimizer.distribute(shard_state=layout == "zero1")
    return called, optimizer


def _named_views(group):
    return [(name, view) for (name, _), view in zip(group["params"], group["views"], strict=True)]


def loads_that_do_not_fit(layout, folder):
    """The messages, and the names of those after which a number had changed."""
    called, optimizer = build(layout)
    train(called, optimizer, 1)
    sharded.save(folder / "saved", called, optimizer)
    others = {
        "model": build(layout, width=8),
        "option": build(layout, side="left"),
        "optimizer": build(layout, make=DASGO),
        "view": build_with_view(layout, View("(a m) n -> 1 (m a) n", {"a": 2})),
        "twin": build(layout),
    }
    before = {name: numbers(*other) for name, other in others.items()}
    rank = dist.get_rank()
    messages = {name: message_of(sharded.load, folder / "saved", *others[name]) for name in list(others)[:-1]}
    unseen = folder / ("saved" if rank == 0 else "elsewhere")  # as on a file system that the ranks do not share
    messages["unseen"] = message_of(sharded.load, unseen, *others["twin"])
    used = folder / ("new" if rank == 0 else "saved")
    messages["used"] = message_of(sharded.save, used, called, optimizer)
    return messages, [name for name, other in others.items() if not same(numbers(*other), before[name])]


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_all_ranks_name_the_same_mismatch_and_load_nothing(world, tmp_path, layout):
    (messages, changed), (elsewhere, _) = found = world(loads_that_do_not_fit, layout, tmp_path)
    assert elsewhere == messages
    assert [names for _, names in found] == [[], []]
    assert changed == []
    saved = tmp_path / "saved"
    assert messages["model"] == (
        f"ASGO: model.first.bias is (7,) in {saved}, here (8,). It is of another model, view or optimizer; build both "
        "the same way."
    )
    assert messages["option"].startswith("ASGO: optimizer.first.weight.")
    assert f"in {saved}" in messages["option"]
    assert messages["optimizer"].startswith(f"DASGO: {saved} has format 1 and is of ASGO")
    assert messages["view"] == (
        f"ASGO: second.weight (4, 7) is read as 'm n -> 1 m n' in {saved}, here as '(a m) n -> 1 (m a) n' with a=2. "
        "Build the optimizer with the views it was saved with."
    )
    assert messages["unseen"].startswith(f"{tmp_path / 'elsewhere'} is not a whole checkpoint")
    assert messages["used"].startswith(f"{saved} exists")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def load_where_the_view_is_written_otherwise(layout, folder):
    called, optimizer = build(layout)
    train(called, optimizer, 2)
    sharded.save(folder / "saved", called, optimizer)
    other = build_with_view(layout, View("rows columns -> 1 rows columns"))
    sharded.load(folder / "saved", *other)
    return same(numbers(*other), numbers(called, optimizer))


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_view_that_reads_alike_fits_however_it_is_written(world, tmp_path, layout):
    assert world(load_where_the_view_is_written_otherwise, layout, tmp_path) == [True, True]


def damaged_and_refused(folder):
    """What is said of a damaged folder, and of a disk that refuses one rank."""
    called, optimizer = build("fsdp")
    train(called, optimizer, 1)
    sharded.save(folder / "saved", called, optimizer)

    def full(old, *args, **options):
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return old(*args, **options)

    def full_at_the_end(old, *args, **options):
        raise OSError(28, "No space left on device", "about.pt")

    messages = []
    for owner, name, new in (
        (dcp.FileSystemWriter, "write_data", full),
        (files, "save", full_at_the_end),
    ):
        with patched(owner, name, new):
            messages.append(message_of(sharded.save, folder / "next", called, optimizer))
    with patched(dcp.FileSystemWriter, "write_data", full):
        with pytest.raises(OSError, match="rank 1 failed") as caught:
            sharded.save_async(folder / "next", called, optimizer).result(100)
        messages.append(str(caught.value))
    for name in ("__0_0.distcp", ".metadata"):
        if dist.get_rank() == 0:
            (folder / "saved" / name).write_bytes(b"half")
        dist.barrier()
        messages.append(message_of(sharded.load, folder / "saved", *build("fsdp")))
    return messages


def test_what_a_disk_refuses_or_breaks_is_one_line_on_all_ranks(world, tmp_path):
    one, other = world(damaged_and_refused, tmp_path)
    assert one == other
    refused, at_the_end, beside, data, index = one
    assert "rank 1 failed: [Errno 28] No space left on device" in refused
    assert "No space left on device" in at_the_end
    assert beside == refused
    assert data.startswith(f"{tmp_path / 'saved'} is damaged (rank 0 failed: ")
    assert index == f"{tmp_path / 'saved'} is not a whole checkpoint: its .metadata is damaged; use another one."
    assert all("\n" not in message for message in one)
