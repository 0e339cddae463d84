"""Matrices of which ranks hold rows or columns, with statistics that are sums over ranks: as on one process."""

from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asgo import ASGO, DASGO, SPAM, View
from asgo.checkpoint import sharded
from asgo.views import MATRIX, conv, fused
from worlds import Counted, on

STEPS = 50


# ---- the matrices --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A parameter, the axis that ranks cut, and on how many of them it is summed rather than gathered."""

    shape: tuple
    dim: int
    on: tuple = (2, 4)
    view: View = MATRIX
    form: dict = field(default_factory=dict)


HEADS, WHOLE = "n (h d) -> h d n", "n m -> 1 m n"
MATRICES = {
    "tall": Matrix((300, 4), 0),
    "wide": Matrix((4, 300), 1),
    "d x 4d": Matrix((6, 24), 1, (2,)),
    "4d x d": Matrix((24, 6), 0, (2,)),
    "uneven": Matrix((13, 2), 0),
    "a rank without rows": Matrix((9, 2), 0),
    "a rank without columns": Matrix((2, 9), 1),
    "heads along the other axis": Matrix((40, 6), 0, view=View(HEADS, {"h": 3})),
    "a split of the other axis": Matrix((40, 11), 0, view=View((HEADS, HEADS, WHOLE), {"d": 2}, (4, 4, 3), 1)),
    "a repeated split of the other axis": Matrix(
        (60, 14), 0, view=fused(q=4, k=2, v=1, order="by group", head_dim=2, transposed=True)
    ),
    "convolution": Matrix((40, 1, 2, 2), 0, view=conv(4)),
    "right side of a wide one": Matrix((20, 3), 0, form={"side": "right"}),
    "interval": Matrix((50, 3), 0, form={"precondition_frequency": 3, "weight_decay": 0.0}),
    "plain": Matrix((50, 3), 0, form={"cross_normalize": False, "adjust_lr": None, "nesterov": False}),
    "of gradients": Matrix((50, 3), 0, form={"statistic": "gradient", "adjust_lr": "slice_rms", "maximize": True}),
    "no momentum": Matrix((50, 3), 0, form={"betas": (0.0, 0.9)}),  # a rank's rows are zero where others are not
    "packed": Matrix((50, 5), 0, form={"packed_state": True, "precondition_frequency": 2, "weight_decay": 0.0}),
    "sum": Matrix((3, 50), 1, form={"betas": (0.9, 1.0), "root": "outside", "eps": 1e-3}),
}
SOME = ("tall", "wide", "uneven", "a rank without rows", "a split of the other axis", "convolution", "interval")
GATHERED = {
    "left side, cut by rows": Matrix((4, 300), 0, ()),
    "right side, cut by columns": Matrix((300, 4), 1, ()),
    "square": Matrix((12, 12), 0, ()),
    "a split of the cut axis": Matrix((80, 3), 0, (), View("m n -> 1 m n", (), (40, 40), 0)),
    "a repeated split of the cut axis": Matrix((27, 3), 0, (), fused(q=4, k=3, v=2, order="by group")),
    "repeated heads of the cut axis": Matrix((27, 3), 0, (), fused(q=6, k=2, v=1, order="by group", head_dim=2)),
    "heads within the cut axis": Matrix((3, 60), 1, (), View("m (h d) -> h m d", {"h": 3})),
}


def gradient_of(place, shape, step):
    """With rows of zeros, entries that are not finite and gradients of zeros at some steps."""
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * step + place))
    if step % 5 == 1:
        grad[: (shape[0] + 1) // 2] = 0  # all that the first rank has, or the first two
    if step % 5 == 2 and len(shape) == 2:
        grad[:, shape[1] // 2 :] = 0
    if step == 7:
        grad.view(-1)[0] = torch.nan
    if step == 13:
        grad.view(-1)[-1] = torch.inf
    return torch.zeros_like(grad) if step == 17 else grad


ALL = MATRICES | {f"twin {i}": Matrix((60, 3), 0) for i in range(3)} | {"vector": Matrix((5,), 0, (), None)}


class Held(nn.Module):
    """Some of the parameters of `ALL`, cut over a mesh or whole."""

    def __init__(self, placements_of=None, mesh=None, dtype=torch.float64, table=ALL):
        super().__init__()
        self.named, self.table = [], table
        for place, (name, matrix) in enumerate(table.items()):
            whole = torch.randn(matrix.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(place))
            whole = whole.to(dtype)
            if mesh is not None:
                whole = distribute_tensor(whole, mesh, placements_of(matrix.dim), src_data_rank=None)
            self.register_parameter(f"p{place}", nn.Parameter(whole))
            self.named.append((name, self.get_parameter(f"p{place}")))

    def groups(self):
        found = []
        for name, param in self.named:
            found.append({"params": [(name, param)], "view": self.table[name].view, **self.table[name].form})
        twins = [group for group in found if group["params"][0][0].startswith("twin")]
        rest = [group for group in found if group not in twins]
        together = [{**group, "params": [pair for twin in twins for pair in twin["params"]]} for group in twins[:1]]
        return rest + together

    def draw(self, step):
        for place, (_, param) in enumerate(self.named):
            grad = gradient_of(place, param.shape, step).to(param.dtype)
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
            param.grad = grad


CUTS = {
    "shards": lambda: (lambda dim: [Shard(dim)], init_device_mesh("cpu", (dist.get_world_size(),))),
    "other shards": lambda: (lambda dim: [Shard(0)], init_device_mesh("cpu", (dist.get_world_size(),))),
    "hybrid": lambda: (lambda dim: [Replicate(), Shard(dim)], init_device_mesh("cpu", (2, dist.get_world_size() // 2))),
    "across": lambda: (lambda dim: [Shard(dim), Replicate()], init_device_mesh("cpu", (2, dist.get_world_size() // 2))),
}


def build(layout, make=ASGO, dtype=torch.float64, table=ALL):
    model = Held(*(CUTS[layout]() if layout in CUTS else ()), dtype=dtype, table=table)
    groups = model.groups()
    if make is not ASGO:
        groups = [{"params": pair, "view": MATRIX if pair[0][1].ndim == 2 else None} for pair in zip(model.named)]
    optimizer = make(groups, lr=0.02)
    if layout in ("ddp", "zero1"):
        optimizer.distribute(shard_state=layout == "zero1")
    return model, optimizer


def train(model, optimizer, steps=STEPS, start=0, clip=None):
    for step in range(start, start + steps):
        model.draw(step)
        if clip:
            finite = [param for _, param in model.named if bool(whole(param.grad).isfinite().all())]
            torch.nn.utils.clip_grad_norm_(finite, clip)
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(model):
    return {name: whole(param).detach() for name, param in model.named}


def kinds(optimizer):
    return {
        name: optimizer._strategy(param, group).kind
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


def part_of(*names):
    return {name: ALL[name] if name in ALL else GATHERED[name] for name in names}


def trained(layout, make, training, table=ALL):
    model, optimizer = build(layout, make, table=table)
    train(model, optimizer, **training)
    return values(model), kinds(optimizer), optimizer.failures()


@cache
def alone(make=ASGO, names=(), **training):
    return trained(None, make, training, part_of(*names) if names else ALL)


def far(found, expected):
    return {name: d for name, x in found.items() if (d := float((x - expected[name]).abs().max())) >= 1e-8}


# ---- equality ------------------------------------------------------------------------------------------------

WHERE = [("shards", 2, 2, STEPS), ("shards", 4, 4, STEPS), ("hybrid", 4, 2, 15), ("across", 4, 2, 15)]
"""A layout, its ranks, over how many of them a matrix is cut, and steps."""


@pytest.mark.parametrize(("layout", "size", "shards", "steps"), WHERE, ids=str)
def test_rows_and_columns_are_stepped_as_on_one_process(worlds, layout, size, shards, steps):
    expected, _, failures = alone(steps=steps)
    found = worlds(size)(trained, layout, ASGO, {"steps": steps})
    for params, kind, _ in found:
        assert far(params, expected) == {}
        assert {name: kind[name] == "partial_sums" for name in MATRICES} == {
            name: shards in matrix.on for name, matrix in MATRICES.items()
        }
    told = {name: sum(counts.get(name, 0) for *_, counts in found) for name in MATRICES}
    assert told == {name: failures[name] for name in MATRICES}  # the owner alone counts


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_no_sum_or_would_send_more_is_gathered(worlds, size):
    names = (*GATHERED, "tall")
    for params, kind, _ in worlds(size)(trained, "shards", ASGO, {"steps": 3}, part_of(*names)):
        assert far(params, alone(names=names, steps=3)[0]) == {}
        assert kind == dict.fromkeys(GATHERED, "owner_computes") | {"tall": "partial_sums"}


def measured(layout, steps):
    model, optimizer = build(layout, table=ALL | GATHERED)
    optimizer.record_metrics()
    train(model, optimizer, steps)
    return optimizer.metrics()


@cache
def measured_alone(steps):
    return measured(None, steps)


@pytest.mark.parametrize(("layout", "size"), [("shards", 2), ("shards", 4), ("hybrid", 4), ("across", 4)], ids=str)
def test_metrics_are_those_of_one_process(worlds, layout, size):
    """Also the failures of the eighth and the fourteenth step."""
    expected = measured_alone(16)
    assert sum(row["failures"] for row in expected.values()) > 2 * len(ALL | GATHERED) - 10
    for found in worlds(size)(measured, layout, 16):
        assert set(found) == set(expected)
        for name, row in expected.items():
            assert found[name] == pytest.approx(row, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("size", [2, 4])
def test_clipping(worlds, size):
    expected, *_ = alone(names=SOME, clip=0.05, steps=9)
    for params, *_ in worlds(size)(trained, "shards", ASGO, {"clip": 0.05, "steps": 9}, part_of(*SOME)):
        assert far(params, expected) == {}


@pytest.mark.parametrize(("layout", "size"), [("shards", 2), ("shards", 4), ("hybrid", 4)])
def test_squares_of_columns_are_added_up_on_all_ranks(worlds, layout, size):
    """DASGO has no roots: nobody owns its numbers."""
    names = ("tall", "wide", "square")
    expected, _, failures = alone(DASGO, names, steps=18)
    for params, kind, counts in worlds(size)(trained, layout, DASGO, {"steps": 18}, part_of(*names)):
        assert far(params, expected) == {}
        assert kind == {"tall": "partial_sums", "wide": "owner_computes", "square": "partial_sums"}
        assert {name: counts[name] for name in ("tall", "square")} == {
            name: failures[name] for name in ("tall", "square")
        }


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mlp(layout, make):
    """A model that torch itself has cut, after training."""
    torch.manual_seed(0)
    model, share, kind = Mlp().double(), slice(None), None
    if layout == "tensor parallel":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    elif layout:
        fully_shard(model)
        share = slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = make(list(model.named_parameters()))
    for step in range(STEPS):
        x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[share]
        (model(x) - x.flip(1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    if layout:
        kind = kinds(getattr(optimizer, "optimizer", optimizer))
    return {name: whole(param).detach() for name, param in model.named_parameters()}, kind


def spam(params):
    return SPAM(ASGO(params), interval=20, warmup=5)


@pytest.mark.parametrize(("layout", "name"), [("fully_shard", "up.weight"), ("tensor parallel", "down.weight")])
@pytest.mark.parametrize("make", [ASGO, spam])
def test_what_torch_cuts(worlds, layout, name, make):
    expected, _ = mlp(None, make)
    for params, kind in worlds(2)(mlp, layout, make):
        assert far(params, expected) == {}
        assert kind[name] == "partial_sums"


# ---- what travels --------------------------------------------------------------------------------------------


def sent_by(name, interval):
    """Bytes that this rank sends for one matrix in a step in which its root is due, and in one in which it is not."""
    model, found = Held(*CUTS["shards"](), table=part_of(name)), []
    ((_, param),) = [pair for pair in model.named if pair[0] == name]
    matrix = MATRICES[name]
    optimizer = ASGO([{"params": [(name, param)], "view": matrix.view}], lr=0.02, precondition_frequency=interval)
    for step in (1, 22):  # the first ten steps refresh every root
        model.draw(step)
        optimizer.state[param]["step"].fill_(step - 1)
        with Counted() as counted:
            optimizer.step()
        assert counted.sent["all_reduce"] == 0
        found.append(counted.sent)
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["tall", "wide", "uneven", "a rank without rows", "4d x d"])
def test_bytes_are_those_of_one_statistic_and_one_root(worlds, size, name):
    """And less than the owner's gather, whose bytes are those of `owned`; at a step without a refresh half of it."""
    m, n = MATRICES[name].shape
    k, gathered = min(m, n), 2 * 8 * m * n * (size - 1) / size
    first, later = zip(*worlds(size)(sent_by, name, 100), strict=True)
    sent = [sum(count["all_to_all_single"] for count in counts) for counts in (first, later)]
    if size in MATRICES[name].on:
        assert sent == [2 * 8 * k**2 * (size - 1), 8 * k**2 * (size - 1)]
        assert sent[0] < gathered
        assert all(count["all_gather"] == (2 + k) * 8 * (size - 1) for count in first)  # norms: gradient, rows, update
    else:
        assert sent == [gathered, gathered]
        assert gathered <= 2 * 8 * k**2 * (size - 1)


def shares(make):
    """The numbers of state that this rank keeps, by parameter and key."""
    _, optimizer = build("shards", make)
    return {
        name: {key: tensor.numel() for key, tensor in optimizer.state[param].items()}
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }


@pytest.mark.parametrize("size", [2, 4])
def test_state_lies_where_the_rows_are_and_the_statistic_on_one_rank(worlds, size):
    found = worlds(size)(shares, ASGO)
    for name in (name for name, matrix in MATRICES.items() if size in matrix.on):
        expected = {key: tensor.numel() for key, tensor in alone_state()[name].items()}
        for key in set(expected) - {"step"}:
            kept = [each[name][key] for each in found]
            if key.split(".")[0] == "root":
                assert kept == [expected[key]] * size
            else:
                assert sum(kept) == expected[key], (name, key)
            if key.split(".")[0] in ("gram", "failures"):
                assert max(kept) == expected[key]
    grams = [[each[name]["gram"] > 0 for each in found] for name in MATRICES]
    assert all(map(any, zip(*grams, strict=True)))  # every rank owns some


def alone_state():
    model, optimizer = build(None)
    return {name: optimizer.state[param] for name, param in model.named}


# ---- checkpoints ---------------------------------------------------------------------------------------------


def save_after(layout, folder, steps):
    model, optimizer = build(layout, table=part_of(*SOME))
    train(model, optimizer, steps)
    sharded.save(folder, model, optimizer, {"step": steps})
    state = optimizer.state_dict()["state"]
    return {(i, key): tuple(tensor.shape) for i, of in state.items() for key, tensor in of.items()}


def continue_from(layout, folder, steps):
    model, optimizer = build(layout, table=part_of(*SOME))
    extra = sharded.load(folder, model, optimizer)
    train(model, optimizer, steps, start=extra["step"])
    again, other = build(layout, table=part_of(*SOME))  # and what state_dict gave loads again
    with torch.no_grad():
        for (_, target), (_, source) in zip(again.named, model.named, strict=True):
            target.copy_(source)
    other.load_state_dict(optimizer.state_dict())
    for each in ((model, optimizer), (again, other)):
        train(*each, 2, start=extra["step"] + steps)
    return values(model), far(values(again), values(model))


ROUTES = [
    (("shards", 2), ("shards", 4)),
    (("shards", 4), (None, 1)),
    ((None, 1), ("hybrid", 4)),
    (("hybrid", 4), ("ddp", 2)),
    (("zero1", 2), ("shards", 3)),
    (("shards", 3), ("other shards", 2)),
    (("other shards", 4), ("shards", 2)),
]


@pytest.mark.parametrize(("before", "after"), ROUTES, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_continues_in_any_other_layout(worlds, tmp_path, before, after):
    folder = tmp_path / "step-6"
    shapes = on(worlds, before[1], save_after, before[0], folder, 6)
    alone_shapes = {(i, key): tuple(x.shape) for i, of in enumerate(states()) for key, x in of.items()}
    assert all(each == alone_shapes for each in shapes)
    for params, again in on(worlds, after[1], continue_from, after[0], folder, 4):
        assert far(params, alone(names=SOME, steps=12)[0]) == {}
        assert again == {}


def from_one_process():
    """A whole state dict, as one process saves it, loaded into shards."""
    whole_model, whole_optimizer = build(None, table=part_of(*SOME))
    train(whole_model, whole_optimizer, 5)
    model, optimizer = build("shards", table=part_of(*SOME))
    with torch.no_grad():
        for (_, target), (_, source) in zip(model.named, whole_model.named, strict=True):
            mesh = getattr(target, "device_mesh", None)
            target.copy_(distribute_tensor(source.detach(), mesh, target.placements, src_data_rank=None))
    optimizer.load_state_dict(whole_optimizer.state_dict())
    train(model, optimizer, 5, start=5)
    train(whole_model, whole_optimizer, 5, start=5)
    return far(values(model), values(whole_model))


@pytest.mark.parametrize("size", [2, 4])
def test_the_state_of_one_process_loads_into_shards(worlds, size):
    assert worlds(size)(from_one_process) == [{}] * size


def saved_meanwhile(folder):
    model, optimizer = build("shards", table=part_of(*SOME))
    train(model, optimizer, 4)
    saving = sharded.save_async(folder, model, optimizer, {"step": 4})
    train(model, optimizer, 2, start=4)  # what is saved is as it was
    saving.result(60)
    dist.barrier()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_that_is_saved_meanwhile(worlds, tmp_path):
    worlds(2)(saved_meanwhile, tmp_path / "step-4")
    params, again = continue_from(None, tmp_path / "step-4", 4)
    assert far(params, alone(names=SOME, steps=10)[0]) == {}
    assert again == {}


def states():
    _, optimizer = build(None, table=part_of(*SOME))
    return [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]


def begun_again():
    """After `reset`, a model that goes on is as one that begins there."""
    model, optimizer = build("shards", table=part_of(*SOME))
    train(model, optimizer, 4)
    optimizer.reset()
    fresh, other = build("shards", table=part_of(*SOME))
    with torch.no_grad():
        for (_, target), (_, source) in zip(fresh.named, model.named, strict=True):
            target.copy_(source)
    for each in ((model, optimizer), (fresh, other)):
        train(*each, 4, start=20)
    return far(values(fresh), values(model))


def test_reset(worlds):
    assert worlds(2)(begun_again) == [{}, {}]


def low_precision():
    model, optimizer = build("shards", dtype=torch.bfloat16, table=part_of(*SOME))
    train(model, optimizer, 6)
    return values(model), {x.dtype for state in optimizer.state.values() for x in state.values()}


def test_parameters_of_low_precision_keep_state_in_float32(worlds):
    (one, dtypes), (other, _) = worlds(2)(low_precision)
    assert torch.bfloat16 not in dtypes
    assert all(torch.equal(one[name], other[name]) and one[name].isfinite().all() for name in one)


def distributed_on_top():
    """The vectors of a model may be whole while its matrices are cut: `distribute` is for those."""
    model = Held(*CUTS["shards"](), table=part_of(*SOME))
    plain = nn.Parameter(torch.ones(6, 6, dtype=torch.float64))
    optimizer = ASGO([*model.groups(), {"params": [("plain", plain)], "view": MATRIX}], lr=0.02)
    optimizer.distribute(shard_state=True)
    for step in range(3):
        model.draw(step)
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    return values(model), kinds(optimizer)


def test_distribute_leaves_what_is_cut(worlds):
    for params, kind in worlds(2)(distributed_on_top):
        assert far(params, alone(names=SOME, steps=3)[0]) == {}
        assert (kind["tall"], kind["plain"]) == ("partial_sums", "owner_computes")
