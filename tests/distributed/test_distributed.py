"""Several processes give what one gives: every layout, every optimizer, every form; and what it costs them."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from asgo import ASGO, DASGO, route
from asgo.checkpoint import sharded
from asgo.distributed.ownership import STRATEGIES, WorkItem, owners
from asgo.distributed.strategies import RootSharing
from asgo.optimizer.param_groups import views_of
from asgo.optimizer.refresh_schedule import refresh_phases
from asgo.views import MATRIX, STACK, fused_qkv, head_columns, heads
from family import PRESETS
from worlds import Counted, World, on

STEPS = 50


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


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


VIEWS = {
    "query.weight": heads(4),
    "out.weight": head_columns(4),
    "fused.weight": fused_qkv(8, 8, 6, 4),
    "tall.weight": MATRIX,
    "wide.weight": MATRIX,
    "experts": STACK,
}
FORMS = {
    "query.weight": {"precondition_frequency": 4, "packed_state": True},
    "out.weight": {"adjust_lr": "slice_rms"},
    "fused.weight": {"statistic": "gradient", "nesterov": False, "packed_state": True},
    "tall.weight": {"side": "left", "betas": (0.0, 1.0), "adjust_lr": None, "root": "outside", "eps": 1e-3},
    "wide.weight": {"statistic": "gradient", "nesterov": False, "cross_normalize": False, "betas": (0.9, 0.8)},
    "experts": {"packed_state": True, "precondition_frequency": 3, "maximize": False},
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
    output = model(tokens)
    return (output - targets.to(output.dtype)).square().mean()


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


def build(layout, make, dtype=torch.float64):
    """The model, what to call, its optimizer and this rank's share of a batch; the layout None is one process."""
    model = net(dtype)
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


def trained(layout, make, training, dtype=torch.float64):
    """The parameters after training, and how large the state is that this rank keeps."""
    model, wrapped, optimizer, share = build(layout, make, dtype)
    train(wrapped, optimizer, share=share, **training)
    kept = sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step")
    return parameters(model), kept


@cache
def alone(make, **training):
    return trained(None, make, training)


def distance(ours, theirs):
    return max(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True))


# ---- equality ------------------------------------------------------------------------------------------------

WHERE = [("ddp", 2), ("zero1", 2), ("fsdp", 2), ("tp", 2), ("zero1", 4), ("fsdp", 4), ("hsdp", 4), ("fsdp+tp", 4)]
everywhere = pytest.mark.parametrize(("layout", "size"), WHERE, ids=str)


@everywhere
def test_every_form_in_every_layout_is_that_of_one_process(worlds, layout, size):
    expected, state = alone(every_form)
    found = worlds(size)(trained, layout, every_form, {})
    for params, _ in found:
        assert distance(params, expected) < 1e-8
    if layout in ("zero1", "fsdp"):  # everything is kept once; AdamW's counts of failures are everywhere
        without_view = sum(name not in VIEWS for name, _ in Net().named_parameters())
        roots = 4 * 4 * 4 if (layout, size) == ("fsdp", 2) else 0  # of `out`, whose rows are cut: on both ranks
        assert sum(kept for _, kept in found) == state + (size - 1) * without_view + roots
        assert max(kept for _, kept in found) < state
    elif layout == "ddp":
        assert [kept for _, kept in found] == [state] * size


def measured(layout):
    _, wrapped, optimizer, share = build(layout, every_form)
    optimizer.record_metrics()
    train(wrapped, optimizer, share=share, steps=3)
    return optimizer.metrics()


@everywhere
def test_metrics_are_those_of_one_process(worlds, layout, size):
    expected = measured(None)
    for found in worlds(size)(measured, layout):
        assert set(found) == set(expected)
        for name, row in expected.items():
            assert found[name] == pytest.approx(row, rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_accumulation_and_clipping(worlds, layout):
    training = {"parts": 2, "clip": 0.05, "steps": 20}
    for params, _ in worlds(2)(trained, layout, one_form, training):
        assert distance(params, alone(one_form, **training)[0]) < 1e-8


@cache
def alone_in_float32():
    """The parameters of one process, and how far from them a batch in 2, 4 or 8 parts ends."""
    expected = trained(None, one_form, {}, torch.float32)[0]
    orders = [trained(None, one_form, {"parts": parts}, torch.float32)[0] for parts in (2, 4, 8)]
    return expected, max(distance(order, expected) for order in orders)


@pytest.mark.parametrize(("layout", "size"), [("ddp", 2), ("zero1", 2), ("fsdp", 2), ("fsdp", 4)], ids=str)
def test_in_float32_ranks_drift_as_a_batch_summed_in_another_order_does(worlds, layout, size):
    expected, drift = alone_in_float32()
    assert 0 < drift < 1e-2
    for params, _ in worlds(size)(trained, layout, one_form, {}, torch.float32):
        assert distance(params, expected) < 10 * drift


class Small(nn.Module):
    """Two matrices, one of rows that two ranks cannot share evenly, and vectors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def cut(model, layout):
    if layout in ("ddp", "zero1"):
        return ddp(model)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    if layout == "fsdp+tp":
        parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(model.first, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]), data_share(mesh["dp"].get_local_rank(), 2)


def family(layout, names):
    """The parameters of a small model after training with each preset; the layout None is one process."""
    found = {}
    for name in names:
        torch.manual_seed(1)
        model = Small().double()
        wrapped, share = cut(model, layout) if layout else (model, slice(None))
        optimizer = PRESETS[name](list(model.named_parameters()))
        if layout in ("ddp", "zero1"):
            optimizer.distribute(shard_state=layout == "zero1")
        for step in range(12):
            dice = torch.Generator().manual_seed(step)
            for x in torch.randn(2, 4, 6, dtype=torch.float64, generator=dice):  # accumulated
                wrapped(x[share]).square().mean().backward()
            if step % 2:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        found[name] = parameters(model)
    return found


@pytest.mark.parametrize(("layout", "size"), [("zero1", 2), ("fsdp+tp", 4)])
def test_the_family(worlds, layout, size):
    expected = family(None, PRESETS)
    for found in worlds(size)(family, layout, tuple(PRESETS)):
        assert {name: params for name, params in found.items() if distance(params, expected[name]) >= 1e-8} == {}


def poisoned(layout):
    """Parameters and failures after steps of which some have a gradient that is not finite in one entry."""
    model, wrapped, optimizer, share = build(layout, one_form)
    named = dict(model.named_parameters())
    for step in range(6):
        loss_of(wrapped, *(x[share] for x in batch(step))).backward()
        for at, name in ((2, "tall.weight"), (3, "fused.weight"), (4, "embed.weight")):
            if step == at:
                grad = named[name].grad
                held = grad.to_local() if isinstance(grad, DTensor) else grad
                if not isinstance(grad, DTensor) or (dist.get_rank() == 0 and held.numel()):
                    held.view(-1)[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
    return parameters(model), optimizer.failures()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_rank_rests_on_all(worlds, layout):
    expected, failures = poisoned(None)
    assert failures == {"tall.weight": 1, "fused.weight": 1, "embed.weight": 1}
    found = worlds(2)(poisoned, layout)
    for params, _ in found:
        assert distance(params, expected) < 1e-8
    assert {name: max(counts.get(name, 0) for _, counts in found) for name in failures} == failures


# ---- what travels --------------------------------------------------------------------------------------------


def traffic(layout, names):
    """The bytes that this rank sends in one step on these parameters, and what the placements and owners say."""
    model = net()
    _, after = LAYOUTS[layout]
    LAYOUTS[layout][0](model)
    params = [(name, param) for name, param in model.named_parameters() if name in names]
    optimizer = ASGO([{"params": [(name, param)], "view": VIEWS.get(name)} for name, param in params], lr=0.02)
    if after is not None:
        after(optimizer)
    for _, param in params:
        param.grad = torch.ones_like(param)
    with Counted() as counted:
        optimizer.step()
    sizes = [(param.to_local() if isinstance(param, DTensor) else param).numel() for _, param in params]
    roots = [state["root"].numel() for state in optimizer.state.values() if "root" in state]
    return counted.sent, sizes, roots, [optimizer._partition._owners.get(param) for _, param in params]


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_shared_roots(worlds, size):
    """Each root goes from its owner to all others, with one count of failures per matrix."""
    found = worlds(size)(traffic, "ddp", ("tall.weight", "wide.weight"))
    sent = [each["all_to_all_single"] for each, *_ in found]
    assert sum(sent) == (size - 1) * (8 * (22**2 + 3**2) + 8 * 2)


@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_bytes_of_sharded_matrices(worlds, layout, size):
    """A rank sends its gradient to the owner, which sends everyone's update: twice what the owner does not hold."""
    found = worlds(size)(traffic, layout, ("tall.weight",))
    ((owner,),) = found[0][3]
    held = [sizes[0] for _, sizes, _, _ in found]
    gathered = 30 * 22 - held[owner]
    scattered = sum(held) - held[owner]  # hybrid: to both replicas
    assert sum(each["all_to_all_single"] for each, *_ in found) == 8 * (gathered + scattered)
    assert all(each["all_gather"] == each["all_reduce"] == 0 for each, *_ in found)


@pytest.mark.parametrize(("layout", "name", "matrices"), [("fsdp", "query.weight", 4), ("tp", "query.weight", 4),
                                                        ("tp", "out.weight", 4), ("fsdp", "experts", 4)])  # fmt: skip
def test_aligned_matrices_send_one_norm_each(worlds, layout, name, matrices):
    for sent, _, roots, _ in worlds(2)(traffic, layout, (name,)):
        assert sent == {"all_to_all_single": 0, "all_gather": 8 * matrices // 2, "all_reduce": 0}
        assert len(roots) == 1


def test_adamw_sends_one_flag_per_parameter(worlds):
    for sent, *_ in worlds(2)(traffic, "fsdp", ("embed.weight", "out.bias")):
        assert sent == {"all_to_all_single": 0, "all_gather": 0, "all_reduce": 4 * 2}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("interval", [1, 10])
@pytest.mark.parametrize("kind", ["root_sharing", "owner_computes"])
def test_root_work_of_gpt2_is_balanced(ranks, interval, kind):
    """Cubes of all roots, per rank: within 15 % of an equal share."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = ASGO(route(model), precondition_frequency=interval)
    phase_of = refresh_phases(optimizer._group_plans())
    units, cubes = [], []
    for group in optimizer.param_groups:
        structure = optimizer.structure(group)
        for param, view in zip(group["params"], views_of(group), strict=True):
            for part, shape in enumerate(view.shapes(param.shape) if view else ()):
                cost = STRATEGIES[kind].owner_cost(structure, shape)
                units.append(WorkItem(cost, tuple(range(ranks)), (interval, phase_of[param, part])))
                cubes.append(shape[0] * structure.root_flops(*shape[1:]))
    chosen = owners(units)
    load = [sum(c for c, owner in zip(cubes, chosen, strict=True) if owner == rank) for rank in range(ranks)]
    assert max(load) <= 1.15 * sum(cubes) / ranks
    assert len(cubes) == 72


# ---- what cannot be done -------------------------------------------------------------------------------------


def refused():
    """The messages of what cannot be done."""
    mesh = init_device_mesh("cpu", (2,))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    messages = []
    for view in (MATRIX, None):
        with pytest.raises(TypeError) as caught:
            ASGO([{"params": [("block.w", partial)], "view": view}])
        messages.append(str(caught.value))
    optimizer = ASGO([nn.Parameter(torch.ones(4, 3))])
    optimizer.distribute()
    with pytest.raises(ValueError) as again:
        optimizer.distribute()
    with pytest.raises(ValueError) as both:
        ASGO([nn.Parameter(torch.ones(4, 3))]).distribute(shard_state=True, strategy=RootSharing)
    return [*messages, str(again.value), str(both.value)]


def test_what_cannot_be_done_is_named(worlds):
    for first, second, again, both in worlds(2)(refused):
        assert first == second
        assert first.startswith("ASGO: 'block.w' (4, 3) has the placements (Partial(sum),)")
        assert first.endswith("Redistribute it to Shard(...) or Replicate().")
        assert again == "ASGO: its work is distributed already; call distribute once."
        assert both.startswith("ASGO: distribute got shard_state and a strategy;")
    with pytest.raises(RuntimeError, match="torch.distributed, which is not initialized"):
        ASGO([nn.Parameter(torch.ones(4, 3))]).distribute()


# ---- checkpoints ---------------------------------------------------------------------------------------------


def save_after(layout, folder, steps, asynchronous=False):
    _, wrapped, optimizer, share = build(layout, one_form)
    train(wrapped, optimizer, steps, share=share)
    if asynchronous:
        saving = sharded.save_async(folder, wrapped, optimizer, {"step": steps})
        train(wrapped, optimizer, 2, start=steps, share=share)  # what is saved is as it was
        saving.result(60)
        if dist.is_initialized():
            dist.barrier()
    else:
        sharded.save(folder, wrapped, optimizer, {"step": steps})


def continue_from(layout, folder, steps):
    model, wrapped, optimizer, share = build(layout, one_form)
    extra = sharded.load(folder, wrapped, optimizer)
    train(wrapped, optimizer, steps, start=extra["step"], share=share)
    return parameters(model)


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
        assert distance(params, alone(one_form, steps=12)[0]) < 1e-8


def through_torch(layout, folder):
    """The difference between going on and going on from what torch's own functions saved and loaded."""
    model, wrapped, optimizer, share = build(layout, one_form)
    train(wrapped, optimizer, 3, share=share)
    dcp.save({"optim": get_optimizer_state_dict(wrapped, optimizer)}, checkpoint_id=folder)
    twin, wrapped_twin, other, _ = build(layout, one_form)
    set_model_state_dict(wrapped_twin, get_model_state_dict(wrapped))
    state = {"optim": get_optimizer_state_dict(wrapped_twin, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(wrapped_twin, other, state["optim"])
    for some, its in ((wrapped, optimizer), (wrapped_twin, other)):
        train(some, its, 3, start=3, share=share)
    return distance(parameters(model), parameters(twin))


@pytest.mark.parametrize("layout", ["zero1", "fsdp"])
def test_the_functions_of_torch_save_and_load_the_state(worlds, tmp_path, layout):
    assert worlds(2)(through_torch, layout, tmp_path) == [0, 0]


def wrong_loads(folder, broken):
    """Messages of checkpoints that do not fit; and that nothing changed."""
    model, wrapped, _, _ = build("fsdp", one_form)
    others = {
        "view": ASGO([{"params": list(model.named_parameters())}]),
        "optimizer": DASGO([{"params": list(model.named_parameters())}]),
    }
    before, messages = parameters(model), {}
    for name, optimizer in others.items():
        with pytest.raises(ValueError) as caught:
            sharded.load(folder, wrapped, optimizer)
        messages[name] = str(caught.value)
    with pytest.raises(ValueError) as caught:
        sharded.load(broken, wrapped, others["view"])
    messages["broken"] = str(caught.value)
    with pytest.raises(ValueError) as caught:
        sharded.save(folder, wrapped, others["view"])
    messages["exists"] = str(caught.value)
    return messages, distance(before, parameters(model))


def test_a_mismatch_is_named_before_anything_is_loaded(worlds, tmp_path):
    folder, broken = tmp_path / "whole", tmp_path / ".next.tmp"
    worlds(2)(save_after, "fsdp", folder, 1)
    broken.mkdir()  # as a kill while saving leaves it
    (broken / "__0_0.distcp").write_bytes(b"half")
    for messages, moved in worlds(2)(wrong_loads, folder, broken):
        assert moved == 0
        assert messages["view"].startswith("ASGO: experts (4, 3, 5) is read as ")
        assert "Build the optimizer with the views it was saved with" in messages["view"]
        assert "is of ASGO" in messages["optimizer"]
        assert "is not a whole checkpoint" in messages["broken"]
        assert "never written over another" in messages["exists"]
    worlds(2)(save_after, "fsdp", tmp_path / "next", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["next", "whole"]


def keys(layout):
    _, _, optimizer, _ = build(layout, one_form)
    state = optimizer.state_dict()["state"]
    return {i: {key: tuple(tensor.shape) for key, tensor in of.items()} for i, of in state.items()}


@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp", "hsdp", "fsdp+tp"])
def test_keys_and_shapes_are_those_of_one_process_on_every_rank_from_the_start(worlds, layout):
    expected = keys(None)
    assert all(found == expected for found in worlds(4)(keys, layout))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_rank_of_nccl():
    world = World(1, "nccl")
    try:
        ((moved,),) = [world(on_nccl)]
    finally:
        world.end()
    assert moved < 1e-4


def on_nccl():
    """The difference that FSDP2 makes on one device, in float32."""
    expected, found = net().float().cuda(), net().float().cuda()
    fully_shard(found)
    for model in (expected, found):
        optimizer = one_form(model)
        for step in range(10):
            tokens, targets = batch(step)
            loss_of(model, tokens.cuda(), targets.float().cuda()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return distance(parameters(expected), parameters(found))


ENDS = """
import sys
from pathlib import Path
import torch
import torch.distributed.nn
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from asgo import ASGO, route

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
parallel = DistributedDataParallel(model)
optimizer = ASGO(route(model), lr=1e-2)
optimizer.distribute(shard_state=sys.argv[1] == "zero1")
for step in range(2):
    parallel(torch.randn(32, 16)).square().mean().backward()
    optimizer.step()
threads = lambda: [task for task in Path("/proc/self/task").iterdir() if "gloo" in (task / "comm").read_text()]
assert threads()
del parallel
distributed.destroy_process_group()
assert not threads(), threads()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds threads in /proc")
@pytest.mark.parametrize("way", ["ddp", "zero1"])
def test_the_threads_of_a_group_end_with_it_while_the_optimizer_lives(way):
    ended = subprocess.run([sys.executable, "-c", ENDS, way], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
