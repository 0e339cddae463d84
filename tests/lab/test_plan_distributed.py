"""``asgo plan`` against processes: what each rank keeps and sends, to the byte."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

pytest.importorskip("asgo.lab.cli")

from asgo import ASGO, View
from asgo.distributed.planned_part import Mesh
from asgo.optimizer.planning import memory, place, read_parts, traffic
from worlds import Counted


class Net(nn.Module):
    """Matrices that shards cut evenly, unevenly, between heads and not at all; experts, vectors, an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 12)
        self.query = nn.Linear(12, 16, bias=False)  # four heads of four
        self.out = nn.Linear(16, 12)
        self.fused = nn.Linear(12, 22, bias=False)  # query 8, key 8, value 6
        self.tall = nn.Linear(22, 32)
        self.wide = nn.Linear(32, 4, bias=False)
        self.long = nn.Linear(3, 37, bias=False)  # statistics are summed
        self.twin = nn.Linear(3, 37, bias=False)
        self.down = nn.Linear(24, 6, bias=False)  # on two ranks of tensor parallel
        self.experts = nn.Parameter(torch.ones(4, 3, 5))
        self.scale = nn.Parameter(torch.ones(()))


VIEWS = {
    "query.weight": View("(h d) n -> h d n", {"h": 4}),
    "out.weight": View("m (h d) -> h m d", {"h": 4}),
    "fused.weight": View(("(h d) n -> h d n", "(h d) n -> h d n", "m n -> 1 m n"), {"d": 4}, (8, 8, 6)),
    "tall.weight": View("m n -> 1 m n"),
    "wide.weight": View("m n -> 1 m n"),
    "long.weight": View("m n -> 1 m n"),
    "twin.weight": View("m n -> 1 m n"),
    "down.weight": View("m n -> 1 m n"),
    "experts": View("e m n -> e m n"),
}
TP = {"query": ColwiseParallel(), "out": RowwiseParallel(), "tall": ColwiseParallel(), "wide": RowwiseParallel()}
TP |= {"down": RowwiseParallel()}
PLAN = {"query": "colwise", "out": "rowwise", "tall": "colwise", "wide": "rowwise", "down": "rowwise"}


def groups_of(model):
    kinds = {}
    for name, param in model.named_parameters():
        if param.ndim or not isinstance(param, DTensor):
            kinds.setdefault(VIEWS.get(name), []).append((name, param))
    return [{"params": params, "view": view} for view, params in kinds.items()]


def arrange(model, mesh):
    """The model as `torch` arranges it on a mesh. A scalar cannot be sharded: it is given to nobody then."""
    if mesh.is_whole:
        return
    del model.scale
    names = ("replicate", "fsdp", "tp")
    sizes = [(name, size) for name, size in zip(names, (mesh.replicate, mesh.fsdp, mesh.tp), strict=True) if size > 1]
    found = init_device_mesh("cpu", tuple(s for _, s in sizes), mesh_dim_names=tuple(n for n, _ in sizes))
    if mesh.tp > 1:
        parallelize_module(model, found["tp"] if len(sizes) > 1 else found, TP)
    if mesh.fsdp > 1:
        dims = tuple(name for name, _ in sizes if name != "tp")
        fully_shard(model, mesh=found[dims] if mesh.tp > 1 else found)


def forms(interval, root):
    """Of the optimizer: packed with an interval, the square root in half precision."""
    return {"packed_state": interval > 1} | ({"root": root, "precision": "fp16"} if root == "square_root" else {})


def one_step(mesh, dtype, interval, step, root):
    """The bytes that this rank sends and receives in that step, and those of its state."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    arrange(model, mesh)
    optimizer = ASGO(groups_of(model), precondition_frequency=interval, **{"root": "minimax"} | forms(interval, root))
    if mesh.is_whole:
        optimizer.distribute(shard_state=mesh.zero1)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number in (1, step):
        for param in params:
            param.grad = torch.ones_like(param)
            optimizer.state[param]["step"].fill_(number - 1)
        with Counted() as counted:
            optimizer.step()
    state = sum(t.nbytes for param in params for t in optimizer.state[param].values())
    held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in params)
    # Reductions of single flags are not planned.
    sent = counted.sent["all_to_all_single"] + counted.sent["all_gather"] + counted.ring
    return sent, counted.received + counted.ring, state, held


MESHES = [Mesh(2), Mesh(2, zero1=True), Mesh(fsdp=2), Mesh(tp=2)]
MESHES += [Mesh(4), Mesh(4, zero1=True), Mesh(fsdp=4), Mesh(2, 2), Mesh(fsdp=2, tp=2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"{mesh}-{mesh.ranks}")
@pytest.mark.parametrize(("interval", "root"), [(1, "auto"), (3, "auto"), (1, "square_root")])
def test_every_rank_keeps_and_sends_what_the_plan_says(worlds, mesh, interval, root):
    dtype = torch.bfloat16 if interval == 1 else torch.float32
    model = Net().to(dtype)
    if not mesh.is_whole:
        del model.scale
    placed = place(read_parts(ASGO(groups_of(model), **forms(interval, root)), PLAN), mesh, interval)
    step = 500
    sent, received = traffic(placed, mesh, interval, dtype.itemsize)[step % interval]
    sizes = memory(placed, mesh, dtype.itemsize)
    params = sizes.pop("params")
    del sizes["gradients"]
    state = sum(sizes.values())
    summed = {p.name.partition(".")[0] for p in placed if p.kind == "partial_sums"}
    rows = {2: {"long", "twin", "out"}, 4: {"long", "twin"}}.get(mesh.fsdp, set())
    wanted = {"wide", "down"} if mesh == Mesh(tp=2) else rows - {"out"} if mesh.tp > 1 else rows
    if interval > 1:  # triangles are half as large, so that more of them are less than the gradient
        sparse = {Mesh(fsdp=4): {"out"}, Mesh(fsdp=2): {"tall"}, Mesh(tp=2): {"tall"}, Mesh(2, 2): {"tall"}}
        wanted = wanted | sparse.get(mesh, set())
    assert summed == wanted
    found = worlds(mesh.ranks)(one_step, mesh, dtype, interval, step, root)
    said = zip(*(ranks.flatten() for ranks in (sent, received, state, params)), strict=True)
    assert found == [tuple(int(value) for value in rank) for rank in said]
