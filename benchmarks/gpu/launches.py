"""Kernels that a step launches, and how long they take: a part of its own, as profiling slows what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from typing import Any

from benchmarks.gpu.forms import FORMS, Form
from benchmarks.gpu.part import Part
from benchmarks.gpu.peers import MUON, PEERS, Peer
from benchmarks.gpu.shapes import MODELS, TINY, Workload
from benchmarks.gpu.speed import Scene, stepper

WARM = 2


def run(part: Part) -> None:
    """A row for each row of the speed table whose step does not wait."""
    models = dict(islice(TINY.items(), 1)) if part.tiny else MODELS
    for name, weights in models.items():
        if part.left <= 0:
            return
        scene = Scene(name, part, Workload(weights, part.device))
        part.attempt(scene.row(MUON), partial(_profile, part, scene.rival.step))
        for form in (form for form in FORMS if not form.waits):
            if scene.excluded(form) is None:
                part.attempt(scene.row(form.name), partial(_form, scene, form), fragile=form.graph)
        for peer in (peer for peer in PEERS if peer.unavailable(scene.workload) is None):
            part.attempt(scene.row(peer.name), partial(_peer, scene, peer))
        del scene
        part.device.release()


def _form(scene: Scene, form: Form) -> Mapping[str, Any]:
    return _profile(scene.part, stepper(scene, form, WARM)[1])


def _peer(scene: Scene, peer: Peer) -> Mapping[str, Any]:
    return _profile(scene.part, peer.build(scene.workload).step)


def _profile(part: Part, act: Callable[[], object]) -> Mapping[str, Any]:
    for _ in range(WARM):
        act()
    return part.device.profile(act)
