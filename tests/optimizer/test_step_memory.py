"""The memory of a step: what `report` says is what a step takes, and it is bounded."""

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from asgo import ASGO, SPAM, View, report
from asgo.diagnostics.step_memory import LiveBytes, step_bytes
from asgo.linalg.inverse_root import ROOTS
from asgo.linalg.polynomial import schedule
from asgo.optimizer.bucket import BUCKET_BYTES
from benchmarks.speed.timing import peak_bytes
from family import PRESETS

SHAPES = [(20, 30), (20, 30), (65, 75), (75, 65), (32,), (8, 3, 3, 3), (20, 30)]
AFTER = {"spam, asgo": 22, "spam, adam-mini": 5, "adagram": 3, "adagram, symmetric": 3}
"""Steps, where fewer or more than two: SPAM clips spikes from its 20th; AdaGram takes more once its rank is used up."""


def parameters(dtype, device="cpu"):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]


def peak(optimizer, params, steps):
    """The most that any of some steps takes; gradients are there before."""
    most = 0
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn_like(param)
        with LiveBytes() as live:
            optimizer.step()
        most = max(most, live.peak)
    return most


def everything(optimizer, params):
    return [tensor for param in params for tensor in (param, *optimizer.state[param].values())]


def test_live_bytes_are_those_of_storages_that_are_alive():
    there = torch.zeros(10)
    with LiveBytes() as live:
        there.add_(1)
        assert live.now == 0
        made = there + there
        assert live.now == made.nbytes
        view, copy = made[2:], made.double()
        assert live.now == made.nbytes + copy.nbytes
        del made, copy
        assert live.now == view.untyped_storage().nbytes() == 40
        del view, there
        assert live.now == -40
    assert live.peak == 40 + 80


def test_what_is_stated_is_what_a_step_takes():
    for name, make in PRESETS.items():
        many_steps = name.startswith("spam")
        for dtype in (torch.float32,) if many_steps else (torch.float32, torch.bfloat16):
            params = parameters(dtype)
            optimizer = make(params)
            stated = step_bytes(optimizer)
            taken = peak(optimizer, params, AFTER.get(name, 2))
            assert stated is not None, name
            assert abs(stated - taken) <= 0.1 * taken, (name, dtype, stated, taken)


def test_torchs_own_profiler_counts_the_same():
    """It also sees what kernels allocate by torch for themselves; with roots made of products that is little."""
    for name, options in (("ours", {"root": "minimax"}), ("shampoo", {}), ("bagm", {}), ("agd", {})):
        params = parameters(torch.float32)
        optimizer = PRESETS[name](params, **options)
        peak(optimizer, params, 1)
        seen = peak_bytes(optimizer.step, torch.device("cpu"))
        assert abs(seen - step_bytes(optimizer)) <= 0.1 * seen, name


def test_it_is_said_without_a_step():
    for name, make in PRESETS.items():
        params, called = parameters(torch.float32), []
        optimizer = make(params)
        optimizer.register_step_pre_hook(lambda *args, called=called: called.append(args))
        held = [(t, t.detach().clone()) for t in everything(optimizer, params)]
        groups = [dict(group) for group in optimizer.param_groups]
        everywhere = register_optimizer_step_pre_hook(lambda *args, called=called: called.append(args))
        try:
            stated = step_bytes(optimizer)
        finally:
            everywhere.remove()
        assert stated, name
        assert not called, name
        assert optimizer.param_groups == groups, name
        assert all(p.grad is None for p in params), name
        now = everything(optimizer, params)
        assert all(t is old and torch.equal(t, copy) for t, (old, copy) in zip(now, held, strict=True)), name
        peak(optimizer, params, 1)
        assert step_bytes(optimizer) == stated, name


def test_the_constants_of_roots_are_not_made_without_data():
    schedule.cache_clear()
    for dtype in (torch.float32, torch.float64):
        assert step_bytes(ASGO(parameters(dtype), root="minimax", eps=3e-6))
    A = torch.eye(4, dtype=torch.float64)[None] * 4
    Z, ok = ROOTS["minimax"](A, 3e-6)
    exact, _ = ROOTS["eigh"](A, 3e-6)
    assert ok.all()
    torch.testing.assert_close(Z, exact, rtol=1e-6, atol=0)


def test_report_says_it_with_no_parameter_on_a_device():
    here, nowhere = (report(ASGO(parameters(torch.float32, device))) for device in ("cpu", "meta"))
    assert here.step_bytes == nowhere.step_bytes
    megabytes = f"{here.step_bytes / 1e6:.2g}"
    assert str(here).endswith(f"\na step takes up to {megabytes} MB above parameters, gradients and state")


def test_what_spam_takes_is_counted_before_the_update():
    """It is given back by then: more only where the update takes less, as that of AdamW, which takes nothing."""
    plain, spam = (ASGO([{"params": parameters(torch.float32), "view": None}]) for _ in range(2))
    largest = max(p.numel() * 4 for p in parameters(torch.float32))
    assert step_bytes(SPAM(spam)) >= step_bytes(plain) + 2 * largest
    matrices, spam = ASGO(parameters(torch.float32)), SPAM(ASGO(parameters(torch.float32)))
    assert step_bytes(spam) >= step_bytes(matrices)


def test_frozen_parameters_and_groups_of_vectors_alone_take_nothing():
    matrix, vector = parameters(torch.float32)[0], parameters(torch.float32)[4]
    alone = step_bytes(ASGO([matrix]))
    frozen = torch.nn.Parameter(torch.ones(500, 500), requires_grad=False)
    groups = [{"params": [matrix, frozen]}, {"params": [vector], "eps": 1e-30}]
    assert step_bytes(ASGO(groups)) == alone
    assert step_bytes(torch.optim.SGD([vector])) is None


def gpt2(layers, width, vocabulary=50257):
    """Groups of GPT-2's shapes, on paper."""

    def empty(*shape):
        return torch.nn.Parameter(torch.empty(shape, device="meta"))

    d = width
    matrices = [empty(*s) for _ in range(layers) for s in [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]]
    vectors = [empty(k) for _ in range(layers) for k in (d, d, 3 * d, d, d, d, 4 * d, d)]
    rest = [empty(vocabulary, d), empty(1024, d), *vectors]
    return [{"params": matrices, "view": View("m n -> 1 m n")}, {"params": rest, "view": None}]


def test_the_memory_of_a_step_is_bounded_whatever_the_depth():
    """12 buckets, 14 with packed state: two stacks of the matrices' size and ten (twelve) of their shorter sides'."""
    for layers, width in [(2, 768), (12, 768), (4, 1280)]:
        largest = max(BUCKET_BYTES["cpu"], 4 * width * width * 4)
        for packed, times in ((False, 12), (True, 14)):
            stated = step_bytes(ASGO(gpt2(layers, width), root="minimax", packed_state=packed))
            assert stated <= 1.001 * times * largest, (layers, width, packed)
        assert stated >= 2 * 4 * width * width  # it counts something: a direction and an update at least
