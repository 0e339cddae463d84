"""Roots against an independent float64 reference, over the cases of the numerics page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from asgo.linalg import polynomial as minimax_module
from asgo.linalg.inverse_root import (
    FAST_TOLERANCE,
    ROOTS,
    TOLERANCE,
    auto,
    eigh,
    eigh64,
    eigh_with_root,
    exact_matmul,
    minimax,
    outside,
    products,
    reference,
    relative,
    resolve,
)
from asgo.linalg.polynomial import PROBE_TOLERANCE
from asgo.linalg.spectral import RESOLUTION

BACKENDS: Any = torch.backends
EPS = 1e-6
LEAST_EPS = {name: max(EPS, root.min_eps) for name, root in ROOTS.items()}
U = torch.finfo(torch.float32).eps / 2
GROWTH = EPS**-0.5  # ||Z|| ||M|| / ||Z M|| is no more: what an error of Z, relative to ||Z||, does to a step
BOUND = {
    "eigh": U / EPS,  # an eigenvalue is moved by U ||A||, its weight by half of that over the damping; twice
    "eigh64": 2 * U * GROWTH,  # Z is rounded once; twice
    "minimax": 2 * (TOLERANCE[torch.float32] + U * GROWTH),  # the schedule and a rounding; twice, and so on
    "minimax_fast": 2 * (FAST_TOLERANCE + U * GROWTH),
    "minimax_bf16x3": 2 * (TOLERANCE[torch.float32] + 2**-17 * GROWTH),  # the sum of two bfloat16 has 16 bits
}
"""Of ``||U - U_exact|| / ||U_exact||`` for ``U = Z M`` in float32. Every root that damps relatively has a row, but
for those in `ELSEWHERE`."""
DAMPED = list(BOUND)
ELSEWHERE = {"auto", "minimax_tf32"}
"""One of the others, and a root that differs from one of the others on CUDA alone."""
FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "outside": lambda x, eps: 1 / (x.sqrt() + eps),
    "inside": lambda x, eps: (x + eps).rsqrt(),
    "reference": lambda x, eps: x.rsqrt(),
}
"""The root of a diagonal matrix by each root whose damping is not relative."""


def exact_root(A: Tensor, eps: float) -> Tensor:
    """(A + eps ||A||_F I)^(-1/2) of one matrix, float64; eigenvalues that rounding made negative are zero."""
    A = A.double()
    size = A.norm()
    values, vectors = torch.linalg.eigh((A + A.T) / (2 * size))
    return vectors @ torch.diag((values.clamp(min=0) + eps) ** -0.5) @ vectors.T / size.sqrt()


def error(Z: Tensor, exact: Tensor, M: Tensor | None = None) -> float:
    """Relative error of Z M (of Z itself where no M is given)."""
    M = torch.eye(len(Z), dtype=torch.float64) if M is None else M.double()
    return ((Z.double() @ M - exact @ M).norm() / (exact @ M).norm()).item()


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    return gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1) / math.sqrt(rank)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    vectors = torch.linalg.qr(gaussian(len(values), len(values), seed=seed, dtype=torch.float64))[0]
    A = (vectors * values.double()) @ vectors.T
    return (A + A.T) / 2


def drifting(m: int, n: int, steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gram and momentum, float32, of gradients that are a drifting low-rank signal plus power-law noise."""
    rank = 8
    basis, columns = (torch.linalg.qr(gaussian(size, rank, seed=seed, dtype=torch.float64))[0] for size in (m, n))
    turn = torch.linalg.qr(gaussian(m, m, seed=seed + 1, dtype=torch.float64))[0]
    law = torch.arange(1, m + 1, dtype=torch.float64) ** -1
    V, M = torch.zeros(m, m), torch.zeros(m, n)
    for step in range(steps):
        noise, shift, size = (
            gaussian(s, t, seed=100 * step + i, dtype=torch.float64)
            for i, (s, t) in enumerate([(m, n), (m, rank), (rank, 1)])
        )
        basis = torch.linalg.qr(basis + 0.1 * shift / math.sqrt(m))[0]
        signal = 10 * basis * torch.logspace(0, -2, rank, dtype=torch.float64) @ (columns.T * size)
        G = (signal + 0.03 * turn * law @ noise).float()
        V, M = 0.95 * V + 0.05 * (G @ G.T), 0.9 * M + 0.1 * G
    return V, M


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cuda.matmul.fp32_precision = "none"
    BACKENDS.mkldnn.matmul.fp32_precision = "none"


def test_every_root_is_compared_with_its_formula():
    assert {name for name, root in ROOTS.items() if root.formula is relative} == {*BOUND, *ELSEWHERE}
    assert ROOTS.keys() == {*BOUND, *ELSEWHERE, *FORMULAS}


@pytest.mark.parametrize("name", ROOTS)
def test_the_record_of_a_root_says_what_it_inverts(name: str):
    values = torch.tensor([[4.0, 1.0, 0.25, 0.1]], dtype=torch.float64)
    wanted = FORMULAS[name](values, 0.5) if name in FORMULAS else (values + 0.5 * values.norm()).rsqrt()
    torch.testing.assert_close(ROOTS[name].formula(values, 0.5).rsqrt(), wanted)
    Z, ok = ROOTS[name](torch.diag_embed(values), 0.5)
    assert ok.all()
    near = 0.1 if name == "reference" else 1e-7  # its eps enters the norm
    assert error(Z[0], torch.diag(wanted[0])) <= near


# Accuracy


GRADIENTS = {
    "rank 8 of 128": low_rank(128, 128, 8),
    "rank 1 of 128": low_rank(128, 384, 1),
    "rank 64 of 384": low_rank(384, 384, 64),
    "full rank, wide": gaussian(64, 256),
    "square": gaussian(96, 96),
    "one by one": gaussian(1, 7),
    "two by two": gaussian(2, 2),
    "orthogonal rows (clustered)": torch.linalg.qr(gaussian(64, 64, dtype=torch.float64))[0].float(),
    "1e-12": gaussian(48, 96) * 1e-12,
    "1e-18": low_rank(64, 96, 8) * 1e-18,
    "1e15": low_rank(64, 96, 8) * 1e15,
    "1e18": gaussian(32, 64) * 1e18,
}


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("name", DAMPED)
def test_first_step_is_near_exact(name: str, case: str):
    G = GRADIENTS[case]
    A = G @ G.T
    Z, ok = ROOTS[name](A[None], EPS)
    assert ok.tolist() == [True]
    assert Z.dtype == A.dtype
    assert Z.shape == (1, *A.shape)
    scale = G.abs().max()  # keeps the check itself in range
    assert error(Z[0].double() * scale, exact_root(A, EPS) * scale, G / scale) <= BOUND[name]


@pytest.mark.parametrize(("m", "n"), [(64, 64), (64, 192), (128, 128), (128, 384)])
@pytest.mark.parametrize("name", DAMPED)
def test_training_like_statistics_are_near_exact(name: str, m: int, n: int):
    V, M = drifting(m, n, steps=30)
    Z, ok = ROOTS[name](V[None], EPS)
    assert ok.all()
    assert error(Z[0], exact_root(V, EPS), M) <= BOUND[name]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", DAMPED)
def test_spectra_at_the_floor_of_float32_stay_close(name: str, steps: int):
    """Half of these eigenvalues lie below eps: harder than the measured gradients, so half as exact."""
    V, M = drifting(128, 128, steps)
    Z, ok = ROOTS[name](V[None], EPS)
    assert ok.all()
    assert error(Z[0], exact_root(V, EPS), M) <= 2 * BOUND[name]


@pytest.mark.parametrize(("name", "bound"), [("eigh", 1e-8), ("eigh64", 1e-8), ("minimax", 1e-7), ("auto", 1e-8)])
@pytest.mark.parametrize("eps", [1e-3, 1e-6, 1e-8])
def test_float64_statistics_get_float64_roots(name: str, bound: float, eps: float):
    spectra = [torch.logspace(0, -7, 40), torch.ones(16), torch.cat([torch.ones(8), torch.zeros(16)])]
    for A in map(with_spectrum, spectra):
        Z, ok = ROOTS[name](A[None], eps)
        assert Z.dtype == torch.float64
        assert ok.all()
        assert error(Z[0], exact_root(A, eps)) <= bound


@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_minimax_keeps_its_error_at_every_damping(eps: float):
    A = with_spectrum(torch.logspace(0, -3, 64)).float()
    Z, ok = minimax(A[None], eps)
    assert ok.all()
    assert error(Z[0], exact_root(A, eps)) <= 2 * (TOLERANCE[torch.float32] + U * eps**-0.5)


def test_large_damping_is_exact_too():
    A = gaussian(16, 16, dtype=torch.float64)
    A = A @ A.T
    for eps in (0.1, 0.5, 1.0, 10.0):
        for name in DAMPED:
            assert error(ROOTS[name](A[None], eps)[0][0], exact_root(A, eps)) <= 1e-7


def test_outside_is_the_theory_form():
    A = with_spectrum(torch.tensor([4.0, 1.0, 0.25, 0.0]))
    Z, ok = outside(A[None], 0.5)
    exact = torch.linalg.inv(with_spectrum(torch.tensor([2.0, 1.0, 0.5, 0.0])) + 0.5 * torch.eye(4))
    assert ok.all()
    assert error(Z[0], exact) <= 1e-7
    scaled = outside(1e20 * A[None], 0.5e10)[0][0]  # homogeneous only with eps scaled along: it is absolute
    assert error(scaled * 1e10, exact) <= 1e-7
    floor = RESOLUTION * torch.finfo(torch.float32).eps * A.norm().item()
    assert error(outside(A.float()[None], 0.5)[0][0], exact) <= 2 * math.sqrt(floor) / 0.5  # of a singular A


@pytest.mark.parametrize("name", ["outside", "inside"])
@pytest.mark.parametrize("power", [-30, 0, 30])
@pytest.mark.parametrize("steps", [1, 30, 300])
def test_absolute_damping_is_never_below_what_the_statistic_resolves(name: str, power: int, steps: int):
    """Damping far below the rounding of a float32 sum: no step is longer than `eigen.RESOLUTION` says."""
    basis = torch.linalg.qr(gaussian(24, 6, dtype=torch.float64))[0]
    kept, exact = torch.zeros(24, 24), torch.zeros(24, 24, dtype=torch.float64)
    for step in range(steps):
        G = basis * torch.logspace(0, -3, 6) @ gaussian(6, 32, seed=step, dtype=torch.float64) * 2.0**power
        kept, exact = kept + G.float() @ G.float().T, exact + G @ G.T
    Z, ok = ROOTS[name](kept[None], 1e-12)
    noise = torch.linalg.matrix_norm(kept.double() - exact, 2)
    floor = RESOLUTION * torch.finfo(torch.float32).eps * kept.double().norm()
    assert ok.all()
    assert torch.linalg.matrix_norm(Z[0].double() @ G.float().double(), 2) <= (1 + noise / floor).sqrt() * (1 + 1e-3)
    assert Z.abs().max() <= floor**-0.5 * (1 + 1e-3)


@pytest.mark.parametrize("name", sorted(FORMULAS.keys() - {"reference"}))
def test_what_a_statistic_resolves_is_damped_as_the_formula_says(name: str):
    values = torch.logspace(0, -5, 6, dtype=torch.float64)
    Z, ok = ROOTS[name](torch.diag(values).float()[None], 1e-3)
    assert ok.all()
    torch.testing.assert_close(Z[0].diagonal(), FORMULAS[name](values, 1e-3).float(), rtol=4 * U, atol=0)


# Laws


@pytest.mark.usefixtures("repeatable_lapack")
@pytest.mark.parametrize("name", [*DAMPED, "auto"])
@pytest.mark.parametrize("power", [-100, -60, 20, 100])
def test_scale_invariance_is_bitwise(name: str, power: int):
    """A root scales as A^(-1/2); powers of four are exact in floating point, so every bit must agree."""
    G = low_rank(32, 48, 8)
    A = (G @ G.T)[None]
    assert torch.equal(ROOTS[name](A * 2.0**power, EPS)[0] * 2.0 ** (power // 2), ROOTS[name](A, EPS)[0])


def rounding_of_a_root(name: str, A: Tensor, eps: float) -> float:
    """A bound on the relative change of a float64 root where A is computed or decomposed anew, twice over."""
    unit = len(A) * torch.finfo(torch.float64).eps
    if name == "outside":  # the least eigenvalues are 0 or anything below unit ||A||: their roots, over eps
        return 2 * math.sqrt(unit * A.norm().item()) / eps
    if name == "reference":  # in float32
        return 2 * len(A) * U * 10
    return unit / eps + (0 if "eigh" in name else 2 * TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", [*DAMPED, "outside", "reference"])
@settings(max_examples=15, deadline=None)
@given(b=st.integers(0, 5), k=st.integers(0, 20), rank=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_a_stack_equals_each_matrix_alone(name: str, b: int, k: int, rank: int, seed: int):
    G = gaussian(b, k, rank, seed=seed, dtype=torch.float64)
    A = G @ G.mT + (torch.eye(k, dtype=torch.float64) if name == "reference" else 0)
    Z, ok = ROOTS[name](A, 1e-3)
    assert Z.shape == A.shape
    assert ok.shape == (b,)
    assert ok.dtype == torch.bool
    assert ok.all()
    for i in range(b):
        alone = ROOTS[name](A[i : i + 1], 1e-3)[0][0]
        assert (Z[i] - alone).norm() <= rounding_of_a_root(name, A[i], 1e-3) * alone.norm()


@pytest.mark.parametrize("name", [*DAMPED, "outside"])
@settings(max_examples=15, deadline=None)
@given(k=st.integers(1, 16), rank=st.integers(1, 16), seed=st.integers(0, 10**6))
def test_rotation(name: str, k: int, rank: int, seed: int):
    G = gaussian(k, rank, seed=seed, dtype=torch.float64)
    turn = torch.linalg.qr(gaussian(k, k, seed=seed + 1, dtype=torch.float64))[0]
    plain = ROOTS[name]((G @ G.T)[None], 1e-3)[0][0]
    turned = ROOTS[name]((turn @ G @ G.T @ turn.T)[None], 1e-3)[0][0]
    assert error(turned, turn @ plain @ turn.T) <= rounding_of_a_root(name, G @ G.T, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_one_decomposition_gives_the_inverse_root_and_the_root(dtype: torch.dtype, threads: int):
    """The root has no damping: up to 40 roundings each of A and of its decomposition."""
    A = torch.stack([with_spectrum(torch.logspace(0, -9, 40), seed=seed) for seed in range(5)]).to(dtype)
    A[1], A[2, 3, 4], A[3] = 0, math.nan, torch.ldexp(A[3], torch.tensor(80))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (Z, S, ok), (wanted, _) = eigh_with_root(A, EPS), eigh(A, EPS)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(Z, wanted)
    assert ok.tolist() == [True, True, False, True, True]
    assert torch.equal(S, S.mT)
    assert not S[1].any()
    assert not S[2].any()
    for root, matrix in zip(S[[0, 3, 4]].double(), A[[0, 3, 4]].double(), strict=True):
        assert (root @ root - matrix).norm() < 80 * torch.finfo(dtype).eps * matrix.norm()


@pytest.mark.parametrize("name", ["eigh", "eigh64", "outside"])
def test_roots_by_eigh_are_symmetric(name: str):
    Z = ROOTS[name](drifting(64, 64, 5)[0][None], EPS)[0][0]
    assert torch.equal(Z, Z.T)


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_stacks(name: str, shape: tuple[int, int, int], dtype: torch.dtype):
    Z, ok = ROOTS[name](torch.zeros(shape, dtype=dtype), LEAST_EPS[name])
    assert Z.shape == shape
    assert Z.dtype == dtype
    assert ok.shape == shape[:1]
    assert ok.all()


@pytest.mark.parametrize("name", sorted(ROOTS.keys() - {"reference"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_matrix_fails_alone(name: str, dtype: torch.dtype):
    good = GRADIENTS["full rank, wide"].to(dtype)
    good = good @ good.T
    stack = good.repeat(6, 1, 1)
    stack[1] = 0
    stack[2, 3, 5] = math.nan
    stack[3, 7, 7] = math.inf
    stack[4, 0, 1] = -math.inf
    before = stack.clone()
    Z, ok = ROOTS[name](stack, LEAST_EPS[name])
    assert ok.tolist() == [True, True, False, False, False, True]
    assert Z.isfinite().all()
    assert not Z[1:5].any()
    torch.testing.assert_close(Z[[0, 5]], ROOTS[name](good.repeat(2, 1, 1), LEAST_EPS[name])[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stack, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probe_tells_a_diverged_iteration(dtype: torch.dtype):
    """An indefinite matrix is outside the basin; eigh clamps, the products cannot."""
    good = with_spectrum(torch.linspace(0.1, 1, 32))
    bad = [with_spectrum(torch.cat([torch.linspace(0.1, 1, 31), torch.tensor([low])])) for low in (-0.1, -1e-3)]
    Z, ok = minimax(torch.stack([good, *bad]).to(dtype), EPS)
    assert ok.tolist() == [True, False, False]
    assert not Z[1:].any()
    assert error(Z[0], exact_root(good, EPS)) <= BOUND["minimax"]


@pytest.mark.parametrize("eps", [1e-7, 1e-8, 1e-9])
def test_with_damping_below_the_floor_of_float32_a_root_is_near_or_has_failed(eps: float):
    """The smallest eigenvalues of a singular float32 statistic are noise of either sign, here above eps."""
    G = GRADIENTS["rank 8 of 128"]
    A = G @ G.T
    Z, ok = minimax(A[None], eps)
    assert not ok or error(Z[0], exact_root(A, eps), G) <= PROBE_TOLERANCE
    assert minimax(A.double()[None], 1e-6)[1].item()


def test_undamped_eigh_of_a_singular_matrix_fails():
    A = torch.stack([torch.diag(torch.tensor([1.0, 0.0])), torch.eye(2)])
    Z, ok = eigh(A, 0.0)
    assert ok.tolist() == [False, True]
    torch.testing.assert_close(Z[1], torch.eye(2))


@pytest.mark.parametrize("fails_in_float64", [False, True])
def test_eigh_falls_back_per_matrix(monkeypatch: pytest.MonkeyPatch, fails_in_float64: bool):
    """LAPACK gives up on a stack where one matrix is marked, in float32 or in both precisions."""
    good = torch.diag(torch.tensor([1.0, 0.5]))
    marked = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    exact = [exact_root(A, EPS) for A in (good, marked, good)]
    solve = torch.linalg.eigh
    calls = []

    def stubborn(A: Tensor) -> tuple[Tensor, Tensor]:
        calls.append((A.dtype, len(A)))
        marked = (A[:, 0, 1] > 0.9).any()
        if marked and (A.dtype == torch.float32 or fails_in_float64):
            raise torch.linalg.LinAlgError(  # pyright: ignore[reportPrivateImportUsage]
                "did not converge"
            )
        return solve(A)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    Z, ok = eigh(torch.stack([good, marked, good]), EPS)
    assert ok.tolist() == [True, not fails_in_float64, True]
    for i in range(3):
        assert error(Z[i], exact[i]) <= 1e-5 if ok[i] else not Z[i].any()
    assert calls[:2] == [(torch.float32, 3), (torch.float64, 3)]
    assert calls[2:] == ([(torch.float64, 1)] * 3 if fails_in_float64 else [])


# Surroundings


@pytest.mark.parametrize("name", ROOTS)
def test_the_random_state_is_untouched(name: str):
    before = torch.get_rng_state()
    ROOTS[name](GRADIENTS["square"][None] @ GRADIENTS["square"].T, LEAST_EPS[name])
    assert torch.equal(torch.get_rng_state(), before)


def settings_now() -> list[str]:
    return [part.fp32_precision for part in (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)]


@pytest.mark.usefixtures("repeatable_lapack")
@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("chosen", ["high", "medium", "highest"])
@pytest.mark.usefixtures("precision")
def test_matmul_precision_neither_matters_nor_changes(name: str, chosen: str):
    G = GRADIENTS["rank 8 of 128"]
    A = (G @ G.T)[None]
    plain = ROOTS[name](A, LEAST_EPS[name])[0]
    torch.set_float32_matmul_precision(chosen)
    before = settings_now()
    assert torch.equal(ROOTS[name](A, LEAST_EPS[name])[0], plain)
    assert settings_now() == before
    assert torch.get_float32_matmul_precision() == chosen


@pytest.mark.usefixtures("precision")
def test_inherited_precision_stays_inherited():
    BACKENDS.fp32_precision = "tf32"
    minimax(torch.eye(4)[None], EPS)
    assert settings_now() == ["tf32"] * 3
    BACKENDS.fp32_precision = "ieee"
    assert settings_now() == ["ieee"] * 3


@pytest.mark.usefixtures("precision")
def test_precision_is_restored_after_an_error():
    torch.set_float32_matmul_precision("high")
    before = settings_now()
    with pytest.raises(RuntimeError), exact_matmul(torch.device("cpu")):
        torch.linalg.cholesky(-torch.eye(2))
    assert settings_now() == before


@pytest.mark.usefixtures("repeatable_lapack")
@pytest.mark.parametrize("name", ROOTS)
def test_autocast_does_not_matter(name: str):
    A = (GRADIENTS["square"] @ GRADIENTS["square"].T)[None]
    plain = ROOTS[name](A, LEAST_EPS[name])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Z = ROOTS[name](A, LEAST_EPS[name])[0]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(Z, plain)


@pytest.mark.usefixtures("repeatable_lapack")
def test_auto_on_cpu_goes_by_size_and_precision():
    A = drifting(160, 160, 3)[0][None]
    assert torch.equal(auto(A[:, :64, :64], EPS)[0], minimax(A[:, :64, :64], EPS)[0])
    assert torch.equal(auto(A[:, :64, :64].double(), EPS)[0], eigh(A[:, :64, :64].double(), EPS)[0])
    assert torch.equal(auto(A, EPS)[0], eigh(A, EPS)[0])
    assert torch.equal(eigh64(A.double(), EPS)[0], eigh(A.double(), EPS)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("precision")
def test_minimax_in_a_cuda_graph():
    V, M = drifting(128, 384, 10)
    A = torch.stack([V, torch.zeros_like(V), torch.full_like(V, math.nan)]).cuda()
    plain = minimax(A, EPS)[0]
    torch.set_float32_matmul_precision("high")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert minimax(A, EPS)[0].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        Z, ok = minimax(A, EPS)
    graph.replay()
    assert ok.tolist() == [True, True, False]
    assert error(Z[0].cpu(), exact_root(V, EPS), M) <= BOUND["minimax"]
    torch.testing.assert_close(Z, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())
    torch.testing.assert_close(auto(A, EPS)[0], plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


# What a lower precision would cost: the table of asgo.linalg.matmul


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 bits of mantissa."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def test_a_coarse_direction_or_statistic_costs_what_the_table_says():
    """bfloat16 keeps 3 bits less than TF32, so it costs 8 times as much."""
    V, M = drifting(128, 128, 30)
    exact = exact_root(V, EPS)
    G = low_rank(128, 128, 16) + 0.03 * gaussian(128, 128, seed=5)
    right = exact_root(G.double() @ G.double().T, EPS)
    direction, statistic = {}, {}
    for kind in (tf32, bf16):
        U = kind(exact.float()) @ kind(M)
        direction[kind] = ((U - exact @ M.double()).norm() / (exact @ M.double()).norm()).item()
        statistic[kind] = error(exact_root(kind(G) @ kind(G).T, EPS), right, G)
    for cost in (direction, statistic):
        assert cost[tf32] <= 1.5e-2
        assert 4 <= cost[bf16] / cost[tf32] <= 16


@pytest.mark.parametrize("rounded", [tf32, bf16])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_the_probe_tells_a_root_that_coarse_products_spoil(monkeypatch: pytest.MonkeyPatch, rounded: Any, eps: float):
    def coarse(C: Tensor, A: Tensor, B: Tensor, c: float, ab: float, precision: str = "ieee") -> Tensor:
        return torch.baddbmm(C, rounded(A), rounded(B), beta=c, alpha=ab)

    V, M = drifting(128, 128, 30)
    monkeypatch.setattr("asgo.linalg.polynomial.baddbmm", coarse)
    Z, ok = minimax(V[None], eps)
    assert not ok or error(Z[0], exact_root(V, eps), M) <= PROBE_TOLERANCE


def test_one_product_in_float64_lowers_the_rounding_error(monkeypatch: pytest.MonkeyPatch):
    """What is left once the error of the schedule, the same in float64, is taken off."""
    V, _ = drifting(128, 128, 20)
    wide = []
    spied = minimax_module.baddbmm

    def spy(C: Tensor, A: Tensor, B: Tensor, c: float, ab: float, precision: str = "ieee") -> Tensor:
        wide.append(precision == "double")
        return spied(C, A, B, c, ab, precision)

    monkeypatch.setitem(TOLERANCE, torch.float64, TOLERANCE[torch.float32])
    exact = minimax(V.double()[None], EPS)[0][0]
    monkeypatch.setattr("asgo.linalg.polynomial.baddbmm", spy)
    errors = {}
    for fast in (True, False):
        wide.clear()
        monkeypatch.setattr("asgo.linalg.polynomial.has_fast_double", lambda device, fast=fast: fast)
        errors[fast] = error(minimax(V[None], EPS)[0][0], exact)
        assert sum(wide) == fast
        assert not fast or wide.index(True) == 1  # the first product that makes Y, after the bracket
    assert errors[True] < errors[False]


# Cost and names


def counted_products(name: str, k: int, dtype: torch.dtype = torch.float32) -> float:
    with FlopCounterMode(display=False) as counter:
        ROOTS[name](torch.eye(k, dtype=dtype)[None], EPS)
    return counter.get_total_flops() / (2 * k**3)


def test_minimax_costs_21_products():
    assert products("minimax", EPS) == 21
    assert 21 <= counted_products("minimax", 256) < 21.2  # the probe is 32 columns: 32/256 of a product
    assert 29 <= counted_products("minimax", 256, torch.float64) < 29.2


def test_products():
    assert products("reference", 1e-10) == 40 == counted_products("reference", 16)
    assert products("eigh", EPS) == products("auto", EPS) == 6.5
    assert products("eigh64", EPS) == products("outside", EPS) == 13
    assert products("auto", EPS, "cuda") == products("minimax", EPS)
    assert products("minimax", 1e-7) == 25


@pytest.mark.parametrize("look_up", [resolve, lambda name: products(name, EPS)])
def test_unknown_names(look_up):
    with pytest.raises(ValueError, match=r"^root 'eihg' is unknown: choose one of 'auto', 'eigh', .*'reference'$"):
        look_up("eihg")


def test_resolve():
    assert all(resolve(name) is root for name, root in ROOTS.items())


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("A", [torch.eye(3), torch.zeros(2, 3, 4), torch.eye(3).bfloat16()[None]])
def test_wrong_stacks_are_refused(name: str, A: Tensor):
    with pytest.raises(ValueError, match=r"^root got torch\..* of shape \(.*\): it takes float32 or float64 of shape"):
        ROOTS[name](A, LEAST_EPS[name])


# The released iteration


def test_reference_on_a_well_conditioned_matrix_is_the_inverse_square_root():
    A = with_spectrum(torch.linspace(0.3, 1, 24)).float()
    values, vectors = torch.linalg.eigh(A.double())
    assert error(reference(A[None], 1e-10)[0][0], vectors @ torch.diag(values**-0.5) @ vectors.T) <= 1e-5


def test_reference_acts_on_eigenvalues_as_released():
    """The same chain on scalars: the product of the steps' multipliers, normalised by ||A + eps I||_F."""
    released = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ]
    values = torch.logspace(0, -5, 24, dtype=torch.float64)
    eps = 0.01
    norm = 1.01 * (values + eps).norm()
    z = torch.ones_like(values)
    for step in range(10):
        a, b, c = released[step] if step < 7 else (1.875, -1.25, 0.375)
        cushion = 1.01 if step < 7 else 1.0
        t = values / norm * z**2
        z = z * (a / cushion + b * t / cushion**3 + c * t**2 / cushion**5)
    A = with_spectrum(values)
    vectors = torch.linalg.qr(gaussian(24, 24, dtype=torch.float64))[0]
    exact = (vectors * (z / norm.sqrt())) @ vectors.T
    assert error(reference(A.float()[None], eps)[0][0], exact) <= 1e-3
    assert reference(A[None], eps)[0].dtype == torch.float64


def test_reference_replaces_what_is_not_finite_by_the_identity():
    stack = torch.eye(3).repeat(3, 1, 1)
    stack[1, 0, 0] = math.nan
    stack[2] = 0
    Z, ok = reference(stack, 0.0)
    assert ok.all()
    assert torch.equal(Z[1], torch.eye(3))
    assert torch.equal(Z[2], torch.eye(3))
    torch.testing.assert_close(Z[0], torch.eye(3), rtol=1e-5, atol=1e-5)
