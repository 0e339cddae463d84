"""The square-root form on several processes: as on one, in every layout and precision; what they compute and send."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asgo import ASGO
from asgo.structures import SquareRoot

MATRICES = {
    "tall": ((60, 4), 0),
    "wide": ((4, 60), 1),
    "twin": ((60, 4), 0),
    "square": ((12, 12), 0),
    "odd": ((7, 5), 0),
}
"""Shapes, and the axis that ranks cut."""
SUMMED = {"tall", "wide", "twin"}
STEPS = 12


def shards(dim):
    return [Shard(dim)], init_device_mesh("cpu", (dist.get_world_size(),))


def hybrid(dim):
    return [Replicate(), Shard(dim)], init_device_mesh("cpu", (2, dist.get_world_size() // 2))


CUTS = {"shards": shards, "hybrid": hybrid}


def like(whole, param):
    """The whole tensor where the parameter's entries are."""
    if isinstance(param, DTensor):
        return distribute_tensor(whole, param.device_mesh, param.placements, src_data_rank=None)
    return whole


def drawn(place, step, dtype):
    dice = torch.Generator().manual_seed(1000 * step + place)
    shape = list(MATRICES.values())[place][0]
    grad = torch.randn(shape, dtype=torch.float64, generator=dice)
    if step == 3:
        grad.view(-1)[0] = torch.nan
    return (torch.zeros_like(grad) if step == 5 else grad).to(dtype)


def build(layout, dtype, options):
    params = []
    for place, (name, (shape, dim)) in enumerate(MATRICES.items()):
        whole = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(place)).to(dtype)
        if layout in CUTS:
            placements, mesh = CUTS[layout](dim)
            whole = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        params.append((name, nn.Parameter(whole)))
    optimizer = ASGO(params, lr=0.02, root="square_root", **options)
    if layout in ("ddp", "zero1"):
        optimizer.distribute(shard_state=layout == "zero1")
    return dict(params), optimizer


def train(params, optimizer, steps=STEPS, start=0):
    for step in range(start, start + steps):
        for place, param in enumerate(params.values()):
            param.grad = like(drawn(place, step, param.dtype), param)
        optimizer.step()


def kinds_of(named, optimizer):
    """The placement of every parameter by its name."""
    group = optimizer.param_groups[0]
    return {name: optimizer._strategy(param, group).kind for name, param in named.items()}


def trained(layout, dtype, options):
    """Parameters, kinds of placement, failures and the roots that this rank has."""
    params, optimizer = build(layout, dtype, options)
    train(params, optimizer)
    whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()}
    kinds = kinds_of(params, optimizer)
    roots = {name: optimizer.state[p]["sqrt"].clone() for name, p in params.items()}
    return {name: p.detach().double() for name, p in whole.items()}, kinds, optimizer.failures(), roots


@cache
def alone(dtype, **options):
    return trained(None, dtype, options)


def distances(found, expected):
    return {name: float((x - expected[name]).abs().max()) for name, x in found.items()}


WHERE = [("ddp", 2), ("zero1", 2), ("shards", 2), ("ddp", 4), ("zero1", 4), ("shards", 4), ("hybrid", 4)]
FORMS = [{}, {"statistic": "gradient"}, {"betas": (0.9, 0.0)}, {"cross_normalize": False, "betas": (0.9, 0.8)}]


@pytest.mark.parametrize(("layout", "size"), WHERE, ids=str)
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_several_processes_are_one_in_float64(worlds, layout, size, options):
    expected, _, failures, _ = alone(torch.float64, **options)
    assert failures == dict.fromkeys(MATRICES, 1)
    for params, kinds, counts, _ in worlds(size)(trained, layout, torch.float64, options):
        assert max(distances(params, expected).values()) < 1e-8
        if layout in CUTS:
            assert {name for name, kind in kinds.items() if kind == "partial_sums"} == SUMMED
            assert {name: counts[name] for name in SUMMED} == dict.fromkeys(SUMMED, 1)
        elif layout == "ddp":
            assert counts == failures


@pytest.mark.parametrize(("layout", "size"), WHERE, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_lower_precisions_are_as_near_to_float64_as_on_one_process(worlds, layout, size, precision):
    """What is summed takes the root of V in float32, whatever the precision; all else steps as one process does."""
    exact, own = alone(torch.float64)[0], alone(torch.float32, precision=precision)[0]
    rounding = distances(own, exact)
    for params, *_ in worlds(size)(trained, layout, torch.float32, {"precision": precision}):
        for name, distance in distances(params, exact).items():
            assert distance < 3 * rounding[name] + 1e-4, name
        if layout not in CUTS:
            assert max(distances(params, own).values()) < 1e-4


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_remember_the_same(worlds, size):
    for layout in ("ddp", "shards"):
        found = worlds(size)(trained, layout, torch.float32, {"precision": "bf16"})
        for name in MATRICES if layout == "ddp" else SUMMED:
            assert all(torch.equal(roots[name], found[0][3][name]) for *_, roots in found)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 40), nn.Linear(40, 5)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def mlp(layout):
    """The parameters of a model that torch itself has cut, after training, and their kinds of placement."""
    torch.manual_seed(0)
    model, share = Mlp().double(), slice(None)
    if layout == "tensor parallel":
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    elif layout:
        fully_shard(model)
        share = slice(dist.get_rank(), None, dist.get_world_size())
    optimizer = ASGO(list(model.named_parameters()), root="square_root")
    for step in range(STEPS):
        x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[share]
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    named = dict(model.named_parameters())
    whole = {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in named.items()}
    return whole, kinds_of(named, optimizer)


@pytest.mark.parametrize(("layout", "name"), [("fully_shard", "up.weight"), ("tensor parallel", "down.weight")])
@pytest.mark.parametrize("size", [2, 4])
def test_what_torch_cuts(worlds, layout, name, size):
    expected, _ = mlp(None)
    for params, kinds in worlds(size)(mlp, layout):
        assert max(distances(params, expected).values()) < 1e-8
        assert kinds[name] == "partial_sums"


def work(layout):
    """The matrices that this rank computes in a step, and the bytes it sends of what it has computed."""
    params, optimizer = build(layout, torch.float32, {"precision": "bf16"})
    train(params, optimizer, 1)
    computed, sent = [], []
    update, send = SquareRoot.update, dist.all_to_all_single

    def counted(self, state, direction, seen, beta2):
        computed.extend([tuple(direction.shape[1:])] * len(direction))
        return update(self, state, direction, seen, beta2)

    def measured(arrived, buffer, *args, **options):
        sent.append(buffer.numel() * buffer.element_size())
        return send(arrived, buffer, *args, **options)

    SquareRoot.update, dist.all_to_all_single = counted, measured
    try:
        train(params, optimizer, 1, 1)
    finally:
        SquareRoot.update, dist.all_to_all_single = update, send
    return computed, sum(sent)


@pytest.mark.parametrize("size", [2, 4])
def test_every_matrix_is_computed_once_and_sent_to_all(worlds, size):
    """Its update in float32, its root in bfloat16, the average along the other side and a count of failures."""
    found = worlds(size)(work, "ddp")
    assert sorted(shape for computed, _ in found for shape in computed) == sorted(s for s, _ in MATRICES.values())
    each = [4 * m * n + 2 * min(m, n) ** 2 + 8 * max(m, n) + 8 for (m, n), _ in MATRICES.values()]
    assert sum(sent for _, sent in found) == (size - 1) * sum(each)
