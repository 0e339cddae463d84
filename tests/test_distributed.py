"""Several processes give what one gives: every layout, every optimizer, every form; and what it costs them."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from asgo import ASGO
from asgo.views import MATRIX, STACK, fused_qkv, head_columns, heads
from family import PRESETS
from worlds import World

STEPS = 50


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


# ---- the model -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Matrices that shards cut evenly, unevenly, between heads and not at all; experts, vectors, an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 12)
        self.query = nn.Linear(12, 16, bias=False)  # four heads of four
        self.out = nn.Linear(16, 12)
        self.fused = nn.Linear(12, 22)  # query 8, key 8, value 6
        self.tall = nn.Linear(22, 30)
        self.wide = nn.Linear(30, 3)
        self.experts = nn.Parameter(torch.randn(4, 3, 5) / 2)

    def forward(self, tokens):
        h = self.embed(tokens)
        h = h + self.out(torch.tanh(self.query(h)))
        h = torch.tanh(self.wide(torch.tanh(self.tall(torch.tanh(self.fused(h))))))
        return torch.einsum("bm,emn->ben", h, self.experts)


def net():
    torch.manual_seed(0)
    return Net().double()


def grouped(model, **options):
    """Groups with a view of each kind."""
    views = {
        "query.weight": heads(4),
        "out.weight": head_columns(4),
        "fused.weight": fused_qkv(8, 8, 6, 4),
        "tall.weight": MATRIX,
        "wide.weight": MATRIX,
        "experts": STACK,
    }
    kinds = {}
    for name, param in model.named_parameters():
        kinds.setdefault(views.get(name), []).append((name, param))
    return [{"params": params, "view": view, **(options if view else {})} for view, params in kinds.items()]


def batch(step):
    dice = torch.Generator().manual_seed(step)
    tokens = torch.randint(5, (8,), generator=dice)
    return tokens, torch.randn(8, 4, 5, dtype=torch.float64, generator=dice)


def loss_of(model, tokens, targets):
    return (model(tokens) - targets).square().mean()


def train(model, optimizer, steps=STEPS, start=0, share=slice(None), parts=1, clip=None):
    """Train on this rank's share of every batch, in `parts` pieces."""
    for step in range(start, start + steps):
        tokens, targets = (x[share] for x in batch(step))
        for some, wanted in zip(tokens.chunk(parts), targets.chunk(parts), strict=True):
            (loss_of(model, some, wanted) / parts).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


# ---- the layouts ---------------------------------------------------------------------------------------------


def ddp(model):
    return DistributedDataParallel(model), data_share(dist.get_rank(), dist.get_world_size())


def fsdp(model, *mesh):
    """FSDP2, or with two dimensions of the mesh hybrid sharding."""
    names = ("replicate", "shard")[-len(mesh) :]
    found = init_device_mesh("cpu", mesh, mesh_dim_names=names)
    for layer in (model.query, model.fused, model.tall):
        fully_shard(layer, mesh=found)
    return fully_shard(model, mesh=found), data_share(dist.get_rank(), dist.get_world_size())


TP = {
    "query": ColwiseParallel(),
    "out": RowwiseParallel(),
    "tall": ColwiseParallel(),
    "wide": RowwiseParallel(),
}


def tp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, TP), slice(None)


def fsdp_tp(model):
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], TP)
    for layer in (model.query, model.tall):
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), data_share(mesh["dp"].get_local_rank(), 2)


def data_share(rank, of):
    return slice(rank, None, of)


LAYOUTS = {
    "ddp": (ddp, lambda optimizer: optimizer.distribute()),
    "zero1": (ddp, lambda optimizer: optimizer.distribute(shard_state=True)),
    "fsdp": (lambda model: fsdp(model, dist.get_world_size()), None),
    "hsdp": (lambda model: fsdp(model, 2, dist.get_world_size() // 2), None),
    "tp": (tp, None),
    "fsdp+tp": (fsdp_tp, None),
}


def build(layout, make, **options):
    """The model, its optimizer and this rank's share of a batch; None: on one process."""
    model, share = net(), slice(None)
    after = None
    if layout is not None:
        place, after = LAYOUTS[layout]
        wrapped, share = place(model)
    else:
        wrapped = model
    optimizer = make(model, **options)
    if after is not None:
        after(optimizer)
    return model, wrapped, optimizer, share


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- equality ------------------------------------------------------------------------------------------------


def asgo(model, form="ours", **options):
    return PRESETS[form](grouped(model, **options))


FORMS = {
    "ours": {},
    "paper": {"form": "paper"},
    "theory": {"form": "theory"},
    "interval": {"precondition_frequency": 4},
    "per slice": {"adjust_lr": "slice_rms"},
    "left": {"side": "left"},
    "gradient": {"statistic": "gradient", "nesterov": False},
}


def difference(layout, make, options, training):
    """The largest difference of a parameter to that of one process."""
    torch.manual_seed(0)
    alone, _, optimizer, _ = build(None, make, **options)
    train(alone, optimizer, **training)
    model, wrapped, optimizer, share = build(layout, make, **options)
    train(wrapped, optimizer, share=share, **training)
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    return max(float((p - whole(q)).abs().max()) for p, q in pairs)


WHERE = [("ddp", 2), ("zero1", 2), ("fsdp", 2), ("tp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp+tp", 4), ("zero1", 4)]


@pytest.mark.parametrize(("layout", "size"), WHERE)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_layout_is_that_of_one_process(worlds, layout, size, form):
    assert max(worlds(size)(difference, layout, asgo, FORMS[form], {})) < 1e-8
