"""The comparison of fused weights apart and whole: what it trains, and what it says of the losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from asgo import ASGO, explain, route
from asgo.views import MATRIX
from benchmarks.layouts import apart
from benchmarks.layouts.small_models import KINDS, Kind


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_forms_differ_in_the_weights_under_test_alone(kind: Kind) -> None:
    torch.manual_seed(0)
    model = kind.build()
    views = {form: _views(model, kind, form) for form in ("apart", *kind.apart)}
    for layer in kind.apart:
        changed = {name for name, view in views["apart"].items() if views[layer][name] != view}
        assert changed == {name for name in views["apart"] if name.endswith(f".{layer}.weight")}
        assert all(views[layer][name] == MATRIX for name in changed)
        assert len(changed) == 2


def _views(model: torch.nn.Module, kind: Kind, form: str) -> dict[str, object]:
    return {each.name: each.view for each in explain(model, apart.rules(kind, form))}


def test_a_stacked_seed_trains_as_it_would_alone() -> None:
    kind = next(kind for kind in KINDS if kind.name == "AdaLN")
    together = apart.train(kind, "apart", 0.01, [3, 4], steps=4)
    assert together == pytest.approx([_alone(kind, seed) for seed in (3, 4)], abs=2e-4)


def _alone(kind: Kind, seed: int, steps: int = 4) -> float:
    """One model without stacking, by a loop of its own."""
    torch.manual_seed(seed)
    model = kind.build()
    optimizer = ASGO(route(model, apart.rules(kind, "apart")), lr=0.01, adamw={"lr": apart.ADAMW_LR})
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, batch in zip(range(steps), kind.batches(seed, kind.size, kind.length), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        model(*batch).backward()
        optimizer.step()
        model.zero_grad()
    held_out = kind.batches(10_000, 4 * kind.size, kind.length, held_out=True)
    with torch.no_grad():
        return sum(model(*next(held_out)).item() for _ in range(8)) / 8


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def train(kind: Kind, form: str, lr: float, seeds: list[int], steps: int) -> list[float]:
        asked.append((form, lr, seeds))
        return [float(seed) for seed in seeds]

    monkeypatch.setattr(apart, "train", train)
    for seeds in ([0, 1], [1, 2]):
        ledger = apart.Ledger(tmp_path / "runs.jsonl", KINDS[:1], steps=5)
        assert ledger.losses(KINDS[0], "apart", 0.01, seeds) == seeds
    assert asked == [("apart", 0.01, [0, 1]), ("apart", 0.01, [2])]
    assert [json.loads(line)["seeds"] for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == [[0, 1], [2]]


@pytest.mark.parametrize(("best", "tried"), [(0.01, 3), (0.02, 4), (0.005, 4), (0.04, 5), (0.001, 5)])
def test_the_search_goes_on_at_an_edge(best: float, tried: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Losses:
        def losses(self, kind: Kind, form: str, lr: float, seeds: tuple[int, ...]) -> list[float]:
            return [abs(lr - best)] * len(seeds)

    found = apart.search(KINDS[0], "apart", Losses())  # pyright: ignore[reportArgumentType]
    assert len(found) == tried
    assert list(found) == sorted(found)


def test_holm() -> None:
    """The example of Holm's procedure: each p times the hypotheses that are left, never less than the one before."""
    assert apart.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert apart.holm([0.9, 0.8]) == [1.0, 1.0]
