"""How long a step takes: each form and peer in turns with `torch.optim.Muon`, on the shapes of four models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.gpu.device import PRECISIONS, Device, Precision
from benchmarks.gpu.forms import FORMS, Form, Layout, interval_of, unavailable
from benchmarks.gpu.part import Part
from benchmarks.gpu.peers import MUON, MUON_STEPS, PEERS, Peer, Steps, muon, state_bytes
from benchmarks.gpu.record import describe
from benchmarks.gpu.shapes import MODELS, TINY, Workload

ROUNDS, WARM = 4, 3
REFRESHING = 11
"""Steps before the first round where roots are refreshed more rarely: the first ten refresh all of them."""
SLOW = 1.0
"""Seconds; a step that takes longer is timed once, the second one."""
PATIENCE = 4.0
"""Seconds; where the first step takes longer there is no second one."""


@dataclass
class Scene:
    """A model under way.

    Args:
        name: of the model.
        part: the part.
        workload: its parameters.
        rival: Muon on them.
    """

    name: str
    part: Part
    workload: Workload
    rival: Steps = field(init=False)

    def __post_init__(self) -> None:
        self.rival = muon(self.workload)
        self.workload.draw(0)
        for _ in range(WARM):
            self.rival.step()

    @property
    def rounds(self) -> int:
        """Rounds of four turns for each row."""
        return 1 if self.part.tiny else ROUNDS

    def excluded(self, form: Form) -> str | None:
        """Why a form is not measured on this model; None if it is."""
        known = self.part.record.known.items()
        if form.graph and any(row.endswith(f": {form.name}") and found["status"] == "failed" for row, found in known):
            return "its capture has failed before, which costs a process each time"
        return unavailable(form, self.part.device) or self.workload.same_layout(form.layout)

    def row(self, what: str) -> str:
        """The name of a row."""
        return f"{self.name}: {what}"


def run(part: Part) -> None:
    """All quick rows of every model, then those whose step waits for eigendecompositions, which can take seconds."""
    models = TINY if part.tiny else MODELS
    for slow in (False, True):
        for name, weights in models.items():
            forms = [form for form in FORMS if form.waits == slow]
            if part.left > 0 and any(part.wanted(f"{name}: {form.name}") for form in (*forms, *PEERS)):
                _model(Scene(name, part, Workload(weights, part.device)), forms, () if slow else PEERS)
            part.device.release()


def _model(scene: Scene, forms: Sequence[Form], peers: Sequence[Peer]) -> None:
    part = scene.part
    if peers:
        part.attempt(scene.row("products"), partial(_products, part, scene.workload))
        part.attempt(scene.row(MUON), partial(_rival, scene))
    for form in forms:
        why = scene.excluded(form)
        if why:
            part.skip(scene.row(form.name), why)
        else:
            part.attempt(scene.row(form.name), partial(_form, scene, form), fragile=form.graph)
        part.device.release()
    for peer in peers:
        why = peer.unavailable(scene.workload)
        if why:
            part.skip(scene.row(peer.name), why)
        else:
            part.attempt(scene.row(peer.name), partial(_peer, scene, peer))
        part.device.release()


# ---- the floor ----------------------------------------------------------------------------------------------------


def _products(part: Part, workload: Workload) -> Mapping[str, Any]:
    """For each layout and precision, seconds of one product ``k x k x k`` and one ``k x k x n`` of every matrix."""
    found: dict[str, Any] = {}
    layouts: tuple[Layout, ...] = ("fused", "heads")
    for layout in layouts:
        stacks = workload.stacks(layout)
        found[layout] = {precision: _rate_or_error(part.device, stacks, precision) for precision in PRECISIONS}
    cubes = sum(2.0 * count * k**3 for (k, _), count in workload.stacks("fused").items())
    rates = {name: cubes / seconds["square"] / 1e12 for name, seconds in found["fused"].items() if "square" in seconds}
    return {**found, "teraflops": rates, "matrices": sum(workload.stacks("fused").values())}


def _rate_or_error(device: Device, stacks: Mapping[tuple[int, int], int], precision: Precision) -> dict[str, Any]:
    """One precision that this torch cannot multiply in does not cost the others their row."""
    try:
        return dict(_rate(device, stacks, precision))
    except RuntimeError as error:
        return {"error": describe(error)}


def _rate(device: Device, stacks: Mapping[tuple[int, int], int], precision: Precision) -> dict[str, float]:
    total = {"square": 0.0, "wide": 0.0}
    with device.products(precision) as dtype:
        for (k, n), count in stacks.items():
            some = min(count, max(1, int(device.free_bytes() / 8 / (4 * k * n))))  # of equal ones, as many as fit
            square, wide = (torch.randn(some, k, size, device=device.torch).to(dtype) for size in (k, n))
            for kind, other in (("square", square), ("wide", wide)):
                total[kind] += count / some * _fastest(device, partial(torch.bmm, square, other))
    return total


def _fastest(device: Device, run: Callable[[], object]) -> float:
    run()
    return min(device.seconds(run) for _ in range(3))


def floor(form: Form, layout_products: Mapping[str, Any], precision: str) -> float | None:
    """The seconds that the products of a step take alone: those of the roots, the statistic and the direction."""
    seconds = layout_products[precision]
    if form.products is None or "square" not in seconds:
        return None
    return form.products / form.interval * seconds["square"] + 2 * seconds["wide"]


# ---- the rows -----------------------------------------------------------------------------------------------------


def _rival(scene: Scene) -> Mapping[str, Any]:
    """Muon alone; its floor is five times two wide products and a square one in bfloat16."""
    device = scene.part.device
    times = [device.seconds(scene.rival.step) for _ in range(2 * scene.rounds)]
    found = {**_summary(times), **_costs(scene, scene.rival, scene.rival.step)}
    known = scene.part.record.known.get(scene.row("products"), {}).get("fused")
    if known:
        found["floor"] = {
            name: MUON_STEPS * (seconds["square"] + 2 * seconds["wide"])
            for name, seconds in known.items()
            if "square" in seconds
        }
    return found


def _peer(scene: Scene, peer: Peer) -> Mapping[str, Any]:
    optimizer = peer.build(scene.workload)
    return _turns(scene, optimizer, optimizer.step, 1, WARM)


def stepper(scene: Scene, form: Form, warm: int) -> tuple[Any, Callable[[], object]]:
    """The optimizer of a form, and what makes a step of it: a replay after `warm` steps if it is captured."""
    optimizer = form.make(interval_of(form, scene.workload.groups(form.layout)))
    if form.graph:
        return optimizer, scene.part.device.capture(optimizer.step, warm, "relaxed")
    return optimizer, optimizer.step


def _form(scene: Scene, form: Form) -> Mapping[str, Any]:
    warm = REFRESHING if form.interval > 1 else WARM
    optimizer, act = stepper(scene, form, warm)
    found = dict(_turns(scene, optimizer, act, form.interval, warm))
    known = scene.part.record.known.get(scene.row("products"), {})
    products = known.get("heads" if form.layout == "heads" else "fused")
    if products:
        found["floor"] = {name: floor(form, products, name) for name in PRECISIONS}
    return found


def _turns(scene: Scene, optimizer: Any, act: Callable[[], object], interval: int, warm: int) -> Mapping[str, Any]:
    """Turns in the order A B B A with Muon as B: seconds, and their ratio to those beside them."""
    device, workload = scene.part.device, scene.workload
    workload.draw(0)
    cold = device.seconds(act)
    again = cold if cold > PATIENCE else device.seconds(act)
    if again > SLOW:
        return {"seconds": again, "note": "of one step", **_state(scene, optimizer)}
    for _ in range(warm - 2):
        act()
    turn = partial(_turn, device, act, interval)
    ours, theirs = [], []
    for number in range(scene.rounds):
        workload.draw(number)
        for mine, other in ((True, False), (False, True)):
            for is_mine in (mine, other):
                (ours if is_mine else theirs).append(turn() if is_mine else device.seconds(scene.rival.step))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    found = {**_summary(ours), "to_muon": median(ratios), "ratios": ratios, "muon": theirs}
    return {**found, **_costs(scene, optimizer, act, interval)}


def _turn(device: Device, act: Callable[[], object], interval: int) -> float:
    """Seconds of a step, the mean over an interval."""
    return sum(device.seconds(act) for _ in range(interval)) / interval


def _summary(times: Sequence[float]) -> dict[str, Any]:
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return {"seconds": middle, "low": low, "high": high, "times": list(times)}


def _costs(scene: Scene, optimizer: Any, act: Callable[[], object], interval: int = 1) -> dict[str, Any]:
    """State, and the most memory that a step takes beyond it."""
    peaks = [scene.part.device.peak_bytes(act) for _ in range(interval)]
    return {**_state(scene, optimizer), "peak_bytes": max((peak or 0) for peak in peaks)}


def _state(scene: Scene, optimizer: Any) -> dict[str, Any]:
    params = [*scene.workload.params, *scene.workload.grads]
    bytes_of_params = sum(param.numel() * param.element_size() for param in scene.workload.params)
    held = state_bytes(optimizer, params)
    return {"state_bytes": held, "state_share": held / bytes_of_params}
