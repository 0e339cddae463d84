"""The optimizer contract: everything a `torch.optim.Optimizer` promises, and the traps of its host."""

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from asgo import ASGO
from asgo.linalg.inverse_root import ROOTS
from asgo.optimizer.hyperparameters import adamw_of
from asgo.optimizer.refresh_schedule import WARMUP_STEPS
from asgo.views import MATRIX, heads
from family import BAD, LARGEST, PRESETS, every_preset, without_decay

pytestmark = pytest.mark.usefixtures("repeatable_lapack")


class Net(nn.Module):
    """Linear layers of equal and unequal shape, a convolution, a norm, an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(1, 4, 3)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        pixels = self.conv(self.embed(x)[:, None]).mean((1, 2, 3))[:, None, None]
        h = torch.tanh(self.a(self.embed(x))) + pixels
        return self.out(self.norm(h + torch.tanh(self.c(torch.tanh(self.b(h))))).mean(1))


def problem(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype), torch.randint(0, 7, (16, 5)), torch.randint(0, 3, (16,))


def backward(net, x, y):
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(x).float(), y)
    loss.backward()
    return loss.item()


def train(net, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        losses.append(backward(net, x, y))
        optimizer.step()
    return losses


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every_preset
def test_trains_bare_parameters_in_every_precision(make):
    for dtype in (torch.bfloat16, torch.float64):
        train_bare_parameters(make, dtype)


def train_bare_parameters(make, dtype):
    net, x, y = problem(dtype)
    optimizer = make(net.parameters())
    losses = train(net, optimizer, x, y, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.failures() == {}
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for own in optimizer.state.values():
        assert {t.dtype for k, t in own.items() if not k.startswith(("failures", "step", "sqrt"))} == {state_dtype}
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_state_of_asgo():
    net, _, _ = problem()
    state = ASGO(net.parameters()).state
    assert set(state[net.a.weight]) == {"step", "exp_avg", "gram", "root", "cross", "cross_weight", "failures"}
    assert set(state[net.norm.bias]) == {"step", "exp_avg", "exp_avg_sq", "failures"}


@every_preset
def test_state_is_tensors_and_exists_before_the_first_step(make):
    net, x, y = problem()
    optimizer = make(net.named_parameters())
    before = {p: {k: t.shape for k, t in s.items()} for p, s in optimizer.state.items()}
    assert set(before) == set(net.parameters())
    train(net, optimizer, x, y, 2)
    assert before == {p: {k: t.shape for k, t in s.items()} for p, s in optimizer.state.items()}
    assert all(isinstance(t, torch.Tensor) for s in optimizer.state.values() for t in s.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_group_without_a_view_is_torch_adamw(weight_decay, maximize, dtype, tensor_lr):
    ours, x, y = problem(dtype)
    theirs, _, _ = problem(dtype)
    lr = torch.tensor(3e-3) if tensor_lr else 3e-3
    options = {"betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": weight_decay, "maximize": maximize}
    mine = ASGO([{"params": list(ours.parameters()), "view": None, "lr": lr, **options}], lr=1.0)
    peer = torch.optim.AdamW(theirs.parameters(), lr=lr, fused=True, **options)
    for _ in range(20):
        backward(ours, x, y)
        backward(theirs, x, y)
        mine.step()
        peer.step()
    assert same(weights(ours), weights(theirs))


def test_adamw_in_low_precision_keeps_float32_state_and_rounds_once():
    low, full = nn.Parameter(torch.randn(9).bfloat16()), None
    full = nn.Parameter(low.detach().float())
    mine = ASGO([{"params": [low], "view": None}], lr=1e-2)
    peer = torch.optim.AdamW([full], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        grad = torch.randn(9).bfloat16()
        low.grad, full.grad = grad, grad.float()
        mine.step()
        peer.step()
        full.data.copy_(full.bfloat16())
    assert torch.equal(low, full.bfloat16())
    assert mine.state[low]["exp_avg"].dtype == torch.float32


def test_groups_have_their_own_lr_and_defaults():
    net, _, _ = problem()
    groups = [
        {"params": [net.a.weight], "lr": 0.5, "view": MATRIX, "side": "left"},
        {"params": [net.embed.weight], "view": None, "lr": 0.25},
    ]
    first, second = ASGO(groups, lr=0.1).param_groups
    assert (first["lr"], first["side"], first["betas"]) == (0.5, "left", (0.95, 0.2))
    assert (second["lr"], second["betas"], second["eps"], second["weight_decay"]) == (
        0.25,
        (0.9, 0.95),
        1e-8,
        0.0,
    )
    assert second["adamw"] == {}


def test_settings_of_a_group_hold_for_all_its_members_and_those_of_adamw_are_one_argument():
    def made(group=None, **options):
        w, b = nn.Parameter(torch.ones(5, 5)), nn.Parameter(torch.ones(5))
        return ASGO([{"params": [("w", w), ("b", b)], **(group or {})}], **options).param_groups[0]

    def of_vectors(group):
        return {key: adamw_of(group)[key] for key in ("lr", "betas", "eps", "weight_decay")}

    assert of_vectors(made(lr=0.5)) == {"lr": 0.5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    own = {"weight_decay": 0.5, "betas": (0.8, 0.9), "eps": 1e-3, "lr": 0.25}
    assert of_vectors(made(own)) == own
    assert of_vectors(made(own, adamw={"lr": 1.0, "eps": 1.0})) == own
    asked = {"lr": 0.125, "betas": (0.5, 0.6), "eps": 1e-5, "weight_decay": 0.75}
    group = made(lr=0.5, adamw=asked)
    assert of_vectors(group) == asked
    assert group["weight_decay"] == 0.1
    group["lr"] = 0.25  # as a schedule does: both move by the same factor
    assert of_vectors(group)["lr"] == 0.0625
    assert of_vectors(made({"adamw": asked}, lr=0.5)) == asked
    alone = ASGO([{"params": [nn.Parameter(torch.ones(5))]}], lr=0.5, adamw=asked).param_groups[0]
    assert {key: alone[key] for key in asked} == asked
    for wrong, message in (
        ({"beta": 1}, "adamw has no 'beta'; choose from lr, betas, eps, weight_decay"),
        ({"lr": -1.0}, "adamw: lr must be a finite number"),
        ({"betas": (0.9, 1.0)}, "must both be below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            made(adamw=wrong)


@every_preset
def test_closure_is_run_once_with_gradients_and_returned(make):
    net, x, y = problem()
    optimizer, calls = make(net.parameters()), []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(backward(net, x, y))
        return calls[-1]

    before = weights(net)
    assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    assert not same(before, weights(net))


@every_preset
def test_maximize_is_minimize_on_the_negative(make):
    one, x, y = problem(torch.float64)
    other, _, _ = problem(torch.float64)
    optimizers = make(one.parameters()), make(other.parameters())
    for group in optimizers[1].param_groups:
        group["maximize"] = True
    for _ in range(5):
        backward(one, x, y)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            q.grad = -p.grad
        for optimizer in optimizers:
            optimizer.step()
    assert same(weights(one), weights(other))


@every_preset
def test_tensor_lr_is_a_number_lr(make):
    nets = [problem(torch.float64)[0] for _ in range(2)]
    _, x, y = problem()
    lr = torch.tensor(0.02, dtype=torch.float64)
    for net, value in zip(nets, [0.02, lr], strict=True):
        train(net, make(net.parameters(), lr=value), x, y, 5)
    for a, b in zip(*(weights(net) for net in nets), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    assert lr.item() == pytest.approx(0.02)


SCHEDULERS = {
    "cosine": lambda o: CosineAnnealingLR(o, 10),
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=12),
    "plateau": lambda o: ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_schedulers_drive_every_group(scheduler):
    net, x, y = problem()
    optimizer = ASGO(net.parameters())
    schedule = scheduler(optimizer)
    first = [group["lr"] for group in optimizer.param_groups]
    for _ in range(10):
        backward(net, x, y)
        optimizer.step()
        schedule.step(*([1.0] if isinstance(schedule, ReduceLROnPlateau) else []))
    assert all(group["lr"] != lr for group, lr in zip(optimizer.param_groups, first, strict=True))


def test_what_a_scheduler_adds_to_groups_does_not_stop_a_checkpoint():
    net, _, _ = problem()
    saved = ASGO(net.named_parameters()).state_dict()
    optimizer = ASGO(net.named_parameters())
    OneCycleLR(optimizer, max_lr=0.05, total_steps=12)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.01


@every_preset
def test_missing_gradients_leave_a_parameter_and_its_state_alone(make):
    net, x, y = problem()
    optimizer = make(net.parameters())
    train(net, optimizer, x, y, 2)
    backward(net, x, y)
    net.b.weight.grad = None
    before = net.b.weight.detach().clone(), {k: t.clone() for k, t in optimizer.state[net.b.weight].items()}
    optimizer.step()
    assert torch.equal(before[0], net.b.weight)
    assert all(torch.equal(t, optimizer.state[net.b.weight][k]) for k, t in before[1].items())
    net.zero_grad()
    optimizer.step()  # no gradient at all


@every_preset
def test_add_param_group_mid_training(make):
    net, x, y = problem()
    later = [net.b.weight, net.out.bias]
    optimizer = make([p for p in net.parameters() if all(p is not q for q in later)])
    train(net, optimizer, x, y, 2)
    optimizer.add_param_group({"params": later, "lr": 0.5})
    assert [g["lr"] for g in optimizer.param_groups][1:] == [0.5]
    before = weights(net)
    train(net, optimizer, x, y, 2)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


# ---- copies and checkpoints -------------------------------------------------------------------------------------


def copies(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_preset
def test_state_dict_round_trip_continues_bit_for_bit(make):
    for dtype in (torch.float32, torch.float16):
        round_trip(make, dtype)


def round_trip(make, dtype):
    net, x, y = problem(dtype)
    optimizer = make(net.named_parameters())
    train(net, optimizer, x, y, 5)
    twin = copy.deepcopy(net)
    other = make(twin.named_parameters())
    other.load_state_dict(copies(optimizer))
    train(net, optimizer, x, y, 5)
    train(twin, other, x, y, 5)
    assert same(weights(net), weights(twin))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        for key, tensor in optimizer.state[p].items():
            assert tensor.dtype == other.state[q][key].dtype
            assert torch.equal(tensor, other.state[q][key])


@every_preset
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_bit_for_bit(make, clone):
    net, x, y = problem()
    optimizer = make(net.named_parameters())
    train(net, optimizer, x, y, 3)
    twin, other = clone((net, optimizer))
    train(net, optimizer, x, y, 3)
    assert not same(weights(net), weights(twin))
    train(twin, other, x, y, 3)
    assert same(weights(net), weights(twin))


def test_a_pickle_is_no_larger_than_its_tensors():
    params = [nn.Parameter(torch.randn(32, 32)) for _ in range(8)]
    optimizer = ASGO(params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    held = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    held += sum(p.numel() * p.element_size() for p in params)
    assert len(pickle.dumps(optimizer)) < 1.6 * held


@every_preset
def test_distributed_checkpoint_functions_round_trip_and_change_nothing(make):
    net, x, y = problem()
    optimizer = make(net.named_parameters())
    before = weights(net)
    fresh = get_optimizer_state_dict(net, optimizer)
    assert same(before, weights(net))
    assert set(fresh["state"]["a.weight"]) == set(optimizer.state[net.a.weight])
    train(net, optimizer, x, y, 4)
    saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
    twin = copy.deepcopy(net)
    other = make(twin.named_parameters())
    set_optimizer_state_dict(twin, other, saved)
    train(net, optimizer, x, y, 3)
    train(twin, other, x, y, 3)
    assert same(weights(net), weights(twin))


@every_preset
def test_state_follows_a_model_that_changes_precision_after_construction(make):
    net, x, y = problem()
    optimizer = make(net.parameters())
    train(net, optimizer, x, y, 2)
    net.double()
    train(net, optimizer, x, y, 2)
    assert {optimizer.state[p]["exp_avg"].dtype for p in net.parameters()} == {torch.float64}


# ---- what must not break it -------------------------------------------------------------------------------------


@every_preset
def test_an_idle_step_changes_nothing(make):
    """Distributed checkpointing calls step() with zero gradients and lr 0."""
    net, _, _ = problem()
    optimizer = make(net.parameters(), lr=0.0)
    before = weights(net), copy.deepcopy(list(optimizer.state.values()))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(before[0], weights(net))
    for old, new in zip(before[1], optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in new if key != "step" and "root" not in key)


@every_preset
def test_a_zero_gradient_rests_the_matrix_even_with_momentum(make):
    net, x, y = problem()
    optimizer = without_decay(make(net.parameters()))
    train(net, optimizer, x, y, 3)
    backward(net, x, y)
    net.b.weight.grad.zero_()
    before = net.b.weight.detach().clone(), {k: t.clone() for k, t in optimizer.state[net.b.weight].items()}
    optimizer.step()
    assert torch.equal(before[0], net.b.weight)
    for key in set(before[1]) - {"step", "root"}:
        assert torch.equal(before[1][key], optimizer.state[net.b.weight][key]), key
    assert optimizer.failures() == {}


@every_preset
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(make, poison):
    net, x, y = problem()
    optimizer = without_decay(make(net.named_parameters()))
    train(net, optimizer, x, y, 3)
    backward(net, x, y)
    net.b.weight.grad[0, 0] = poison
    before = net.b.weight.detach().clone(), net.c.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before[0], net.b.weight)
    assert not torch.equal(before[1], net.c.weight)  # the same bucket
    assert optimizer.failures() == {"b.weight": 1}
    train(net, optimizer, x, y, 3)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_adamw_rests_where_a_gradient_is_not_finite_and_counts_it(poison):
    nets = [problem()[0] for _ in range(2)]
    _, x, y = problem()
    optimizers = [ASGO([{"params": list(net.named_parameters()), "view": None}], lr=0.01) for net in nets]
    for step in range(4):
        for net, optimizer, value in zip(nets, optimizers, [poison, None], strict=True):
            backward(net, x, y)
            if step == 1:
                net.norm.weight.grad = None if value is None else net.norm.weight.grad.fill_(poison)
            optimizer.step()
    assert same(*(weights(net) for net in nets))
    assert optimizers[0].failures() == {"norm.weight": 1}
    assert optimizers[1].failures() == {}


def test_adamw_takes_gradients_in_another_memory_order():
    params = [nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)) for _ in range(2)]
    params[1].data = params[0].detach().clone(memory_format=torch.preserve_format)
    grad = torch.randn(2, 3, 4, 5)
    mine = ASGO([{"params": params[:1], "view": None}], lr=0.1)
    peer = torch.optim.AdamW(params[1:], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for param, optimizer in zip(params, (mine, peer), strict=True):
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(*params)


@every_preset
def test_nameless_parameters_are_told_apart(make):
    params = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))]
    optimizer = make(params)
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.failures() == {"parameter 0": 1, "parameter 1": 1, "parameter 2": 1}


def test_a_resting_matrix_does_not_enlarge_the_others():
    experts, alone = nn.Parameter(torch.zeros(4, 3, 5)), nn.Parameter(torch.zeros(1, 3, 5))
    optimizer = ASGO([{"params": [experts, alone], "view": "e m n -> e m n"}], lr=1.0)
    grad = torch.randn(3, 5)
    experts.grad, alone.grad = torch.zeros(4, 3, 5), grad[None]
    experts.grad[2] = grad
    optimizer.step()
    assert torch.allclose(experts[2], alone[0], rtol=1e-5)
    assert not experts[[0, 1, 3]].any()


def fails_first(A, eps):
    """A root that fails for the first matrix of a stack of several 8 x 8."""
    Z, ok = ROOTS["eigh"](A, eps)
    if A.shape[1] == 8 and A.shape[0] > 1:
        ok[0], Z[0] = False, float("nan")
    return Z, ok


def test_a_failed_root_is_tried_again_in_float64(monkeypatch):
    net, x, y = problem()
    optimizer = ASGO(net.named_parameters())
    monkeypatch.setitem(ROOTS, "auto", replace(ROOTS["auto"], solve=fails_first))
    train(net, optimizer, x, y, 3)
    state = optimizer.state[net.b.weight]
    assert torch.equal(state["root"], ROOTS["eigh64"](state["gram"], 1e-6)[0])
    assert optimizer.failures() == {}


def test_where_flags_travel_the_second_try_comes_one_step_later(monkeypatch):
    net, x, y = problem()
    optimizer = ASGO(net.named_parameters(), precondition_frequency=100)
    train(net, optimizer, x, y, 9)
    for bucket in optimizer._plans[0].buckets:
        bucket.root_retry.deferred = True
    monkeypatch.setitem(ROOTS, "auto", replace(ROOTS["auto"], solve=fails_first))
    state = optimizer.state[net.b.weight]
    kept = state["root"].clone()
    train(net, optimizer, x, y, 1)  # the last of the warm steps, in which all roots are due
    assert torch.equal(state["root"], kept)
    assert optimizer.failures() == {"b.weight": 1}
    train(net, optimizer, x, y, 1)
    once = state["root"].clone()
    assert torch.equal(once, ROOTS["eigh64"](state["gram"], 1e-6)[0])
    train(net, optimizer, x, y, 1)
    assert torch.equal(state["root"], once)
    assert optimizer.failures() == {"b.weight": 1}


def test_a_root_that_fails_twice_keeps_the_last_good_one_and_is_counted(monkeypatch):
    net, x, y = problem()
    optimizer = ASGO(net.named_parameters())
    train(net, optimizer, x, y, 3)
    kept = optimizer.state[net.b.weight]["root"].clone()
    monkeypatch.setitem(ROOTS, "auto", replace(ROOTS["auto"], solve=fails_first))
    never = replace(ROOTS["eigh64"], solve=lambda A, eps: (A, torch.zeros(len(A), dtype=torch.bool)))
    monkeypatch.setitem(ROOTS, "eigh64", never)
    before = net.b.weight.detach().clone()
    train(net, optimizer, x, y, 2)
    assert torch.equal(kept, optimizer.state[net.b.weight]["root"])
    assert not torch.equal(before, net.b.weight)
    assert optimizer.failures() == {"b.weight": 2}
    assert all(p.isfinite().all() for p in net.parameters())


@every_preset
def test_odd_shapes_and_scales(make):
    for shape in [(5, 0), (0, 5), (1, 6), (6, 1), (1, 1), (30000, 4), (4, 30000)]:
        for scale in (1.0, 0.0, 1e-30):
            step_on_odd_shapes(make, shape, scale)


def step_on_odd_shapes(make, shape, scale):
    param = nn.Parameter(torch.randn(shape))
    optimizer = make([param])
    largest = max(t.numel() for t in optimizer.state[param].values())
    bound = next(
        (LARGEST[name] for name in LARGEST if make is PRESETS[name]), lambda m, n: max(m * n, min(m, n) ** 2, m, n)
    )
    assert largest <= bound(*shape)
    for _ in range(3):
        param.grad = scale * torch.randn(shape)
        optimizer.step()
    assert param.isfinite().all()


@every_preset
def test_rank_deficient_gradients(make):
    param = nn.Parameter(torch.randn(24, 24))
    optimizer = make([param])
    column = torch.randn(24, 1)
    for _ in range(12):
        param.grad = column @ torch.randn(1, 24)
        optimizer.step()
    assert param.isfinite().all()
    assert optimizer.failures() == {}


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_script_may_lower_the_precision_of_its_own_products(precision):
    grads = [torch.randn(48, 64) for _ in range(6)]
    results = []
    for setting in ("highest", precision):
        param = nn.Parameter(torch.zeros(48, 64))
        optimizer = ASGO([param])
        torch.set_float32_matmul_precision(setting)
        try:
            for grad in grads:
                param.grad = grad.clone()
                optimizer.step()
            assert torch.get_float32_matmul_precision() == setting
        finally:
            torch.set_float32_matmul_precision("highest")
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_the_interval_is_kept_after_the_first_steps_and_turns_are_staggered(interval):
    params = [nn.Parameter(torch.randn(6, 9)) for _ in range(interval)]
    optimizer = ASGO(params, precondition_frequency=interval)
    refreshed = []
    for _ in range(WARMUP_STEPS + 2 * interval):
        before = [optimizer.state[p]["root"].clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        refreshed.append([not torch.equal(b, optimizer.state[p]["root"]) for b, p in zip(before, params, strict=True)])
    assert all(all(step) for step in refreshed[:WARMUP_STEPS])
    assert all(sum(step) == 1 for step in refreshed[WARMUP_STEPS:])
    assert [sum(column) for column in zip(*refreshed[WARMUP_STEPS:], strict=True)] == [2] * interval


# ---- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_a_hyperparameter_out_of_range_is_refused_everywhere(key, value):
    param = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(ValueError, match=f"^ASGO: {key} must be .*; got "):
        ASGO([param], **{key: value})
    optimizer = ASGO([param])
    with pytest.raises(ValueError, match=f"^ASGO: {key} must be "):
        optimizer.add_param_group({"params": [nn.Parameter(torch.randn(3, 4))], "view": MATRIX, key: value})
    assert len(optimizer.param_groups) == 1


REFUSED = {
    "unknown key": (
        {"wieght_decay": 0.1},
        ValueError,
        "the key 'wieght_decay' is not known; did you mean 'weight_decay'",
    ),
    "bad side": (
        {"view": MATRIX, "side": "up"},
        ValueError,
        "side must be one of 'auto', 'left', 'right'; got 'up'",
    ),
    "view that does not fit": (
        {"view": heads(5)},
        ValueError,
        r"with h=5 does not fit 'w' \(6, 4\): 6 is not a multiple",
    ),
    "sum without view": ({"view": None, "betas": (0.9, 1.0)}, ValueError, "must both be below 1; got"),
    "no view": ({"view": 3}, ValueError, "view 3 is not understood"),
}


@pytest.mark.parametrize(("group", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_group_is_refused_before_anything_changes(group, error, message):
    optimizer = ASGO([("v", nn.Parameter(torch.randn(3, 4)))])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [("w", nn.Parameter(torch.randn(6, 4)))], **group})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1


@every_preset
def test_parameters_that_cannot_be_optimized_are_refused(make):
    weight = nn.Parameter(torch.randn(3, 4))
    cases = [
        (
            [nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))],
            TypeError,
            "complex64; parameters must be real",
        ),
        ([torch.ones(3, 4, dtype=torch.int64)], TypeError, "int64; parameters must be real floating point"),
        ([weight, weight], ValueError, "given twice"),
        ({weight}, TypeError, "in order"),
        ([], ValueError, "empty parameter list"),
        ([{"lr": 1.0}], TypeError, "with the key 'params'"),
        (["w"], TypeError, "parameters must be tensors"),
    ]
    for params, error, message in cases:
        with pytest.raises(error, match=message):
            make(params)


@every_preset
def test_a_sparse_gradient_is_refused_before_anything_changes(make):
    net, x, y = problem()
    net.embed = nn.Embedding(7, 6, sparse=True)
    optimizer = make(net.named_parameters())
    backward(net, x, y)
    before = weights(net)
    with pytest.raises(TypeError, match=r"gradient of 'embed.weight' \(7, 6\) is sparse .*sparse=False"):
        optimizer.step()
    assert same(before, weights(net))
    assert all(s["step"] == 0 for s in optimizer.state.values())


@every_preset
def test_state_of_another_model_or_optimizer_is_refused_before_anything_changes(make):
    net, x, y = problem()
    optimizer = make(net.named_parameters())
    train(net, optimizer, x, y, 2)
    before = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
    other = nn.Linear(5, 4)
    small = make(other.named_parameters()).state_dict()
    shapes = make([("w", nn.Parameter(torch.randn(3, 4)))]), make([("w", nn.Parameter(torch.randn(3, 5)))])
    cases = [
        (optimizer, small, "the saved state has groups of"),
        (optimizer, torch.optim.AdamW(net.parameters()).state_dict(), "a saved group has no views: it is of another"),
        (shapes[0], shapes[1].state_dict(), r"the saved state of 'w' has a tensor \("),
        (make([{"params": [nn.Parameter(torch.randn(4, 4))], "view": heads(2)}]),
         make([{"params": [nn.Parameter(torch.randn(4, 4))], "view": MATRIX}]).state_dict(),
         "is of the view .* with h=2|is of the view .*, this optimizer reads it as"),
    ]  # fmt: skip
    for target, saved, message in cases:
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(saved)
    assert all(torch.equal(t, optimizer.state[p][k]) for p, s in before.items() for k, t in s.items())
