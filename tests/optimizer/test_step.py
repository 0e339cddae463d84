"""How the step works: in slabs, in turns, without waiting for a device, compiled, captured."""

import statistics
import threading
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounter

import asgo
from asgo import ASGO, route
from asgo.linalg import matmul, spectral
from asgo.linalg.inverse_root import ROOTS
from asgo.linalg.masked import known_all_true, where
from asgo.optimizer import bucket
from asgo.optimizer.param_groups import views_of
from asgo.optimizer.refresh_schedule import balanced_phases, refresh_phases
from asgo.views import MATRIX, TRANSPOSED, View, heads
from family import every_preset

torch._dynamo.config.cache_size_limit = 64


def parameters(shapes, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    return params


def groups(params, view=MATRIX):
    matrices = [p for p in params if p.ndim == 2]
    return [{"params": matrices, "view": view}, {"params": [p for p in params if p.ndim != 2], "view": None}]


SHAPES = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6), (7,), (3,)]


# ---- slabs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [MATRIX, TRANSPOSED, heads(2)], ids=str)
def test_state_of_equal_shapes_is_one_tensor_and_is_never_copied(view):
    params = parameters([(4, 6)] * 3)
    optimizer = ASGO([{"params": params, "view": view}])
    optimizer.step()
    keys = set(optimizer.state[params[0]]) - {"step"}
    storages = {key: {optimizer.state[p][key].untyped_storage().data_ptr() for p in params} for key in keys}
    assert all(len(found) == 1 for found in storages.values())
    optimizer.step()
    assert storages == {key: {optimizer.state[p][key].untyped_storage().data_ptr() for p in params} for key in keys}


@pytest.mark.parametrize("limit", [1, 200, 2**20])
def test_a_bucket_has_at_most_so_many_bytes_or_one_member(monkeypatch, limit):
    monkeypatch.setitem(bucket.BUCKET_BYTES, "cpu", limit)
    params, same = parameters(SHAPES), parameters(SHAPES)
    optimizer = ASGO(groups(params))
    optimizer.step()
    made = [bucket for plan in optimizer._plans.values() for bucket in plan.buckets]
    sizes = [bucket.state["exp_avg"].numel() * 4 for bucket in made]
    assert all(size <= limit or len(bucket.parts) == 1 for size, bucket in zip(sizes, made, strict=True))
    assert sum(len(bucket.parts) for bucket in made) == 5
    monkeypatch.setitem(bucket.BUCKET_BYTES, "cpu", 2**25)
    ASGO(groups(same)).step()
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_momentum_lies_in_the_memory_order_of_the_gradients():
    """Conv1D weights: what runs through both at once runs along memory."""
    params = parameters([(4, 6)] * 2)
    optimizer = ASGO([{"params": params, "view": TRANSPOSED}])
    optimizer.step()
    ((bucket,),) = [plan.buckets for plan in optimizer._plans.values()]
    assert bucket.state["exp_avg"].shape == (2, 6, 4)
    assert bucket.state["exp_avg"].stride() == bucket.gradients().stride() == (24, 1, 6)


def test_a_single_gradient_is_read_where_it_is_and_never_written():
    (param,) = parameters([(4, 6)])
    before = param.grad.clone()
    optimizer = ASGO([param], maximize=True)
    optimizer.step()
    assert torch.equal(param.grad, before)
    ((bucket,),) = [plan.buckets for plan in optimizer._plans.values()]
    assert bucket.gradients().data_ptr() == param.grad.data_ptr()


@every_preset
def test_state_bytes_are_predicted_exactly(make):
    named = [(f"p{i}", p) for i, p in enumerate(parameters([*SHAPES, (3, 4, 2, 2)]))]
    predicted = asgo.state_bytes([{"params": named}], make)
    optimizer = make(named)
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert predicted == sum(t.numel() * t.element_size() for t in held)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert predicted == sum(t.numel() * t.element_size() for t in held)


def test_state_bytes_of_gpt2_on_paper():
    """Per matrix of GPT-2: twice the parameter with whole queries and keys, as AdamW; less with heads."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    size = sum(p.numel() * 4 for p in model.parameters())
    assert asgo.state_bytes(route(model)) / size == pytest.approx(2.0, abs=0.002)
    assert asgo.state_bytes(route(model, per_head=True)) / size < 1.8


# ---- turns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [2, 3, 5, 10])
@pytest.mark.parametrize("per_head", [False, True])
def test_no_step_has_much_more_roots_than_the_median_step(interval, per_head):
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    optimizer = ASGO(route(model, per_head=per_head), precondition_frequency=interval)
    load = [0.0] * interval
    phase_of = refresh_phases(optimizer._group_plans())
    for group in optimizer.param_groups:
        for param, view in zip(group["params"], views_of(group), strict=True):
            for part, (b, m, n) in enumerate(view.shapes(param.shape) if view else ()):
                load[phase_of[param, part]] += b * min(m, n) ** 3
    assert max(load) <= 1.5 * statistics.median(load)


def test_turns_are_balanced_by_cost():
    costs = [8.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert sorted(
        sum(c for c, t in zip(costs, balanced_phases(costs, 2), strict=True) if t == i) for i in range(2)
    ) == [8, 8]


@pytest.mark.parametrize("interval", [2, 3])
def test_every_root_has_its_turn_once_an_interval(interval, monkeypatch):
    calls = []
    counted = replace(ROOTS["eigh"], solve=lambda A, eps: (calls.append(len(A)), ROOTS["eigh64"](A, eps))[1])
    monkeypatch.setitem(ROOTS, "eigh", counted)
    params = parameters([(4, 6)] * 5)
    optimizer = ASGO(params, precondition_frequency=interval, root="eigh")
    for _ in range(10):
        optimizer.step()
    assert sum(calls) == 50
    calls.clear()
    for _ in range(2 * interval):
        optimizer.step()
    assert sum(calls) == 10
    assert len(calls) <= 2 * interval  # members of one turn stand side by side: one call a step


# ---- nothing waits for the device ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nesterov": False, "cross_normalize": False, "statistic": "gradient"},
                                     {"adjust_lr": None}, {"precondition_frequency": 3}, {"packed_state": True}],
                         ids=str)  # fmt: skip
def test_the_step_reads_nothing_from_the_device(options):
    """Meta tensors have no values: whatever would have to wait for one fails there."""
    params = parameters([shape for shape in SHAPES if len(shape) == 2], device="meta")
    optimizer = ASGO(params, root="minimax", **options)
    for _ in range(3):
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3] * 5


def test_masks_are_read_on_the_cpu_only():
    true = torch.ones(3, dtype=torch.bool)
    assert known_all_true(true)
    assert not known_all_true(~true)
    assert not known_all_true(true.to("meta"))
    x = torch.arange(3.0)
    assert where(true, x, 0.0) is x
    assert where(~true, x, 7.0).tolist() == [7.0] * 3


# ---- compiled and captured ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_with_packed_state_is_the_same_and_is_compiled_once_whatever_lr_does():
    torch._dynamo.reset()
    shapes = [(4, 6), (4, 6), (5,)]
    params, same = parameters(shapes), parameters(shapes)
    rates = [torch.tensor(1e-2) for _ in range(2)]
    plain, compiled = (ASGO(groups(p), lr=lr, packed_state=True) for p, lr in zip((params, same), rates, strict=True))
    counter = CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    counts = []
    for _ in range(4):
        plain.step()
        step()
        counts.append(counter.frame_count)
        for lr in rates:
            lr.mul_(0.5)
    assert counts[0] > 0
    assert len(set(counts)) == 1
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eager_steps", [0, 1])
def test_a_step_over_split_parameters_can_be_compiled_before_and_after_an_eager_one(eager_steps):
    torch._dynamo.reset()
    view = View("m n -> 1 m n", split=(2, 4), split_dim=1)
    params, same = parameters([(4, 6), (4, 6)]), parameters([(4, 6), (4, 6)])
    plain, compiled = (ASGO([{"params": p, "view": view}], lr=1e-2) for p in (params, same))
    for _ in range(eager_steps):
        plain.step()
        compiled.step()
    plain.step()
    torch.compile(compiled.step, backend="eager")()
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_capturable_changes_nothing_but_where_steps_are_counted():
    params, same = parameters(SHAPES), parameters(SHAPES)
    for p, capturable in ((params, False), (same, True)):
        optimizer = ASGO(groups(p), capturable=capturable)
        for _ in range(3):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, same, strict=True))
    on_paper = parameters([(4, 6), (3,)], device="meta")
    for capturable in (False, True):
        state = ASGO(groups(on_paper), capturable=capturable).state
        assert [state[p]["step"].device.type for p in on_paper] == ["meta" if capturable else "cpu", "meta"]


def test_what_a_graph_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"^ASGO: capturable got precondition_frequency=2; .* Pass precondition_freq"):
        ASGO(parameters([(2, 3)]), capturable=True, precondition_frequency=2)
    with pytest.raises(
        ValueError, match=r"^ASGO: root 'minimax_tf32' got eps=1e-06: its products are too coarse for eps below 1e-05"
    ):
        ASGO(parameters([(2, 3)]), root="minimax_tf32")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_step_is_the_same_and_never_waits(packed):
    params, same = parameters(SHAPES, "cuda"), parameters(SHAPES, "cuda")
    options = {"capturable": True, "packed_state": packed}
    plain, captured = (ASGO(groups(p), lr=torch.tensor(1e-2).cuda(), **options) for p in (params, same))
    for optimizer in (plain, captured):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    graph.replay()
    for p, q in zip(params, same, strict=True):
        torch.testing.assert_close(p, q)


# ---- products and threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_is_the_product_and_exactly_symmetric(dtype, transposed):
    dice = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 320, (60, 2), generator=dice).tolist()
    for k, n in [(0, 3), (3, 0), (1, 1), *sizes]:
        X = torch.randn(2, *((n, k) if transposed else (k, n)), generator=dice).to(dtype)
        X = X.mT if transposed else X
        G, exact = matmul.gram(X), X.double() @ X.double().mT
        assert torch.equal(G, G.mT), (k, n)
        size = X.double().norm(dim=2)
        bound = (n + 1) * torch.finfo(dtype).eps * size[:, :, None] * size[:, None]
        assert ((G.double() - exact).abs() <= bound).all(), (k, n)


def test_times_keeps_the_memory_order():
    A, X = torch.randn(2, 4, 4), torch.randn(2, 6, 4).mT
    assert matmul.times(A, X).stride() == X.stride()
    assert matmul.times(A, X.contiguous()).is_contiguous()
    torch.testing.assert_close(matmul.times(A, X), A @ X)


def test_three_bfloat16_products_are_nearly_one_in_float32():
    C, A, B = torch.randn(3, 2, 64, 64)
    exact = 2 * C.double() + 3 * (A.double() @ B.double())
    three = matmul.baddbmm(C, A, B, 2.0, 3.0, "bf16x3")
    one = 2 * C + 3 * (A.bfloat16().float() @ B.bfloat16().float())
    assert (three - exact).norm() < (one - exact).norm() / 64  # 16 bits in place of 8
    wide = matmul.baddbmm(C.double(), A.double(), B.double(), 2.0, 3.0, "bf16x3")
    torch.testing.assert_close(wide, exact, rtol=0, atol=64 * torch.finfo(torch.float64).eps * exact.abs().max().item())


@pytest.mark.parametrize("name", ["eigh", "eigh64", "outside"])
@pytest.mark.parametrize("b", [1, 2, 5])
def test_threads_share_matrices_and_are_as_many_afterwards(name, b):
    G = torch.randn(b, 40, 60)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ROOTS[name](G @ G.mT, 1e-6)[0]
        torch.set_num_threads(2)
        shared = ROOTS[name](G @ G.mT, 1e-6)[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone, shared, rtol=1e-3, atol=1e-4 * alone.abs().max().item())


def test_an_error_in_a_thread_arrives_and_leaves_the_threads_as_they_were(monkeypatch):
    def broken(A):
        raise MemoryError(threading.current_thread().name)

    monkeypatch.setattr(spectral, "decompose", broken)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(MemoryError, match="asgo-eigh"):
            ROOTS["eigh"](torch.eye(40).repeat(2, 1, 1), 1e-6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---- precision that threads share ---------------------------------------------------------------------------------


def precisions():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]


@pytest.fixture
def high():
    torch.set_float32_matmul_precision("high")
    yield precisions()
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        backend.fp32_precision = "none"


class Inside(threading.Thread):
    """A thread that is inside `exact_matmul` from `start` to `leave`."""

    def __init__(self, precision="ieee"):
        super().__init__(daemon=True)
        self.precision, self.is_in, self.may_go = precision, threading.Event(), threading.Event()

    def run(self):
        with matmul.exact_matmul(torch.device("cpu"), self.precision):
            self.is_in.set()
            self.may_go.wait(30)

    def start(self):
        super().start()
        assert self.is_in.wait(30)

    def leave(self):
        self.may_go.set()
        self.join(30)
        assert not self.is_alive()


@pytest.mark.parametrize("first_out", [0, 1])
def test_precision_stays_exact_until_the_last_thread_leaves_and_is_then_as_it_was(high, first_out):
    threads = [Inside(), Inside()]
    for thread in threads:
        thread.start()
    assert precisions() == ["ieee", "ieee"]
    threads[first_out].leave()
    assert precisions() == ["ieee", "ieee"]
    threads[1 - first_out].leave()
    assert precisions() == high


def test_threads_share_the_more_exact_precision_and_nesting_gives_back_the_outer_one(high):
    coarse, exact = Inside("tf32"), Inside()
    coarse.start()
    assert precisions() == ["tf32", "ieee"]
    exact.start()
    assert precisions() == ["ieee", "ieee"]
    exact.leave()
    assert precisions() == ["tf32", "ieee"]
    coarse.leave()
    with matmul.exact_matmul(torch.device("cpu")):
        with matmul.exact_matmul(torch.device("cpu"), "tf32"):
            assert precisions() == ["tf32", "ieee"]
        assert precisions() == ["ieee", "ieee"]
    assert precisions() == high


def test_two_training_threads_leave_the_precision_as_it_was_and_train_as_one_does(high):
    def train(params):
        optimizer, dice = ASGO(params), torch.Generator().manual_seed(1)
        for _ in range(40):
            for p in params:
                p.grad = torch.randn(p.shape, generator=dice)
            optimizer.step()

    alone, *others = [[nn.Parameter(torch.zeros(24, 36))] for _ in range(3)]
    train(alone)
    threads = [threading.Thread(target=train, args=(params,)) for params in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert precisions() == high
    assert torch.get_float32_matmul_precision() == "high"
    for params in others:
        torch.testing.assert_close(params[0], alone[0], rtol=1e-3, atol=1e-5)
