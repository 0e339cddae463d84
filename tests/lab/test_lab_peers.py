"""The peers of a comparison: each against its formula in float64, and torch's own class on the same matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

from asgo.lab.config.runs import ModelConfig, OptimizerConfig
from asgo.lab.errors import LabError
from asgo.lab.models.language import build_model
from asgo.lab.optimizers.momenta import MomentaASGO, decays
from asgo.lab.optimizers.muon import COEFFICIENTS, Muon
from asgo.lab.optimizers.registry import build_optimizer
from asgo.lab.optimizers.slices import Sliced
from asgo.lab.optimizers.soap import SOAP, AveragedShampoo
from asgo.presets import ASGO
from asgo.views import View

LR, DECAY = 0.1, 0.5
SHAPES = [(3, 5), (5, 3), (4, 4)]


def stream(shape, steps=6, seed=0):
    return list(np.random.default_rng(seed).standard_normal((steps, *shape)))


def train(make, grads, prior=()):
    """The weights after a step for each gradient, from one and with decay; `prior` are statistics at the start."""
    param = nn.Parameter(torch.ones(grads[0].shape, dtype=torch.float64))
    optimizer = make([{"params": [param], "view": "m n -> 1 m n"}])
    for key, A in zip(("left", "right"), prior, strict=False):
        if optimizer.state[param][key].numel():
            optimizer.state[param][key].copy_(torch.from_numpy(A))
    seen = []
    for grad in grads:
        param.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        seen.append(param.detach().numpy().copy())
    return seen


def descend(grads, direction, b1=0.9, nesterov=False, size_of=None):
    """The same in numpy: momentum, ``direction(D, G)``, and steps with a root mean square of 0.2."""
    W, M = np.ones(grads[0].shape), np.zeros(grads[0].shape)
    seen = []
    for G in grads:
        M = b1 * M + (1 - b1) * G
        U = direction(b1 * M + (1 - b1) * G if nesterov else M, G)
        size = size_of(U) if size_of else np.sqrt(W.size) / np.linalg.norm(U)
        W = (1 - LR * DECAY) * W - LR * 0.2 * size * U
        seen.append(W)
    return seen


def newton_schulz(D):
    a, b, c = COEFFICIENTS[0]
    X = D / np.linalg.norm(D)
    for _ in COEFFICIENTS:
        R = X @ X.T
        X = a * X + (b * R + c * R @ R) @ X
    return X


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize("second_moment", ["none", "row", "element"])
def test_muon_and_its_second_moments(shape, second_moment, sign):
    memory = np.zeros(shape)

    def direction(D, G):
        nonlocal memory
        O = newton_schulz(np.sign(D) if sign else D)
        if second_moment == "none":
            return O
        square = O**2 if second_moment == "element" else np.broadcast_to((O**2).mean(1, keepdims=True), shape)
        memory = 0.8 * memory + 0.2 * square
        return O / (np.sqrt(memory) + 1e-8)

    grads = stream(shape)
    got = train(lambda p: Muon(p, LR, 0.9, 0.8, DECAY, second_moment=second_moment, sign=sign), grads)
    size_of = (lambda U: np.sqrt(max(U.shape))) if second_moment == "none" else None
    np.testing.assert_allclose(got, descend(grads, direction, nesterov=True, size_of=size_of), rtol=1e-9)


def prior(shape):
    """Statistics without equal eigenvalues: one gradient alone leaves the basis of its null space open."""
    return [np.diag(np.arange(1.0, k + 1)) for k in shape]


class Basis:
    """SOAP of one matrix, as its paper writes it: Adam in the basis, then the statistics, then the basis."""

    def __init__(self, shape, sides, b2=0.8):
        m, n = shape
        has = (True, True) if sides == "both" else (m < n, m >= n)
        self.A = [A if here else None for A, here in zip(prior(shape), has, strict=True)]
        self.Q, self.v, self.b2, self.fresh = [np.eye(m), np.eye(n)], np.zeros(shape), b2, True

    def __call__(self, D, G):
        L, R = self.Q
        self.v = self.b2 * self.v + (1 - self.b2) * (L.T @ G @ R) ** 2
        U = L @ ((L.T @ D @ R) / (np.sqrt(self.v) + 1e-8)) @ R.T
        for i, seen in enumerate((G @ G.T, G.T @ G)):
            if self.A[i] is not None:
                self.A[i] = self.b2 * self.A[i] + (1 - self.b2) * seen
                self._turn(i)
        self.fresh = False
        return U

    def _turn(self, i):
        A, Q = self.A[i], self.Q[i]
        order = np.argsort(-np.diag(Q.T @ A @ Q), kind="stable")
        self.v = np.take(self.v, order, axis=i)
        self.Q[i] = np.linalg.eigh(A)[1][:, ::-1] if self.fresh else np.linalg.qr(A @ Q[:, order])[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["both", "short"])
def test_soap(shape, sides):
    grads = stream(shape, steps=8)
    got = train(lambda p: SOAP(p, LR, (0.9, 0.8), DECAY, 1, sides), grads, prior(shape))
    np.testing.assert_allclose(got, descend(grads, Basis(shape, sides)), rtol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["both", "short"])
@pytest.mark.parametrize(("power", "cut"), [(None, False), (0.5, False), (0.3, True)])
@pytest.mark.parametrize("statistic", ["gradient", "momentum"])
def test_averaged_shampoo(shape, sides, power, cut, statistic):
    """With an eps so large that the cut leaves out directions and damping shows."""
    eps, (m, n) = 0.05, shape
    A = [np.zeros((m, m)), np.zeros((n, n))]
    has = (True, True) if sides == "both" else (m < n, m >= n)
    p = power or (0.25 if sides == "both" else 0.5)

    def root(V):
        values, Q = np.linalg.eigh(V)
        least = eps * values.max()
        weights = np.where(values > least, np.maximum(values, least) ** -p, 0) if cut else (values + least) ** -p
        return (Q * weights) @ Q.T

    def direction(D, G):
        S = D if statistic == "momentum" else G
        for i, seen in enumerate((S @ S.T, S.T @ S)):
            A[i] = 0.8 * A[i] + 0.2 * seen
        U = root(A[0]) @ D if has[0] else D
        return U @ root(A[1]) if has[1] else U

    grads = stream(shape, steps=8)
    got = train(
        lambda q: AveragedShampoo(q, LR, (0.9, 0.8), eps, DECAY, 1, sides, power, cut, statistic=statistic), grads
    )
    np.testing.assert_allclose(got, descend(grads, direction), rtol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_sided_averages_with_asgos_choices_are_asgo(shape):
    """With a damping that does not show."""
    grads = stream(shape)
    asgo = train(lambda p: ASGO(p, LR, (0.9, 0.2), 1e-13, DECAY), grads)
    options = {"sides": "short", "cross_normalize": True, "nesterov": True, "statistic": "momentum"}
    got = train(lambda p: AveragedShampoo(p, LR, (0.9, 0.2), 1e-13, DECAY, 1, **options), grads)
    np.testing.assert_allclose(got, asgo, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("root", ["auto", "square_root"])
def test_asgo_with_a_second_moment_of_every_entry(shape, root):
    """The average starts at the first result, as its bias is corrected."""
    (m, n), V, v, t = shape, 0.0, np.zeros(shape), 0

    def direction(D, G):
        nonlocal V, v, t
        V, t = 0.2 * V + 0.8 * (D @ D.T if m < n else D.T @ D), t + 1
        values, Q = np.linalg.eigh(V)
        Z = (Q * values**-0.5) @ Q.T
        U = Z @ D if m < n else D @ Z
        v = 0.95 * v + 0.05 * U**2
        return U / np.sqrt(v / (1 - 0.95**t))

    grads = stream(shape)
    options = {"cross_normalize": "element", "root": root, "eps": 1e-13}
    got = train(lambda p: ASGO(p, LR, (0.9, 0.2), weight_decay=DECAY, **options), grads)
    np.testing.assert_allclose(got, descend(grads, direction, nesterov=True), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("root", ["auto", "square_root"])
@pytest.mark.parametrize("momenta", [2, 3])
def test_several_momenta(shape, root, momenta):
    """Ages from 10 / 4 to 10 times 4; each looks ahead as Nesterov's, divided by the weight of what it has seen."""
    rates = {2: (0.6, 0.975), 3: (0.6, 0.9, 0.975)}[momenta]
    np.testing.assert_allclose(decays(0.9, momenta, 4.0), rates)
    (m, n), V, seen = shape, 0.0, []

    def direction(_, G):
        nonlocal V
        seen.append(G)
        D = 0.0
        for b in rates:
            weights = [(1 - b) * b ** (len(seen) - i) for i in range(len(seen))]
            weights[-1] += 1 - b
            D = D + sum(w * g for w, g in zip(weights, seen, strict=True)) / sum(weights) / momenta
        V = 0.2 * V + 0.8 * (D @ D.T if m < n else D.T @ D)
        values, Q = np.linalg.eigh(V)
        Z = (Q * values**-0.5) @ Q.T
        return Z @ D if m < n else D @ Z

    grads = stream(shape)
    options = {"momenta": momenta, "spread": 4.0, "cross_normalize": False, "root": root}
    got = train(lambda p: MomentaASGO(p, LR, (0.9, 0.2), 1e-13, DECAY, **options), grads)
    np.testing.assert_allclose(got, descend(grads, direction), rtol=1e-5)


# ---- classes of other libraries -----------------------------------------------------------------------


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_is_torch_muon_on_the_same_matrices():
    """Up to the rounding of torch's bfloat16: updates differ by a few percent, the fused form's by far more."""
    starts, ends = {}, {}
    for name in ("muon", "torch-muon", "torch-muon-fused"):
        model = build_model(ModelConfig(preset="tiny"), 50, 8, 0)
        starts[name] = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01, adamw_lr=0.002))
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        ends[name] = model.state_dict()
    for key in ends["muon"]:
        ours, theirs, fused = (ends[name][key] - starts[name][key] for name in ends)
        if theirs.norm():
            assert (ours - theirs).norm() < 0.03 * theirs.norm(), key
        if "c_attn.weight" in key:
            assert (fused - theirs).norm() > 0.1 * theirs.norm()


VIEWS = [
    (View("n m -> 1 m n", split=(4, 4, 2), split_dim=1), (6, 10)),
    (View("e m n -> e m n"), (3, 4, 5)),
    (View("(h d) n -> h d n", {"d": 2}), (8, 5)),
    (View("(d h) n -> h n d", {"d": 2}), (8, 5)),
]


@pytest.mark.parametrize(("view", "shape"), VIEWS, ids=str)
def test_matrices_of_a_view_are_parameters_of_the_inner_optimizer(view, shape):
    """SGD of every matrix is SGD of the whole, whether a matrix can share its memory or not; state survives."""

    def sgd(params):
        return SGD(params, 0.1, momentum=0.9)

    torch.manual_seed(0)
    whole, twin = nn.Parameter(torch.randn(shape)), None
    twin = nn.Parameter(whole.detach().clone())
    kinds = [sgd([whole]), Sliced(sgd, [("w", twin)], [view])]
    inner = kinds[1].inner
    assert inner.param_groups[0]["param_names"][0] == "w#0"
    assert all(x.ndim == 2 for x in inner.param_groups[0]["params"])
    assert sum(x.numel() for x in inner.param_groups[0]["params"]) == whole.numel()
    for step in range(3):
        whole.grad = twin.grad = torch.randn(shape)
        if step == 2:
            again = Sliced(sgd, [("w", twin)], [view])
            again.load_state_dict(kinds[1].state_dict())
            kinds[1] = again
        for optimizer in kinds:
            optimizer.step()
    torch.testing.assert_close(twin, whole)
    kinds[1].zero_grad()
    assert twin.grad is None
    before = twin.detach().clone()
    kinds[1].step()
    assert torch.equal(twin, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Muon(p, second_moment="rows"), "second_moment must be one of 'none', 'row', 'element'; got 'rows'"),
        (lambda p: SOAP(p, sides="left"), "SOAP: sides must be one of 'both', 'short'; got 'left'"),
        (lambda p: AveragedShampoo(p, power=2.0), r"power must be None or a number in \(0, 1\]; got 2.0"),
        (lambda p: Muon(p, momentum=1.0), "betas must be"),
        (lambda p: MomentaASGO(p, momenta=1), "momenta must be a whole number >= 2; got 1"),
        (lambda p: MomentaASGO(p, spread=1.0), "spread must be a finite number > 1; got 1.0"),
    ],
)
def test_what_the_peers_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.ones(2, 2))])


@pytest.mark.parametrize("name", ["asgo", "muon", "soap", "momenta-asgo"])
def test_betas_of_the_adamw_part(name):
    model = build_model(ModelConfig(preset="tiny"), 11, 16, 0)
    found = build_optimizer(model, OptimizerConfig(name=name, options=("adamw_betas=0.7/0.99",)))
    betas = {group["betas"] for group in found.param_groups if not any(group["views"])}
    assert betas == {(0.7, 0.99)}
    with pytest.raises(LabError, match="betas must be"):
        build_optimizer(model, OptimizerConfig(name=name, options=("adamw_betas=0.9",)))
