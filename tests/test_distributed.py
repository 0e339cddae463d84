"""Several processes give what one gives: every layout, every optimizer, every form; and what it costs them."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from asgo import ASGO, folders
from asgo.views import MATRIX, STACK, fused_qkv, head_columns, heads
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


VIEWS = {
    "query.weight": heads(4),
    "out.weight": head_columns(4),
    "fused.weight": fused_qkv(8, 8, 6, 4),
    "tall.weight": MATRIX,
    "wide.weight": MATRIX,
    "experts": STACK,
}
FORMS = {
    "query.weight": {"precondition_frequency": 4},
    "out.weight": {"adjust_lr": "slice_rms"},
    "fused.weight": {"statistic": "gradient", "nesterov": False},
    "tall.weight": {"side": "left", "betas": (0.0, 1.0), "adjust_lr": None, "root": "outside", "eps": 1e-3},
    "wide.weight": {"statistic": "gradient", "nesterov": False, "cross_normalize": False, "betas": (0.9, 0.8)},
    "experts": {"precondition_frequency": 3, "maximize": False},
}
"""Every form of ASGO: a matrix each."""


def every_form(model):
    """One optimizer whose groups are all forms of ASGO, and AdamW."""
    named = dict(model.named_parameters())
    groups = [{"params": [(name, named.pop(name))], "view": VIEWS[name], **form} for name, form in FORMS.items()]
    return ASGO([*groups, {"params": list(named.items()), "view": None}], lr=0.02)


def one_form(model):
    """Matrices of one view stand in one bucket."""
    kinds = {}
    for name, param in model.named_parameters():
        kinds.setdefault(VIEWS.get(name), []).append((name, param))
    return ASGO([{"params": params, "view": view} for view, params in kinds.items()], lr=0.02)


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


def build(layout, make):
    """The model, what to call, its optimizer and this rank's share of a batch; the layout None is one process."""
    model = net()
    place, after = LAYOUTS[layout] if layout else (lambda model: (model, slice(None)), None)
    wrapped, share = place(model)
    optimizer = make(model)
    if after is not None:
        after(optimizer)
    return model, wrapped, optimizer, share


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parameters(model):
    return [whole(param).detach() for param in model.parameters()]


def trained(layout, make, training):
    """The parameters after training, and how large the state is that this rank keeps."""
    model, wrapped, optimizer, share = build(layout, make)
    train(wrapped, optimizer, share=share, **training)
    kept = sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "failures")
    return parameters(model), kept


@cache
def alone(make, **training):
    return trained(None, make, training)[0]


def distance(ours, theirs):
    return max(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True))


# ---- equality ------------------------------------------------------------------------------------------------

WHERE = [("ddp", 2), ("zero1", 2), ("fsdp", 2), ("tp", 2), ("zero1", 4), ("fsdp", 4), ("hsdp", 4), ("fsdp+tp", 4)]
everywhere = pytest.mark.parametrize(("layout", "size"), WHERE, ids=lambda value: str(value))


@everywhere
def test_every_form_in_every_layout_is_that_of_one_process(worlds, layout, size):
    for params, _ in worlds(size)(trained, layout, every_form, {}):
        assert distance(params, alone(every_form)) < 1e-8


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_accumulation_and_clipping(worlds, layout):
    training = {"parts": 2, "clip": 0.05, "steps": 20}
    for params, _ in worlds(2)(trained, layout, one_form, training):
        assert distance(params, alone(one_form, **training)) < 1e-8


# ---- checkpoints ---------------------------------------------------------------------------------------------


def save_after(layout, folder, steps, asynchronous=False):
    _, wrapped, optimizer, share = build(layout, one_form)
    train(wrapped, optimizer, steps, share=share)
    if asynchronous:
        saving = folders.save_async(folder, wrapped, optimizer, {"step": steps})
        train(wrapped, optimizer, 2, start=steps, share=share)  # what is saved is as it was
        saving.result(60)
        if dist.is_initialized():
            dist.barrier()
    else:
        folders.save(folder, wrapped, optimizer, {"step": steps})


def continue_from(layout, folder, steps):
    model, wrapped, optimizer, share = build(layout, one_form)
    extra = folders.load(folder, wrapped, optimizer)
    train(wrapped, optimizer, steps, start=extra["step"], share=share)
    return parameters(model)


def on(worlds, size, function, *args):
    return worlds(size)(function, *args) if size > 1 else [function(*args)]


ROUTES = [
    (("ddp", 2), ("fsdp", 4)),
    (("fsdp", 4), (None, 1)),
    ((None, 1), ("hsdp", 4)),
    (("zero1", 2), ("fsdp+tp", 4)),
    (("fsdp+tp", 4), ("ddp", 2)),
    (("tp", 2), ("zero1", 4)),
    (("hsdp", 4), ("tp", 2)),
]


@pytest.mark.parametrize(("before", "after"), ROUTES, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_continues_in_any_other_layout(worlds, tmp_path, before, after):
    folder = tmp_path / "step-6"
    on(worlds, before[1], save_after, before[0], folder, 6, before[0] == "fsdp")
    assert [path.name for path in tmp_path.iterdir()] == ["step-6"]
    for params in on(worlds, after[1], continue_from, after[0], folder, 6):
        assert distance(params, alone(one_form, steps=12)) < 1e-8
