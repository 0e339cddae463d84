"""What frameworks do to an optimizer, and what it must be afterwards: groups, state, keys, names, hooks, precision."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from asgo import ASGO, BAG, SPAM, AdamMini, checkpoint, report, route
from asgo.state_keys import is_own, part_key, split_key
from asgo.views import MATRIX, View
from family import every_preset


class Net(nn.Module):
    """An embedding, a norm, two matrices with biases and a convolution."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.a, self.b, self.conv = nn.Linear(6, 8), nn.Linear(8, 4), nn.Conv2d(2, 3, 3)


def give_gradients(params, seed=0):
    dice = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=dice, dtype=torch.float32).to(param)


def run(optimizer, params, steps=3, start=0):
    for step in range(start, start + steps):
        give_gradients(params, step)
        optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def held_bytes(optimizer):
    """All memory that the state keeps alive."""
    storages = [t.untyped_storage() for state in optimizer.state.values() for t in state.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# ---- groups ----------------------------------------------------------------------------------------------------


@every_preset
def test_groups_given_are_the_groups_kept(make):
    net = Net()
    given = [{"params": list(net.a.parameters()), "lr": 0.5}, {"params": [net.embed.weight, *net.conv.parameters()]}]
    optimizer = make(given)
    assert all(a is b for a, b in zip(optimizer.param_groups, given, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 3]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert len(make(net.parameters()).param_groups) == 1


@every_preset
def test_schedules_with_a_value_for_every_group(make):
    net = Net()
    optimizer = make([{"params": list(net.a.parameters())}, {"params": list(net.b.parameters())}])
    lr = optimizer.param_groups[0]["lr"]
    LambdaLR(optimizer, [lambda step: 0.5, lambda step: 0.25])
    assert [group["lr"] for group in optimizer.param_groups] == [lr * 0.5, lr * 0.25]
    OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=9, cycle_momentum=False)
    run(optimizer, [*net.a.parameters(), *net.b.parameters()])


def test_schedules_move_the_learning_rates_of_matrices_and_of_adamw_by_one_factor():
    def weights_after(schedule):
        net = Net()
        optimizer = ASGO(list(net.named_parameters()), lr=0.02, weight_decay=0.0, adamw={"lr": 0.01})
        if schedule:
            LambdaLR(optimizer, lambda step: 0.5)
        before = values(net.parameters())
        run(optimizer, list(net.parameters()), 1)
        return [after - start for after, start in zip(net.parameters(), before, strict=True)]

    for full, half in zip(weights_after(False), weights_after(True), strict=True):
        torch.testing.assert_close(half, full / 2, rtol=1e-3, atol=1e-8)


def test_route_gives_few_groups_with_names_and_the_optimizer_keeps_them():
    optimizer = ASGO(route(Net()))
    assert sorted(group["name"] for group in optimizer.param_groups) == ["adamw", "matrices"]
    assert all(len(group["views"]) == len(group["params"]) for group in optimizer.param_groups)


def test_members_of_a_group_may_have_views_of_their_own():
    net = Net()
    params = [("a", net.a.weight), ("b", net.b.weight), ("bias", net.b.bias)]
    optimizer = ASGO([{"params": params, "views": [MATRIX, View("(h d) n -> h d n", {"h": 2}), None]}])
    assert [optimizer.state[p]["exp_avg"].shape for _, p in params] == [(1, 8, 6), (2, 2, 8), (4,)]
    with pytest.raises(ValueError, match="ASGO: a group has 3 parameters and 1 views; pass one for each"):
        ASGO([{"params": params, "views": [MATRIX]}])


def test_groups_without_names_join_an_optimizer_with_names():
    net = Net()
    optimizer = ASGO(list(net.a.named_parameters()))
    optimizer.add_param_group({"params": list(net.b.parameters())})
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["weight", "bias"],
        ["parameter 2", "parameter 3"],
    ]
    run(optimizer, [*net.a.parameters(), *net.b.parameters()])


def test_an_optimizer_takes_the_groups_of_another():
    net = Net()
    first = ASGO(route(net), lr=1e-2)
    OneCycleLR(first, 1e-2, total_steps=9)
    again = ASGO(first.param_groups, lr=1e-2)
    assert [g["views"] for g in again.param_groups] == [g["views"] for g in first.param_groups]
    run(again, list(net.parameters()))


# ---- keys ------------------------------------------------------------------------------------------------------


@every_preset
@pytest.mark.parametrize(
    "key", ["lr_scale", "rho", "fused", "foreach", "use_muon", "min_lr", "layer_name", "swa_lr", "use_fallback"]
)
def test_keys_of_frameworks_are_kept(make, key):
    net = Net()
    optimizer = make([{"params": list(net.a.parameters()), key: True}])
    run(optimizer, list(net.a.parameters()))
    assert optimizer.param_groups[0][key] is True
    assert optimizer.state_dict()["param_groups"][0][key] is True


@pytest.mark.parametrize(
    ("key", "meant"),
    [("beta", "betas"), ("weight_decy", "weight_decay"), ("precondition_freq", "precondition_frequency")],
)
def test_misspelt_keys_are_refused_with_the_right_one(key, meant):
    with pytest.raises(ValueError, match=f"^ASGO: the key '{key}' is not known; did you mean '{meant}'"):
        ASGO([{"params": [nn.Parameter(torch.ones(2, 2))], key: 1}])


# ---- parameters that come, go and change -----------------------------------------------------------------------


@every_preset
def test_state_is_made_for_parameters_met_later(make):
    def swap(net, optimizer):
        group = optimizer.param_groups[0]
        place = next(i for i, p in enumerate(group["params"]) if p is net.a.weight)
        group["params"][place] = net.a.weight = nn.Parameter(torch.randn(8, 6))

    def clear(net, optimizer):
        optimizer.state.clear()

    def forget_one(net, optimizer):
        del optimizer.state[net.a.weight]

    def append(net, optimizer):
        optimizer.param_groups[0]["params"].append(net.conv.weight)

    def wrapped(net, optimizer):
        optimizer.state[net.a.weight].clear()
        optimizer.state[net.a.weight]["z"] = torch.ones(3)  # as wrappers do that keep state beside ours

    for change in (swap, clear, forget_one, append, wrapped):
        net = Net()
        optimizer = make([*net.a.parameters(), *net.b.parameters()])
        run(optimizer, [*net.a.parameters(), *net.b.parameters()])
        change(net, optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = values(params)
        run(optimizer, params)
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True)), change.__name__
        assert set(optimizer.state) == set(params), change.__name__
        assert copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict()) is None


FORMS = [
    ({}, {"root": "square_root"}),
    ({"root": "square_root"}, {"root": "minimax"}),
    ({}, {"packed_state": True}),
    ({}, {"side": "left"}),
    ({"cross_normalize": False}, {"cross_normalize": True}),
]


@pytest.mark.parametrize(("built", "change"), FORMS, ids=str)
def test_an_option_that_decides_the_form_of_the_state_may_change_before_the_first_step_only(built, change):
    net, twin = Net(), Net()
    optimizer, other = (ASGO([{"params": list(each.a.named_parameters()), **built}]) for each in (net, twin))
    optimizer.param_groups[0].update(change)
    fresh = ASGO([{"params": list(twin.a.named_parameters()), **built, **change}])
    run(optimizer, list(net.a.parameters()))
    run(fresh, list(twin.a.parameters()))
    assert same(net.a.parameters(), twin.a.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(other, list(twin.a.parameters()))
    other.param_groups[0].update(change)
    before, state = values(twin.a.parameters()), copy.deepcopy(other.state_dict()["state"])
    with pytest.raises(ValueError, match="ASGO: the state of 'weight' does not fit its group: an option"):
        run(other, list(twin.a.parameters()))
    assert same(before, twin.a.parameters())
    for i, own in other.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[i][key]) for key, tensor in own.items())


def test_the_interval_of_another_form_is_not_taken_from_a_saved_state():
    net = Net()
    saved = ASGO(list(net.a.named_parameters()), precondition_frequency=10)
    run(saved, list(net.a.parameters()))
    optimizer = ASGO(list(net.a.named_parameters()), root="square_root")
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert optimizer.param_groups[0]["precondition_frequency"] == 1
    ASGO(optimizer.param_groups, root="square_root")


def test_what_a_wrapper_keeps_in_the_state_stays_and_is_saved():
    net = Net()
    optimizer, twin = (ASGO(list(net.a.named_parameters())) for _ in range(2))
    optimizer.state[net.a.weight]["z"] = torch.full((3,), 5.0)
    run(optimizer, list(net.a.parameters()))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(twin.state[net.a.weight]["z"], torch.full((3,), 5.0))
    assert torch.equal(twin.state[net.a.weight]["gram"], optimizer.state[net.a.weight]["gram"])


def test_a_wrapper_may_keep_anything_in_the_state():
    net, twin = Net(), Net()
    optimizer, other = (ASGO(list(each.a.named_parameters())) for each in (net, twin))
    run(optimizer, list(net.a.parameters()))
    kept = {"old": None, "k": 3, "name": "x", "several": [1, torch.ones(2)]}
    for param in net.a.parameters():
        optimizer.state[param].update(kept)
    assert report(optimizer).state_bytes == report(other).state_bytes
    again = copy.deepcopy(optimizer)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    checkpoint.load_named_state_dict(other, checkpoint.named_state_dict(optimizer))
    for found in (*again.state.values(), *other.state.values()):
        assert (found["old"], found["k"], found["name"]) == (None, 3, "x")
        assert torch.equal(found["several"][1], torch.ones(2))
    optimizer.reset()
    run(optimizer, list(net.a.parameters()))


@pytest.mark.parametrize("options", [{}, {"root": "square_root"}, {"packed_state": True}], ids=str)
def test_reset_fits_a_model_that_was_cast_and_an_option_that_was_set_since(options):
    def after(change):
        net = Net()
        optimizer = ASGO(route(net), rounding="compensated", **options)
        run(optimizer, list(net.parameters()))
        change(net, optimizer)
        optimizer.reset()
        fresh = copy.deepcopy(net)
        twin = ASGO(route(fresh), rounding=optimizer.param_groups[0]["rounding"], **options)
        for each, o in ((net, optimizer), (fresh, twin)):
            run(o, list(each.parameters()), 2)
        return same(net.parameters(), fresh.parameters())

    def cast(net, optimizer):
        net.bfloat16()

    def grown(net, optimizer):
        net.a.weight.data = torch.randn(8, 10)

    assert after(cast)
    assert after(grown)


def test_a_tensor_that_is_no_leaf_is_refused_before_anything_changes():
    net = Net()
    optimizer = ASGO(list(net.a.parameters()))
    before = dict(optimizer.param_groups[0])
    group = {"params": [("doubled", 2 * net.b.weight)], "view": MATRIX}
    with pytest.raises(ValueError, match=r"ASGO: 'doubled' \(4, 8\) is computed from other tensors"):
        optimizer.add_param_group(group)
    assert optimizer.param_groups[0].keys() == before.keys()
    assert group.keys() == {"params", "view"}


def test_a_parameter_in_the_place_of_another_has_its_view():
    queries, keys = (nn.Parameter(torch.randn(8, 6)) for _ in range(2))
    optimizer = ASGO([{"params": [("q", queries), ("k", keys)], "view": View("(h d) n -> h d n", {"h": 4})}])
    new = nn.Parameter(torch.randn(8, 6))
    optimizer.param_groups[0]["params"][0] = new
    run(optimizer, [new, keys])
    assert optimizer.state[new]["exp_avg"].shape == (4, 2, 6)
    assert queries not in optimizer.state
    unfit = nn.Parameter(torch.randn(9, 6))
    optimizer.param_groups[0]["params"][0] = unfit
    before = values([unfit, keys])
    with pytest.raises(ValueError, match=r"q in place of one \(8, 6\).* \(9, 6\): 9 is not a multiple of 4"):
        run(optimizer, [unfit, keys])
    assert same(before, [unfit, keys])


def test_removing_a_parameter_leaves_the_others_their_views():
    net = Net()
    params = [("a", net.a.weight), ("b", net.b.weight), ("c", nn.Parameter(torch.randn(6, 6)))]
    views = [MATRIX, View("n m -> 1 m n"), View("(h d) n -> h d n", {"h": 3})]
    optimizer = ASGO([{"params": params, "views": views}])
    del optimizer.param_groups[0]["params"][0]
    run(optimizer, [param for _, param in params[1:]])
    assert optimizer.state[net.b.weight]["exp_avg"].shape == (1, 8, 4)
    assert optimizer.state[params[2][1]]["exp_avg"].shape == (3, 2, 6)


def test_names_follow_their_parameters_when_a_list_of_parameters_alone_is_changed():
    net = Net()
    optimizer = ASGO([{"params": list(net.a.named_parameters())}, {"params": list(net.norm.named_parameters("norm"))}])
    run(optimizer, [*net.a.parameters(), *net.norm.parameters()])
    first, second = optimizer.param_groups
    del first["params"][0]
    second["params"].append(net.conv.weight)
    assert copy.deepcopy(optimizer).param_groups[0]["param_names"] == ["bias"]
    assert [row.name for row in report(optimizer).rows] == ["bias", "norm.weight", "norm.bias", "parameter 3"]
    saved = checkpoint.named_state_dict(optimizer)
    assert torch.equal(saved["state"]["bias"]["exp_avg"], optimizer.state[net.a.bias]["exp_avg"])
    assert set(saved["state"]) == {"bias", "norm.weight", "norm.bias", "parameter 3"}
    first["params"].clear()
    optimizer.step()
    assert set(checkpoint.named_state_dict(optimizer)["state"]) == {"norm.weight", "norm.bias", "parameter 3"}


def test_groups_that_a_host_restores_keep_their_views():
    """As of Lightning's fine-tuning callback: saved groups come into a new optimizer before their state is loaded."""
    net = Net()
    optimizer = ASGO([{"params": [("a", net.a.weight)]}])
    optimizer.add_param_group({"params": [("b", net.b.weight)], "view": View("(h d) n -> h d n", {"h": 2})})
    run(optimizer, [net.a.weight, net.b.weight])
    kept = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])
    twin = ASGO([{"params": [("a", net.a.weight)]}])
    twin.param_groups = [{**kept[0], "params": [net.a.weight]}, {**kept[1], "params": [net.b.weight]}]
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(twin.state[net.b.weight]["exp_avg"], optimizer.state[net.b.weight]["exp_avg"])
    assert twin.param_groups[1]["views"] == optimizer.param_groups[1]["views"]
    twin.param_groups.append({**kept[1], "param_names": ["odd"], "params": [nn.Parameter(torch.ones(3, 2))]})
    with pytest.raises(ValueError, match="ASGO: odd.*3 is not a multiple of 2"):
        twin.step()


def test_flat_memory_in_place_of_matrices_is_refused_by_name():
    net = Net()
    optimizer = ASGO(list(net.a.named_parameters()))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in net.a.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    give_gradients([flat])
    before = flat.detach().clone()
    with pytest.raises(ValueError, match=r"a vector \(56,\) where it had matrices.*fully_shard.*shard_state"):
        optimizer.step()
    assert torch.equal(before, flat)
    flattened = nn.Parameter(torch.ones(4))
    flattened._fsdp_flattened = True
    with pytest.raises(ValueError, match="is flattened by FullyShardedDataParallel.*fully_shard"):
        ASGO([flattened])
    partitioned = nn.Parameter(torch.ones(0))
    partitioned.ds_id = 0
    with pytest.raises(ValueError, match="is partitioned by DeepSpeed's ZeRO-3.*fully_shard"):
        ASGO([partitioned])


def test_flat_memory_is_refused_where_the_parameters_have_lost_their_shapes_first():
    """As ZeRO-3 does."""
    net = Net()
    optimizer = ASGO(list(net.a.named_parameters()))
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in net.a.parameters()]))
    for param in net.a.parameters():
        param.data = torch.empty(0)
    optimizer.param_groups[0]["params"] = [flat]
    give_gradients([flat])
    with pytest.raises(ValueError, match=r"a vector \(56,\) where it had matrices"):
        optimizer.step()


@pytest.mark.parametrize("view", [MATRIX, None], ids=str)
def test_another_shape_is_an_error_once_the_state_was_used(view):
    param, other = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 3))
    optimizer = ASGO([{"params": [("w", param), ("o", other)], "view": view}])
    param.data = torch.randn(8, 4)
    run(optimizer, [param, other])
    assert param.shape == (8, 4)
    param.data = torch.randn(9, 4)
    before = values([param, other])
    with pytest.raises(ValueError, match=r"ASGO: 'w' has the shape \(9, 4\) now, its momentum .*8, 4\)"):
        run(optimizer, [param, other])
    assert same(before, [param, other])


@every_preset
def test_state_does_not_grow_as_gradients_come_and_go(make):
    params = [nn.Parameter(torch.randn(8, 8)) for _ in range(6)]
    optimizer = make([(f"w{i}", p) for i, p in enumerate(params)])
    run(optimizer, params, 1)
    whole = held_bytes(optimizer)
    for kept in (*range(5, 0, -1), 3, 6):
        give_gradients(params)
        for param in params[kept:]:
            param.grad = None
        optimizer.step()
        assert held_bytes(optimizer) == whole
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert file.tell() < 2 * whole + 2**17


def test_state_follows_a_change_of_memory_format():
    def trained(convert):
        torch.manual_seed(0)
        position, conv = nn.Parameter(torch.randn(1, 3, 4, 5)), nn.Conv2d(3, 3, 2)
        optimizer = ASGO([{"params": [("p", position)], "view": None}, {"params": list(conv.named_parameters())}])
        for step in range(4):
            if convert and step == 2:
                position.data = position.data.to(memory_format=torch.channels_last)
                conv.to(memory_format=torch.channels_last)
            run(optimizer, [position, *conv.parameters()], 1, step)
        return [position, *conv.parameters()]

    for plain, converted in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(plain, converted, rtol=0, atol=1e-7)


# ---- precision and bad gradients -------------------------------------------------------------------------------


@every_preset
@pytest.mark.parametrize("ambient", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_nothing_is_made_in_the_ambient_dtype(make, ambient):
    net, twin = Net(), Net()
    torch.set_default_dtype(ambient)
    try:
        optimizer = make(net.named_parameters())
        run(optimizer, list(net.parameters()), 12)
    finally:
        torch.set_default_dtype(torch.float32)
    usual = make(twin.named_parameters())
    run(usual, list(twin.parameters()), 12)
    for mine, other in zip(optimizer.state.values(), usual.state.values(), strict=True):
        assert {key: (t.dtype, t.shape) for key, t in mine.items()} == {k: (t.dtype, t.shape) for k, t in other.items()}
    assert same(net.parameters(), twin.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", [MATRIX, None], ids=str)
def test_decay_and_update_of_half_precision_are_rounded_once(dtype, view):
    torch.manual_seed(0)
    start = torch.randn(16, 24).to(dtype)
    low, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    options = {"lr": 1e-2, "weight_decay": 0.1}
    optimizers = [ASGO([{"params": [p], "view": view, **options}]) for p in (low, full)]
    grad = torch.randn(16, 24)
    low.grad, full.grad = grad.to(dtype), grad.to(dtype).float()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(low, full.to(dtype))
    assert not torch.equal(low, start)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", [MATRIX, None], ids=str)
@pytest.mark.parametrize("rounding", ["compensated", "stochastic"])
def test_what_rounding_loses_can_be_kept(dtype, view, rounding):
    """Steps of a thousandth of the spacing: nearest rounding loses them all, the options keep them."""
    torch.manual_seed(0)
    start, steps = torch.ones(32, 48).to(dtype), 200

    def trained(param, **options):
        optimizer = ASGO([{"params": [("w", param)], "view": view}], lr=5e-6, weight_decay=0.0, **options)
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return optimizer

    low, full, lost = (nn.Parameter(x) for x in (start.clone(), start.float(), start.clone()))
    optimizer = trained(low, rounding=rounding)
    trained(full)
    trained(lost)
    moved, spacing = (full - start.float()).mean(), torch.finfo(dtype).eps
    assert torch.equal(lost, start)
    if rounding == "compensated":
        assert optimizer.state[low]["residual"].dtype == torch.int16
        assert torch.equal(low, full.to(dtype))
    else:  # the mean of 1,536 numbers, each a sum of roundings of at most one spacing: five standard errors
        error = spacing * (steps * abs(float(moved)) / steps / spacing) ** 0.5 / low.numel() ** 0.5
        assert abs(float((low.float() - start.float()).mean() - moved)) <= 5 * error


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "stochastic"])
def test_half_precision_resumes_bit_for_bit(rounding):
    def made(seed):
        net = Net(seed).bfloat16()
        return net, ASGO(route(net), rounding=rounding)

    net, optimizer = made(0)
    run(optimizer, list(net.parameters()))
    twin, other = made(1)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, o in ((net, optimizer), (twin, other)):
        run(o, list(each.parameters()), 3, 3)
    assert same(net.parameters(), twin.parameters())


@every_preset
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_only_the_parameter_with_a_bad_gradient_rests(make, poison):
    clean, hurt = Net(), Net()
    optimizers = [make(net.named_parameters()) for net in (clean, hurt)]
    for step in range(3):
        for net, optimizer in zip((clean, hurt), optimizers, strict=True):
            give_gradients(net.parameters(), step)
            if net is hurt:
                for param in (net.norm.bias, net.a.weight):
                    param.grad.view(-1)[0] = poison
            optimizer.step()
    for name, param in hurt.named_parameters():
        other = dict(clean.named_parameters())[name]
        assert torch.equal(param, other) == (name not in ("norm.bias", "a.weight")), name
    assert optimizers[1].failures() == {"norm.bias": 3, "a.weight": 3}


@every_preset
def test_a_learning_rate_with_an_axis_is_one_without(make):
    nets = Net(), Net()
    for net, lr in zip(nets, (torch.tensor(0.02), torch.tensor([0.02])), strict=True):
        optimizer = make(net.named_parameters(), lr=lr)
        CosineAnnealingLR(optimizer, 10)
        run(optimizer, list(net.parameters()))
    assert same(*(values(net.parameters()) for net in nets))


# ---- names -----------------------------------------------------------------------------------------------------


def test_two_models_share_an_optimizer_by_prefix():
    a, b = Net(), Net(1)
    with pytest.raises(ValueError, match=r"has the name of another parameter.*prefix="):
        ASGO([*route(a), *route(b)])
    optimizer = ASGO([*route(a, prefix="a"), *route(b, prefix="b")])
    give_gradients([*a.parameters(), *b.parameters()])
    a.a.weight.grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.failures() == {"a.a.weight": 1}
    checkpoint.load_named_state_dict(optimizer, checkpoint.named_state_dict(optimizer))


def test_names_are_those_without_wrappers_and_stay_after_loading():
    class Holder(nn.Module):
        def __init__(self, compiled):
            super().__init__()
            self.inner = torch.compile(nn.Linear(4, 4), backend="eager") if compiled else nn.Linear(4, 4)

    a, b = ASGO(route(Holder(True))), ASGO(route(Holder(False)))
    assert [g["param_names"] for g in a.param_groups] == [g["param_names"] for g in b.param_groups]
    saved = copy.deepcopy(a.state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [f"another.{name}" for name in group["param_names"]]
    names = [list(group["param_names"]) for group in b.param_groups]
    b.load_state_dict(saved)
    assert [group["param_names"] for group in b.param_groups] == names


def test_state_is_found_by_name_in_a_group_of_another_order():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    one = ASGO(list(model.named_parameters()))
    run(one, list(model.parameters()))
    other = ASGO(list(model.named_parameters())[::-1])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for param in model.parameters():
        assert torch.equal(other.state[param]["exp_avg"], one.state[param]["exp_avg"])


# ---- state dicts -----------------------------------------------------------------------------------------------


@every_preset
def test_hooks_of_state_dicts_run_in_torchs_order(make):
    net, seen = Net(), []
    optimizer = make(net.named_parameters())
    run(optimizer, list(net.parameters()))
    saved = copy.deepcopy(optimizer.state_dict())
    core = getattr(optimizer, "optimizer", optimizer)
    core.register_state_dict_pre_hook(lambda o: seen.append("before"))
    core.register_state_dict_post_hook(lambda o, found: {**found, "note": seen.append("after")})
    assert "note" in optimizer.state_dict()
    assert seen == ["before", "after"]

    def zeroed(o, found):
        state = {i: {k: torch.zeros_like(t) for k, t in s.items()} for i, s in found["state"].items()}
        return {**found, "state": state}

    core.register_load_state_dict_pre_hook(zeroed)
    core.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[net.a.weight]["step"])))
    optimizer.load_state_dict(saved)
    assert seen[2:] == [0.0]


@pytest.mark.parametrize(
    "options",
    [
        StateDictOptions(),
        StateDictOptions(flatten_optimizer_state_dict=True),
        StateDictOptions(full_state_dict=True),
        StateDictOptions(cpu_offload=True),
        StateDictOptions(full_state_dict=True, cpu_offload=True),
    ],
    ids=["usual", "flat", "full", "offloaded", "full and offloaded"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_torchs_distributed_helpers_bring_the_state_back(options, frozen):
    net, twin = Net(), Net()
    optimizer, other = (ASGO(route(each)) for each in (net, twin))
    run(optimizer, list(net.parameters()))
    twin.load_state_dict(net.state_dict())
    if frozen:
        net.a.requires_grad_(False)
        twin.a.requires_grad_(False)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=options))
    set_optimizer_state_dict(twin, other, saved, options=options)
    rest = [name for name, _ in net.named_parameters() if not (frozen and name.startswith("a."))]
    for each, o in ((net, optimizer), (twin, other)):
        o.zero_grad()
        run(o, [p for name, p in each.named_parameters() if name in rest], 2, 3)
    pairs = zip(net.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_views_are_compared_by_what_they_read():
    param = nn.Parameter(torch.randn(6, 6))

    def made(view):
        return ASGO([{"params": [("w", param)], "view": view}])

    saved = made(View("m n -> 1 m n")).state_dict()
    for alike in ("rows columns -> 1 rows columns", View("(g o) i -> g o i", {"g": 1}), View("m n -> 1 m n")):
        made(alike).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"'w' \(6, 6\) is of the view 'm n -> 1 m n', this optimizer reads it as"):
        made("n m -> 1 m n").load_state_dict(saved)
    named = checkpoint.named_state_dict(made("m n -> 1 m n"))
    with pytest.raises(ValueError, match="this optimizer reads it as"):
        checkpoint.load_named_state_dict(made("n m -> 1 m n"), named)


def test_keys_of_parts():
    for name, part, key in [("gram", 0, "gram"), ("gram", 1, "gram.1"), ("exp_avg", 12, "exp_avg.12")]:
        assert part_key(name, part) == key
        assert split_key(key) == (name, part)
        assert is_own(key)
    assert split_key("gram.of a wrapper") == ("gram.of a wrapper", 0)
    assert not any(map(is_own, ["gram.of a wrapper", "master_param", "gram.", ".1"]))


def test_states_of_earlier_versions_load():
    """One view for a group, and no settings of AdamW beside those of matrices."""
    net = Net()
    optimizer, twin = (ASGO([{"params": [("a", net.a.weight), ("b", net.b.weight)], "view": MATRIX}]) for _ in range(2))
    run(optimizer, [net.a.weight, net.b.weight])
    saved = copy.deepcopy(optimizer.state_dict())
    (group,) = saved["param_groups"]
    for key in ("views", "adamw", "max_size", "packed_state"):
        del group[key]
    twin.load_state_dict({**saved, "param_groups": [{**group, "view": MATRIX.to_dict(), "lr": 0.125}]})
    assert twin.param_groups[0]["lr"] == 0.125
    assert torch.equal(twin.state[net.a.weight]["gram"], optimizer.state[net.a.weight]["gram"])
    run(twin, [net.a.weight, net.b.weight])


@pytest.mark.parametrize("view", [MATRIX, View("m n -> 1 m n", split=(4, 4))], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_states_with_a_gram_and_with_its_square_root_load_into_each_other(view, packed):
    def made(**options):
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(8, 12, dtype=torch.float64))
        return param, ASGO([{"params": [("w", param)], "view": view}], eps=1e-12, betas=(0.9, 0.8), **options)

    forms = {"exact": {"root": "eigh", "packed_state": packed}, "square root": {"root": "square_root"}}
    for first, second in (("exact", "square root"), ("square root", "exact")):
        param, optimizer = made(**forms[first])
        run(optimizer, [param], 14)
        for load in (
            lambda o, old: o.load_state_dict(copy.deepcopy(old.state_dict())),
            lambda o, old: checkpoint.load_named_state_dict(o, checkpoint.named_state_dict(old)),
        ):
            twin, other = made(**forms[second])
            load(other, optimizer)
            assert all(other.param_groups[0][key] == value for key, value in forms[second].items())
            with torch.no_grad():
                twin.copy_(param)
            run(other, [twin], 3, 14)
            going_on = copy.deepcopy(optimizer)
            (same_param,) = going_on.param_groups[0]["params"]
            run(going_on, [same_param], 3, 14)
            torch.testing.assert_close(twin, same_param, rtol=1e-5, atol=1e-6)


# ---- which parameters are matrices -----------------------------------------------------------------------------


def test_bare_parameters_get_a_warning_once():
    net = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = ASGO(net.a.parameters())
        optimizer.add_param_group({"params": list(net.b.parameters())})
    assert [str(warning.message).split(",")[0] for warning in caught] == [
        "ASGO: parameters without names are read by their number of axes"
    ]
    assert "asgo.route(model)" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_names_tell_tables_and_heads_of_bare_parameters():
    model = nn.ModuleDict({"wte": nn.Embedding(7, 6), "h": nn.Linear(6, 6), "lm_head": nn.Linear(6, 7)})
    optimizer = ASGO(list(model.named_parameters()))
    (group,) = optimizer.param_groups
    read = dict(zip(group["param_names"], group["views"], strict=True))
    assert [name for name, view in read.items() if view is not None] == ["h.weight"]


def test_a_matrix_above_max_size_is_adamws_with_a_warning_and_a_line_of_the_report():
    params = [("large", nn.Parameter(torch.randn(12, 20))), ("small", nn.Parameter(torch.randn(4, 20)))]
    with pytest.warns(UserWarning, match=r"ASGO: AdamW takes large \(12, 20\): the shorter side is above max_size=8"):
        optimizer = ASGO(params, max_size=8)
    assert [row.structure for row in report(optimizer).rows] == ["AdamW, above max_size", "OneSided 1x4x4"]
    assert report(ASGO(params, max_size=None)).rows[0].structure == "OneSided 1x12x12"


def test_blocks_and_rows_keep_their_own_views():
    net = Net()
    assert all(view is not None for group in BAG(net.parameters(), 0.1).param_groups for view in group["views"])
    optimizer = SPAM(AdamMini(AdamMini.groups(net), lr=1e-3), interval=2, warmup=1)
    new = nn.Parameter(torch.randn(3, 6))
    optimizer.param_groups[0]["params"].append(new)
    run(optimizer, [*net.parameters(), new], 5)
    assert optimizer.state[new]["spike_sq"].shape == (3, 6)
