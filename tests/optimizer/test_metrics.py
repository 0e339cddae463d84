"""What `metrics` says of a step is what the parameters and gradients say, and recording changes nothing."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asgo import ASGO, SPAM, AdamMini, Rule, route
from asgo.diagnostics.statistic import conditioning
from asgo.linalg.packed_symmetric import pack
from asgo.optimizer.metrics import residuals
from asgo.structures import OneSided, Packed
from asgo.views import fused_qkv
from family import every_preset, without_decay


class Net(nn.Module):
    """A matrix, a fused one, experts, a table and vectors."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 8)
        self.fused = nn.Linear(8, 14)
        self.out = nn.Linear(14, 5)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.to(dtype)

    def forward(self, tokens):
        return torch.einsum("bm,emn->ben", self.out(torch.tanh(self.fused(self.embed(tokens)))), self.experts)


def groups(model):
    return route(model, rules=[Rule("fused.weight", fused_qkv(8, 4, 2, 2))])


def backward(model, seed=0):
    dice = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randint(6, (7,), generator=dice)).square().mean().backward()


def rms(tensor):
    return math.sqrt(float(tensor.detach().double().square().mean()))


def stepped(optimizer, model, steps=3):
    """Parameters before and after the last of some steps, which is recorded."""
    for step in range(steps):
        backward(model, step)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.record_metrics(int(step == steps - 1))
        optimizer.step()
    return before, dict(model.named_parameters())


@every_preset
def test_sizes_are_those_of_the_parameters(make):
    model = Net()
    optimizer = without_decay(make(groups(model)))
    before, after = stepped(optimizer, model)
    found = optimizer.metrics()
    assert set(found) == set(before)
    for name, row in found.items():
        update, param = after[name] - before[name], after[name]
        close = {"rel": 1e-6, "abs": 1e-12}
        assert row["update_rms"] == pytest.approx(rms(update), **close), name
        assert row["weight_rms"] == pytest.approx(rms(param), **close)
        assert row["ratio"] == pytest.approx(rms(update) / rms(param), **close)
        assert row["gradient_norm"] == pytest.approx(float(param.grad.norm()), **close)
        assert row["failures"] == 0


@every_preset
def test_recording_changes_no_step(make):
    plain, recorded = Net(), Net()
    for model, on in ((plain, 0), (recorded, 1)):
        optimizer = make(groups(model))
        for step in range(4):
            backward(model, step)
            optimizer.record_metrics(on)
            optimizer.step()
    assert all(map(torch.equal, plain.parameters(), recorded.parameters()))


class Calls(TorchDispatchMode):
    """The operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_is_not_recorded_runs_nothing_more():
    names = []
    for on in (None, 0, 1):
        model = Net()
        optimizer = ASGO(groups(model))
        if on is not None:
            optimizer.record_metrics()
            optimizer.record_metrics(on)
        backward(model)
        optimizer.step()
        backward(model)
        with Calls() as calls:
            optimizer.step()
        names.append(calls.names)
    assert names[0] == names[1]
    assert len(names[2]) > len(names[0])


def test_a_recorded_step_reads_nothing_back():
    """A meta tensor has no data: any question would raise."""
    model = Net().to("meta")
    optimizer = ASGO(groups(model), capturable=True)
    optimizer.record_metrics()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def test_one_transfer_a_read():
    model = Net()
    optimizer = ASGO(groups(model))
    stepped(optimizer, model)
    with Calls() as calls:
        optimizer.metrics()
    assert not [name for name in calls.names if "item" in name or "_local_scalar" in name]
    assert sum("cat" in name for name in calls.names) == 1


def test_every_so_manieth_step_is_recorded():
    model = Net()
    optimizer, seen = ASGO(groups(model)), []
    optimizer.record_metrics(every=3)
    for step in range(8):
        backward(model, step)
        optimizer.step()
        seen.append(optimizer.metrics()["out.weight"]["weight_rms"] if step >= 2 else None)
        if step in (2, 5):
            assert seen[-1] == pytest.approx(float(model.out.weight.detach().square().mean().sqrt()))
    assert seen[2] == seen[3] == seen[4] != seen[5] == seen[6] == seen[7]
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match=f"every must be a whole number of steps >= 0; got {wrong}"):
            optimizer.record_metrics(wrong)


def test_without_a_recorded_step_it_says_what_to_call():
    optimizer = ASGO(route(Net()))
    with pytest.raises(RuntimeError, match=r"no step was recorded\. Call optimizer\.record_metrics\(\) before"):
        optimizer.metrics()


def test_the_last_recorded_step_stays_readable():
    model = Net()
    optimizer = ASGO(groups(model))
    stepped(optimizer, model)
    found = optimizer.metrics()
    optimizer.record_metrics(0)
    backward(model, 9)
    optimizer.step()
    assert {n: row["update_rms"] for n, row in optimizer.metrics().items()} == {
        n: row["update_rms"] for n, row in found.items()
    }


def test_parameters_without_a_gradient_are_left_out():
    model = Net()
    optimizer = ASGO(groups(model))
    backward(model)
    model.out.weight.grad = model.embed.weight.grad = None
    optimizer.record_metrics()
    optimizer.step()
    assert set(dict(model.named_parameters())) - set(optimizer.metrics()) == {"out.weight", "embed.weight"}


def test_what_is_not_finite_is_shown_and_counted():
    model = Net()
    optimizer = ASGO(groups(model))
    stepped(optimizer, model)
    before = model.embed.weight.detach().clone()
    backward(model)
    model.experts.grad[1, 0, 0] = torch.inf
    model.embed.weight.grad[0, 0] = torch.nan
    optimizer.step()
    found = optimizer.metrics()
    assert found["experts"]["failures"] == found["embed.weight"]["failures"] == 1
    assert math.isinf(found["experts"]["gradient_norm"])
    assert found["embed.weight"]["update_rms"] == 0
    assert torch.equal(before, model.embed.weight)
    assert {name: row["failures"] for name, row in found.items() if row["failures"]} == optimizer.failures()


def test_learning_rates_are_those_of_the_step():
    """Schedules change them right after it."""
    model = Net()
    optimizer = ASGO(groups(model), adamw={"lr": 3e-3, "betas": (0.8, 0.9)}, weight_decay=0.0, lr=torch.tensor(1e-2))
    before, after = stepped(optimizer, model)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].zero_() if isinstance(group["lr"], torch.Tensor) else 0.0
    for name, row in optimizer.metrics().items():
        assert row["update_rms"] == pytest.approx(rms(after[name] - before[name]), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_low_precision_weights_it_is_the_update_before_rounding(dtype):
    model = Net(dtype)
    optimizer = ASGO(groups(model), lr=1e-2)
    stepped(optimizer, model)
    for name, row in optimizer.metrics().items():
        assert row["weight_rms"] == pytest.approx(rms(dict(model.named_parameters())[name]), rel=1e-3)
        if name in ("out.weight", "experts"):
            assert row["update_rms"] == pytest.approx(2e-3, rel=1e-3)


def test_a_wrapper_passes_them_on():
    model = Net()
    optimizer = SPAM(AdamMini(groups(model)))
    stepped(optimizer, model)
    assert optimizer.metrics() == optimizer.optimizer.metrics()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_records_the_same():
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = Net()
        optimizer = ASGO(groups(model), lr=torch.tensor(1e-2), root="minimax", capturable=True)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        optimizer.record_metrics()
        for i in range(3):
            backward(model, i)
            step()
        found.append(optimizer.metrics())
    for name, row in found[0].items():
        assert found[1][name] == pytest.approx(row, rel=1e-5, abs=1e-9)


# ---- residuals -----------------------------------------------------------------------------------------------------


def root_state(k, stretch, seed=0):
    """A statistic with condition 100, and the exact root times ``1 + stretch`` along each of its eigenvectors."""
    dice = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(2, k, k, dtype=torch.float64, generator=dice))[0]
    values = torch.logspace(-2, 0, k, dtype=torch.float64).expand(2, k)
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    damped = values + 1e-3 * norm
    gram = (vectors * values[:, None]) @ vectors.mT
    return {"gram": gram, "root": (vectors * (damped.rsqrt() * (1 + stretch))[:, None]) @ vectors.mT}


@pytest.mark.parametrize("k", [1, 4, 33])
@pytest.mark.parametrize("stretch", [0.0, 1e-3, -0.1])
def test_of_a_root_off_by_a_factor_the_residual_is_exact(k, stretch):
    found = residuals(OneSided(), {"root": "auto", "eps": 1e-3}, root_state(k, stretch))
    assert found.tolist() == pytest.approx([abs((1 + stretch) ** 2 - 1)] * 2, abs=1e-10)


def test_it_estimates_the_residual_of_any_error():
    """The mean square over statistics is that of the matrix: within four standard errors over 200 of them."""
    estimated, exact = [], []
    for seed in range(200):
        state = root_state(16, 0.0, seed)
        dice = torch.Generator().manual_seed(1000 + seed)
        error = torch.randn(2, 16, 16, dtype=torch.float64, generator=dice)
        state["root"] += 1e-2 * (error + error.mT)
        group = {"root": "auto", "eps": 1e-3}
        estimated += residuals(OneSided(), group, state).square().tolist()
        exact += conditioning(OneSided(), group, {**state, "exp_avg": state["gram"]}, 0)[1].square().tolist()
    ratios = torch.tensor(estimated) / torch.tensor(exact)
    assert abs(float(ratios.mean()) - 1) < 4 * float(ratios.std()) / len(ratios) ** 0.5
    assert float(ratios.std()) < 2


def test_packed_state_has_the_same_residual():
    state = root_state(5, 0.01)
    packed = Packed(OneSided())
    group = {"root": "auto", "eps": 1e-3}
    small = {key: pack(x) for key, x in state.items()}
    torch.testing.assert_close(residuals(packed, group, small), residuals(OneSided(), group, state))


def test_where_there_is_no_such_root_there_is_no_residual():
    assert residuals(OneSided(), {"root": "outside", "eps": 1e-3}, root_state(3, 0.0)) is None
    for options, kept in (({}, True), ({"root": "square_root"}, False)):
        model = Net()
        optimizer = ASGO(groups(model), **options)
        stepped(optimizer, model)
        found = optimizer.metrics()
        assert ("root_residual" in found["fused.weight"]) is kept
        assert "root_residual" not in found["embed.weight"]


def test_an_old_root_shows_its_age():
    model = Net()
    optimizer = ASGO(groups(model), precondition_frequency=50)
    stepped(optimizer, model, steps=10)
    fresh = optimizer.metrics()["out.weight"]["root_residual"]
    stepped(optimizer, model, steps=5)
    assert optimizer.metrics()["out.weight"]["root_residual"] > 10 * fresh
