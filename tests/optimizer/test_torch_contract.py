"""What torch asks of every optimizer of its own, asked of all of these: hooks, copies, saved states, odd gradients."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from asgo import ASGO, SPAM
from family import PRESETS, every_preset, without_decay

pytestmark = [
    pytest.mark.usefixtures("repeatable_lapack"),
    pytest.mark.filterwarnings("ignore:.*parameters without names:UserWarning"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def parameters(dtype=torch.float32, seed=0):
    """A matrix, its like, one of another shape, a kernel, a vector and a number."""
    dice = torch.Generator().manual_seed(seed)
    shapes = [(6, 4), (6, 4), (3, 5), (4, 2, 3, 3), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=dice).to(dtype)) for shape in shapes]


def set_gradients(params, seed):
    dice = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=dice).to(param.dtype)


def steps(optimizer, params, count, seed=1):
    for i in range(count):
        set_gradients(params, seed + i)
        optimizer.step()


def values(params):
    return [param.detach().clone() for param in params]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


# ---- hooks ---------------------------------------------------------------------------------------------------------


@every_preset
def test_hooks_of_steps_run_in_torchs_order(make):
    def order(optimizer):
        """In which hooks and closure of a step run, and that none does once it was removed."""
        seen = []

        def note(name):
            return lambda which, args, kwargs: seen.append(name) if which is optimizer else None

        handles = [
            register_optimizer_step_post_hook(note("after all")),
            register_optimizer_step_pre_hook(note("before all")),
            optimizer.register_step_post_hook(note("after")),
            optimizer.register_step_pre_hook(note("before")),
        ]
        try:
            optimizer.step(lambda: seen.append("closure"))
        finally:
            for handle in handles:
                handle.remove()
        ran = list(seen)
        optimizer.step()
        assert seen == ran
        return ran

    torchs = order(torch.optim.SGD(parameters(), lr=0.1))
    assert len(torchs) == 5
    assert order(make(parameters())) == torchs


@every_preset
def test_a_hook_before_a_step_may_change_its_closure_but_nothing_else(make):
    optimizer = make(parameters())
    handle = optimizer.register_step_pre_hook(lambda which, args, kwargs: ((which, lambda: 2.0), {}))
    assert optimizer.step(lambda: 1.0) == 2.0
    handle.remove()
    assert optimizer.step(closure=lambda: 1.0) == 1.0
    assert optimizer.step() is None
    optimizer.register_step_pre_hook(lambda which, args, kwargs: "no pair")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


# ---- copies --------------------------------------------------------------------------------------------------------


@every_preset
def test_copies_have_what_was_put_on_the_optimizer_and_go_their_own_way(make):
    params = parameters()
    optimizer = make(params)
    steps(optimizer, params, 2)
    set_gradients(params, 5)
    for clone in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        others, twin = clone((params, optimizer))
        assert type(twin) is type(optimizer)
        assert {**optimizer.defaults, "differentiable": False} == twin.defaults  # torch adds that
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        assert repr(twin) == repr(optimizer)
        assert public(twin) >= public(optimizer)
        before = values(params)
        for other in others:
            other.grad = torch.ones_like(other)
        twin.step()
        assert same(values(params), before)


def public(optimizer):
    return {key for key in vars(optimizer) if not key.startswith("_")}


# ---- saved states --------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_alike(some, others, where=""):
    """Two state dicts, key by key."""
    assert type(some) is type(others), where
    if isinstance(some, dict):
        assert some.keys() == others.keys(), where
        for key in some:
            assert_alike(some[key], others[key], f"{where}.{key}")
    elif isinstance(some, (list, tuple)):
        assert len(some) == len(others), where
        for i, (a, b) in enumerate(zip(some, others, strict=True)):
            assert_alike(a, b, f"{where}.{i}")
    elif isinstance(some, torch.Tensor):
        assert some.dtype == others.dtype, where
        assert torch.equal(some, others), where
    else:
        assert some == others, where


@every_preset
def test_a_saved_state_is_plain_deterministic_and_survives_file_and_loading(make):
    for dtype in DTYPES:
        params, twins = parameters(dtype), parameters(dtype)
        one, other = make(params), make(twins)
        for optimizer, of in ((one, params), (other, twins)):
            steps(optimizer, of, 3)
        saved = one.state_dict()
        assert_alike(saved, other.state_dict())
        assert list(saved["state"]) == list(range(len(params)))
        assert_alike(saved, through_a_file(saved))
        fresh = make(parameters(dtype))
        fresh.load_state_dict(through_a_file(saved))
        assert_alike(fresh.state_dict(), saved)
        fresh.load_state_dict(fresh.state_dict())
        assert_alike(fresh.state_dict(), saved)


@every_preset
def test_a_state_that_was_loaded_shares_no_memory_with_the_one_it_is_from(make):
    params, twins = parameters(), parameters()
    one, other = make(params), make(twins)
    steps(one, params, 2)
    saved = one.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    steps(other, twins, 2, seed=7)
    assert_alike(one.state_dict(), kept)


@every_preset
def test_a_step_that_was_saved_as_a_number_loads(make):
    params, twins = parameters(), parameters()
    one, other = make(params), make(twins)
    steps(one, params, 3)
    saved = copy.deepcopy(one.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    other.load_state_dict(saved)
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(one.state[param]["step"], other.state[twin]["step"])
        assert isinstance(other.state[twin]["step"], torch.Tensor)
        twin.data.copy_(param.data)
    steps(one, params, 2, seed=9)
    steps(other, twins, 2, seed=9)
    assert same(values(params), values(twins))


@every_preset
def test_names_are_saved_and_change_no_number(make):
    params, twins = parameters(), parameters()
    bare, named = make(params), make([(f"p{i}", twin) for i, twin in enumerate(twins)])
    assert "param_names" not in bare.state_dict()["param_groups"][0]
    assert named.state_dict()["param_groups"][0]["param_names"] == [f"p{i}" for i in range(len(twins))]
    steps(bare, params, 2)
    named.load_state_dict(bare.state_dict())
    assert named.param_groups[0]["param_names"] == [f"p{i}" for i in range(len(twins))]
    bare.load_state_dict(named.state_dict())
    assert_alike(bare.state_dict()["state"], named.state_dict()["state"])


# ---- gradients -----------------------------------------------------------------------------------------------------


@every_preset
def test_without_gradients_or_with_zeros_nothing_moves(make):
    for zeros in (False, True):
        params = parameters()
        optimizer = without_decay(make(params))
        before = values(params)
        for _ in range(3):
            for param in params:
                param.grad = torch.zeros_like(param) if zeros else None
            optimizer.step()
        assert same(values(params), before)
        optimizer.zero_grad()
        assert all(param.grad is None for param in params)
        set_gradients(params, 0)
        optimizer.zero_grad(set_to_none=False)
        assert all((param.grad == 0).all() for param in params)


@every_preset
def test_parameters_without_entries_stand_beside_others(make):
    for shape in [(0,), (0, 4), (4, 0), (2, 0, 3), (0, 3, 2, 2)]:
        params = [nn.Parameter(torch.empty(shape)), *parameters()]
        others = parameters()
        optimizer, alone = make(params), make(others)
        steps(optimizer, params, 2)  # gradients of nothing take no random numbers
        steps(alone, others, 2)
        assert same(values(params[1:]), values(others)), shape
        assert optimizer.failures() == {}
        empty = make([nn.Parameter(torch.empty(shape))])
        steps(empty, empty.param_groups[0]["params"], 1)
        empty.load_state_dict(through_a_file(empty.state_dict()))


@every_preset
def test_precisions_stand_side_by_side_in_a_group(make):
    mixed = [parameters(dtype) for dtype in DTYPES]
    alone = [parameters(dtype) for dtype in DTYPES]
    together = [param for params in zip(*mixed, strict=True) for param in params]
    one, others = make(together), [make(params) for params in alone]
    for i in range(3):
        for params, apart in zip(mixed, alone, strict=True):
            set_gradients(params, i)
            set_gradients(apart, i)
        one.step()
        for other in others:
            other.step()
    for params, apart, dtype in zip(mixed, alone, DTYPES, strict=True):
        assert same(values(params), values(apart)), dtype
        assert all(param.dtype == dtype for param in params)


@every_preset
def test_strides_of_gradients_and_parameters_change_no_more_than_rounding(make):
    for strided in ("gradients", "parameters", "both"):
        params, others = parameters(torch.float64), parameters(torch.float64)
        if strided != "gradients":
            others = [nn.Parameter(scattered(param.detach())) for param in others]
        one, other = make(params), make(others)
        for i in range(3):
            set_gradients(params, i)
            for param, twin in zip(params, others, strict=True):
                twin.grad = scattered(param.grad) if strided != "parameters" else param.grad.clone()
            one.step()
            other.step()
        for param, twin in zip(params, others, strict=True):
            torch.testing.assert_close(twin.detach(), param.detach(), rtol=1e-9, atol=1e-9)


def scattered(tensor):
    """The same numbers with axes in another order of memory, and gaps between them."""
    wide = torch.zeros(*tensor.shape[::-1], 2, dtype=tensor.dtype)
    view = wide[..., 0].permute(tuple(range(tensor.ndim))[::-1])
    return view.copy_(tensor)


@every_preset
def test_a_gradient_is_only_read(make):
    if make in (PRESETS["spam, asgo"], PRESETS["spam, adam-mini"]):
        return  # SPAM clips in place, as it says
    params = parameters()
    optimizer = make(params)
    for i in range(2):
        set_gradients(params, i)
        grads = [(param.grad, param.grad.clone()) for param in params]
        optimizer.step()
        assert all(param.grad is grad for param, (grad, _) in zip(params, grads, strict=True))
        assert same(*zip(*grads, strict=True))


# ---- groups --------------------------------------------------------------------------------------------------------


@every_preset
def test_groups_have_rates_and_decay_of_their_own(make):
    params, others = parameters(), parameters()
    has_decay = "weight_decay" in make(parameters()).defaults
    half, none = ({"weight_decay": decay} if has_decay else {} for decay in (0.5, 0.0))
    optimizer = make([{"params": params[:3], "lr": 0.0, **half}, {"params": params[3:], **none}])
    whole = make([{"params": others, **none}])
    before = values(params)
    steps(optimizer, params, 1)
    steps(whole, others, 1)
    assert same(values(params[:3]), before[:3])
    assert same(values(params[3:]), values(others[3:]))
    decayed = parameters()
    optimizer = make([{"params": decayed, "lr": 0.25, **half}])
    before = values(decayed)
    for param in decayed:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(decayed, before, strict=True):
        torch.testing.assert_close(param.detach(), old * (1 - 0.25 * 0.5 if has_decay else 1))


@every_preset
def test_a_parameter_is_in_one_group(make):
    param, other = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = make([param])
    with pytest.raises(ValueError, match="more than one parameter group|already|twice"):
        optimizer.add_param_group({"params": [other, param]})
    assert len(optimizer.param_groups) == 1
    assert other not in optimizer.state
    with pytest.raises((ValueError, TypeError)):
        optimizer.add_param_group([other])
    with pytest.raises(ValueError, match="empty|no parameters"):
        make([])
    with pytest.raises(ValueError, match="names|unique"):
        make([("a", param), ("a", other)])


@every_preset
def test_the_closure_may_compute_gradients_inside_no_grad(make):
    weight = nn.Parameter(torch.eye(3))
    optimizer = make([weight])

    def closure():
        optimizer.zero_grad()
        loss = (weight - 2).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert weight.requires_grad


def test_subclasses_and_the_wrapper_are_torchs_optimizers():
    for make in PRESETS.values():
        assert isinstance(make(parameters()), Optimizer)
    assert isinstance(SPAM(ASGO(parameters())), Optimizer)
