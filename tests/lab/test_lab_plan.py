"""``asgo plan``: what it says against what a real step keeps, and against torch's own cuts."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asgo import ASGO, View, report, route
from asgo.distributed.ownership import STRATEGIES
from asgo.distributed.planned_part import Mesh
from asgo.lab.cli import main
from asgo.lab.config.runs import ModelConfig
from asgo.lab.errors import LabError
from asgo.lab.models.language import build_model
from asgo.lab.models.named import load
from asgo.lab.plan.config import PlanConfig
from asgo.lab.plan.mesh import parse, sensible
from asgo.lab.plan.plan import parts_of, plan, plan_mesh
from asgo.optimizer.param_groups import with_views
from asgo.optimizer.planning import gradient_bytes, memory, place, read_parts, traffic
from asgo.views import fused

ONE = Mesh()
TP = {"left": "colwise", "down": "rowwise", "heads": "colwise", "experts": "packed_colwise", "conv": "rowwise"}


class Odd(nn.Module):
    """Matrices of both sides, heads, a fused projection, experts, a convolution, and what AdamW has."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.left = nn.Linear(40, 12)
        self.down = nn.Linear(9, 30, bias=False)
        self.heads = nn.Linear(10, 24, bias=False)
        self.fused = nn.Linear(12, 36, bias=False)
        self.groups = nn.Linear(12, 27, bias=False)
        self.experts = nn.Parameter(torch.zeros(5, 8, 6))
        self.conv = nn.Conv2d(3, 8, 3)
        self.scale = nn.Parameter(torch.zeros(()))
        self.to(dtype)


VIEWS = {
    "left.weight": "m n -> 1 m n",
    "down.weight": "m n -> 1 m n",
    "heads.weight": View("(h d) n -> h d n", {"h": 4}),
    "fused.weight": View(("(h d) n -> h d n",) * 2 + ("m n -> 1 m n",), {"d": 3}, (12, 12, 12)),
    "groups.weight": fused(q=4, k=3, v=2, order="by group"),
    "experts": "e m n -> e m n",
    "conv.weight": "o i kh kw -> 1 o (i kh kw)",
}


def groups_of(model):
    named = list(model.named_parameters())
    return [{"params": [(name, p)], "view": VIEWS.get(name)} for name, p in named]


def stepped(model, steps=1, **options):
    """An optimizer over the model after steps with random gradients."""
    torch.manual_seed(0)
    optimizer = ASGO(groups_of(model) if isinstance(model, Odd) else route(model), **{"root": "minimax"} | options)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    return optimizer


# ---- against a real optimizer --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd", "tiny", "llama-tiny"])
@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"packed_state": True}),
        (torch.bfloat16, {"root": "square_root", "precision": "fp16"}),
    ],
)
def test_bytes_of_one_process_are_those_after_a_step(name, dtype, form):
    model = Odd(dtype) if name == "odd" else build_model(ModelConfig(preset=name), 50, 16, seed=0).to(dtype)
    optimizer = stepped(model, **form)
    config = PlanConfig(param_dtype=str(dtype).removeprefix("torch."))
    kept = plan_mesh(read_parts(optimizer, {}), ONE, 1, config).memory
    held = Counter(roots=0)
    for group in optimizer.param_groups:
        for param, view in with_views(group):
            for key, tensor in optimizer.state[param].items():
                kind = {"exp_avg": "momentum", "exp_avg_sq": "momentum", "gram": "statistics", "root": "roots"}
                kind |= {"sqrt": "statistics"}
                kind = kind.get(key.partition(".")[0], "rest")
                held["adamw" if view is None and kind == "momentum" else kind] += tensor.nbytes
    params = sum(param.nbytes for param in model.parameters())
    assert vars(kept) == {"params": params, "gradients": params, **held}
    assert kept.state == report(optimizer).state_bytes


# ---- against the ranks themselves ----------------------------------------------------------------


def entries(shape, mesh, tp_dim):
    """The indices of the entries that every rank of a shard group holds, cut by torch itself: an independent way."""
    whole, found = torch.arange(math.prod(shape)).reshape(shape), []
    for f in range(mesh.fsdp):
        for t in range(mesh.tp):
            held = whole
            if tp_dim is not None:
                held = take(held, mesh.tp, t, tp_dim)
            found.append(take(held, mesh.fsdp, f, 0))
    return found


def take(x, count, index, dim):
    chunks = x.chunk(count, dim)
    return chunks[index] if index < len(chunks) else x.narrow(dim, 0, 0)


MESHES = [
    Mesh(fsdp=2),
    Mesh(fsdp=4),
    Mesh(tp=2),
    Mesh(2, 2),
    Mesh(fsdp=2, tp=2),
    Mesh(2, 3, 2),
]


@pytest.fixture(scope="module")
def odd():
    return read_parts(stepped(Odd()), TP)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_shards_owners_and_bytes_are_those_of_torch_chunks(odd, mesh):
    """Who holds which entries of a part is found by cutting indices; then every entry that moves is counted."""
    for placed in place(odd, mesh, 3):
        view = placed.view
        if not placed.shape:
            continue
        held = entries(placed.shape, mesh, placed.tp_dim)
        index = torch.arange(math.prod(placed.shape)).reshape(placed.shape)
        own = index if view is None else view.cut(index)[placed.index]
        mine = [np.intersect1d(x.flatten().numpy(), own.flatten().numpy()) for x in held]
        if placed.tp_dim is not None or mesh.tp == 1:
            assert placed.held == tuple(map(len, mine))
        if view is None or placed.kind == "local":
            continue
        stacks = view.stack(placed.index, own).flatten(1).numpy()
        whole = [all(np.isin(stack, rank).all() or not np.isin(stack, rank).any() for stack in stacks) for rank in mine]
        if placed.kind == "whole_slices":
            assert all(whole)
            counts = [int(np.isin(stacks[:, 0], rank).sum()) for rank in mine[:: mesh.tp // placed.across]]
            assert counts == list(placed.matrices)
        elif placed.kind == "partial_sums":
            check_sums(placed, mesh, view.stack(placed.index, own).numpy(), mine)
        else:
            check_bytes(placed, mesh, mine)


def team_of(placed, mesh):
    """The ranks that step a part together."""
    return list(np.ndindex(mesh.replicate, mesh.fsdp, placed.across))


def check_sums(placed, mesh, stack, mine):
    """Every rank has whole rows, or whole columns, of all matrices; it sends their products, and the owner roots."""
    team, (b, m, n), k = team_of(placed, mesh), placed.stack, min(placed.stack[1:])
    lines = {rank: np.isin(stack, mine[rank[1] * mesh.tp + rank[2]]) for rank in team}
    axis = 1 if k == n else 2  # cut where it is not preconditioned
    for held in lines.values():
        assert (held == held.all(3 - axis, keepdims=True)).all()
        assert (held == held[:1]).all()
    assert mesh.fsdp * placed.across * k**2 < m * n
    owner, sent, received = team[placed.owner], Counter(), Counter()
    for rank in team:
        if rank != owner:
            if rank[0] == owner[0]:
                sent[rank] += 4 * b * k**2
                received[owner] += 4 * b * k**2
            sent[owner] += 4 * b * k**2
            received[rank] += 4 * b * k**2
    norms = 4 * (3 if placed.interval == 1 else 2 + k) * b * (len(placed.held) - 1)
    strategy = STRATEGIES[placed.kind]
    flow = placed.on_mesh(strategy.sent(placed, 4) + strategy.sent_roots(placed), mesh).numpy()
    for rank in np.ndindex(mesh.replicate, mesh.fsdp, mesh.tp):
        same = (rank[0], rank[1], rank[2] if placed.across > 1 else 0)
        assert tuple(flow[(slice(None), *rank)] - norms) == (sent[same], received[same])
    kept = memory([placed], mesh, 4)
    assert sorted(kept["statistics"].flatten())[-1] == 4 * b * k**2
    assert np.count_nonzero(kept["statistics"]) == mesh.ranks // len(team)
    momentum = kept["momentum"][0, :, :: mesh.tp // placed.across]
    assert momentum.sum() == placed.state["momentum"]


def check_bytes(placed, mesh, mine):
    """Sent and received, entry by entry, for a gradient of 2 bytes and an update of 4."""
    across = placed.across
    team = team_of(placed, mesh)
    owner = team[placed.owner]
    of = {rank: set(mine[rank[1] * mesh.tp + rank[2]].tolist()) for rank in team}
    sent, received = Counter(), Counter()
    replica = owner[0] if of[owner] else 0
    if len(of[owner]) < placed.numel:
        for rank in team:
            if rank[0] == replica and rank != owner:
                sent[rank] += 2 * len(of[rank])
                received[owner] += 2 * len(of[rank])
    for rank in team:
        if rank != owner:
            sent[owner] += 4 * len(of[rank])
            received[rank] += 4 * len(of[rank])
    flow = placed.on_mesh(STRATEGIES[placed.kind].sent(placed, 2), mesh).numpy()
    for r in range(mesh.replicate):
        for f in range(mesh.fsdp):
            for t in range(mesh.tp):
                rank = (r, f, t if across > 1 else 0)
                assert tuple(flow[:, r, f, t]) == (sent[rank], received[rank])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    mesh=st.builds(Mesh, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans()),
    interval=st.integers(1, 4),
)
def test_what_is_sent_is_received(rows, columns, mesh, interval):
    with torch.device("meta"):
        optimizer = ASGO([("w", nn.Parameter(torch.empty(rows, columns))), ("b", nn.Parameter(torch.empty(rows)))])
    placed = place(read_parts(optimizer, {"w": "colwise"}), mesh, interval)
    for sent, received in traffic(placed, mesh, interval, 2):
        assert sent.sum() == received.sum()
        assert sent.min() >= 0
        assert received.min() >= 0
        assert mesh.ranks > 1 or not sent.any()


def test_bytes_in_closed_form():
    with torch.device("meta"):
        parts = read_parts(ASGO([("w", nn.Parameter(torch.empty(8, 24)))]), {"w": "colwise"})
        long = read_parts(ASGO([("w", nn.Parameter(torch.empty(30_000, 4)))]), {})

    def flows(parts, mesh, interval, itemsize):
        return traffic(place(parts, mesh, interval), mesh, interval, itemsize)

    assert not flows(parts, ONE, 1, 4)[0].any()
    (roots, _), (later, _) = flows(parts, Mesh(4), 2, 4)
    assert roots.max() == 3 * (8 * 8 * 4 + 8)  # a root, and its count of failures
    assert not later.any()
    assert flows(parts, Mesh(4, zero1=True), 2, 4)[1][0].max() == 3 * 8 * 24 * 4
    sent, received = flows(parts, Mesh(fsdp=4), 2, 2)[1]
    local = 8 * 24 // 4
    assert sorted(sent.flatten()) == [local * 2] * 3 + [3 * local * 4]
    assert sorted(received.flatten()) == [local * 4] * 3 + [3 * local * 2]
    # 30,000 x 4 in 8 shards: products of 4 x 4 to an owner, a root from it, norms of it and 4 rows
    (roots, _), (later, _) = flows(long, Mesh(fsdp=8), 2, 2)
    assert sorted(roots.flatten()) == [16 * 4 + 7 * 6 * 4] * 7 + [7 * 16 * 4 + 7 * 6 * 4]
    assert sorted(later.flatten()) == [7 * 6 * 4] + [16 * 4 + 7 * 6 * 4] * 7
    assert gradient_bytes(100, Mesh(4), 4) == 2 * 100 * 4 * 3 / 4
    assert gradient_bytes(100, Mesh(fsdp=4), 4) == 100 * 4 * 3 / 4


def test_heads_and_experts_that_shards_do_not_cut_send_one_number_each(odd):
    kinds = {p.name: p.kind for p in place(odd, Mesh(fsdp=4), 1) if p.view is not None}
    assert kinds == dict.fromkeys(VIEWS, "owner_computes") | {"heads.weight": "whole_slices"}
    assert {p.name for p in place(odd, Mesh(tp=2), 1) if p.kind == "whole_slices"} == {"heads.weight"}
    experts, heads = (p for p in place(odd, Mesh(fsdp=2), 1) if p.kind == "whole_slices")
    assert (experts.matrices, heads.matrices) == ((3, 2), (2, 2))
    assert traffic([heads], Mesh(fsdp=2), 1, 4)[0][0].tolist() == [[[8], [8]]]
    assert traffic([experts], Mesh(fsdp=2), 1, 4)[0][0].tolist() == [[[12], [12]]]  # room for three from each
    kinds = {p.name: p.kind for p in place(odd, Mesh(fsdp=5), 1)}
    assert (kinds["experts"], kinds["heads.weight"]) == ("whole_slices", "owner_computes")


@pytest.mark.parametrize("mesh", [Mesh(2), Mesh(4), Mesh(8), Mesh(8, zero1=True), Mesh(fsdp=8), Mesh(2, 4)], ids=str)
def test_owners_share_the_roots_of_gpt2_evenly(gpt2, mesh):
    for interval in (1, 2, 5):
        load = Counter()
        for placed in place(gpt2, mesh, interval):
            if placed.owner is not None:
                b, m, n = placed.stack
                load[placed.owner] += b * placed.structure.root_flops(m, n)
        assert max(load.values()) <= 1.15 * sum(load.values()) / mesh.ranks


@pytest.fixture(scope="module")
def gpt2():
    return parts_of(load("gpt2-124m"), PlanConfig())


def test_packed_state_halves_statistics_and_roots_in_memory_and_on_links(gpt2):
    config = PlanConfig(packed_state=True)
    packed, mesh = parts_of(load("gpt2-124m"), config), Mesh(2)
    whole, half = (plan_mesh(parts, ONE, 1, config).memory for parts in (gpt2, packed))
    assert (half.statistics, half.roots) == (72 * 2 * 768 * 769,) * 2 == (half.statistics, whole.roots * 769 // 1536)
    assert whole.state - half.state == whole.statistics + whole.roots - half.statistics - half.roots
    sent = [traffic(place(parts, mesh, 1), mesh, 1, 4)[0][0].sum() for parts in (gpt2, packed)]
    assert sent == [72 * (4 * 768**2 + 8), 72 * (2 * 768 * 769 + 8)]


def test_square_roots_take_a_quarter_of_statistics_and_roots(gpt2):
    """``k^2`` numbers of two bytes for ``2 k^2`` of four. The other rank gets updates, S and what stands beside it."""
    config = PlanConfig(root="square_root")
    parts, mesh = parts_of(load("gpt2-124m"), config), Mesh(2)
    whole, half = (plan_mesh(each, ONE, 1, config).memory for each in (gpt2, parts))
    assert (half.statistics, half.roots) == (72 * 2 * 768**2, 0)
    assert whole.statistics + whole.roots == 4 * half.statistics
    numbers = 12 * (4 * 768**2 + 2 * 768 * 3072)
    sent = traffic(place(parts, mesh, 1), mesh, 1, 4)[0][0].sum()
    cross = 12 * 4 * 2 * (4 * 768 + 2 * 3072)  # a running mean square for each row or column, and its weight
    assert sent == 4 * numbers + half.statistics + cross + 72 * 8


def test_square_roots_are_renewed_at_every_step():
    plans = plan(PlanConfig("tiny", gpus=2, mesh=("ddp",), intervals=(1, 10), root="square_root"))
    assert [(row.interval, row.roots_worst) for row in plans.rows] == [(1, 0)]
    assert plans.about.endswith("; square roots in bfloat16 in place of statistics and roots")
    with pytest.raises(LabError, match="--packed-state is for statistics and roots: leave it out"):
        plan(PlanConfig("tiny", root="square_root", packed_state=True))


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("olmoe-7b", 6_919_161_856),
    ],
)
def test_published_models_have_their_number_of_parameters(name, parameters):
    model = load(name).module
    assert sum(param.numel() for param in model.parameters()) == parameters
    assert all(param.is_meta for param in model.parameters())


def test_a_folder_with_a_configuration_is_a_model(tmp_path):
    first = load("llama-1b")
    first.module.config.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        again = load(str(path))
        assert again.tp_sizes == [1, 2, 4, 8]
        shapes = ([tuple(param.shape) for param in model.module.parameters()] for model in (first, again))
        assert next(shapes) == next(shapes)


def test_the_hub_out_of_reach_is_said(monkeypatch):
    import transformers

    def unreachable(name):
        raise OSError("We couldn't connect to the Hub.\nMore.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(LabError, match=r"'someone/model' is no local folder and could not be had.*couldn't connect"):
        load("someone/model")


# ---- meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus", "mesh"),
    [
        ("ddp", 8, Mesh(8)),
        ("zero1", 8, Mesh(8, zero1=True)),
        ("fsdp", 8, Mesh(fsdp=8)),
        ("tp", 8, Mesh(tp=8)),
        ("fsdp=8,tp=8", 64, Mesh(1, 8, 8)),
        ("tp=2,replicate=4,fsdp=8", 64, Mesh(4, 8, 2)),
    ],
)
def test_meshes_by_name(text, gpus, mesh):
    assert parse(text, gpus) == mesh
    assert parse(str(mesh), gpus) == mesh
    assert mesh.ranks == gpus


@pytest.mark.parametrize("gpus", [1, 2, 8, 64, 1024])
def test_sensible_meshes_have_all_gpus(gpus):
    found = sensible(gpus, [1, 2, 4, 8])
    assert all(mesh.ranks == gpus for mesh in found)
    assert len(set(map(str, found))) == len(found)
    assert [str(mesh) for mesh in sensible(1024, [1, 2, 4, 8])] == [
        *("ddp", "zero1", "fsdp", "replicate=128,fsdp=8", "replicate=16,fsdp=64", "fsdp=128,tp=8")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gpt5", "model 'gpt5' does not exist: choose from tiny, demo"),
        ("{folder}", "is a folder without config.json: choose from tiny"),
        ("{folder}/broken.json", "cannot be read:"),
        ("--gpus 0", "--gpus 0 is out of range: pass a number of GPUs, from 1"),
        (
            "--gpus 64 --mesh fsdp=8,tp=4",
            "--mesh fsdp=8,tp=4 has 32 ranks, --gpus 64: pass --gpus 32 or --mesh replicate=2",
        ),
        ("--gpus 9 --mesh fsdp=2", "--mesh fsdp=2 has 2 ranks, --gpus 9: pass sizes that multiply to 9"),
        ("--mesh pipeline", "--mesh pipeline is not understood at 'pipeline': pass ddp, zero1, fsdp, tp, or sizes"),
        ("--mesh fsdp=x", "--mesh fsdp=x is not understood at 'fsdp=x'"),
        ("--mesh ddp ddp", "--mesh ddp ddp repeats an entry: pass each once"),
        ("--mesh fsdp fsdp=8", "--mesh fsdp is given twice under two names: pass each once"),
        (
            "llama-tiny --gpus 4 --mesh tp",
            "tp=4 does not divide the 4 heads and 2 key and value heads of llama-tiny; tp of 1, 2",
        ),
        ("tiny --mesh fsdp=4,tp=2", "transformers has no tensor-parallel plan for tiny (GPT2LMHeadModel); pass fsdp"),
        ("tiny --intervals 0", "--intervals 0 is out of range: pass numbers of steps, from 1"),
        ("tiny --memory-gb 0", "--memory-gb 0.0 is out of range: pass a number above 0"),
        ("tiny --intervals 2 2", "--intervals 2 2 repeats an entry"),
        ("tiny --out {folder}", "is not empty, and nothing is overwritten: pass another --out"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, message, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "broken.json").write_text("{")
    assert main(["plan", *words.format(folder=folder).split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("asgo: error: ")
    assert message in line


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_writes_what_it_shows(tmp_path, capsys):
    out = tmp_path / "plan"
    assert main(["plan", "llama-demo", "--gpus", "16", "--intervals", "1", "5", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["command"] == f"asgo plan llama-demo --gpus 16 --intervals 1 5 --out {out}"
    assert results["says"] in shown.replace("\n", " ")
    assert results["says"] in (out / "table.md").read_text()
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    meshes = ["ddp", "zero1", "fsdp", "replicate=2,fsdp=8", "fsdp=8,tp=2"]
    assert [(row["mesh"], row["interval"]) for row in rows] == [(m, i) for m in meshes for i in ("1", "5")]
    for row in rows:
        sizes = ("params", "gradients", "momentum", "statistics", "roots", "adamw", "rest")
        assert sum(int(row[f"{name}_memory"]) for name in sizes) == int(row["total_memory"])
        assert float(row["bytes_mean"]) <= float(row["bytes_worst"])
        assert float(row["roots_mean"]) <= float(row["roots_worst"])


def test_longer_intervals_send_fewer_roots_and_bfloat16_halves_parameters():
    often, rarely = plan(PlanConfig("demo", gpus=8, mesh=("ddp",), intervals=(1, 8))).rows
    assert often.bytes_mean == pytest.approx(8 * rarely.bytes_mean, rel=0.5)  # owners of 24 roots among 8 ranks
    assert (often.roots_mean, often.roots_worst) == (24, 24)
    assert (rarely.roots_mean, rarely.roots_worst) == (3, 3)
    (lean,) = plan(PlanConfig("demo", gpus=8, mesh=("ddp",), intervals=(1,), param_dtype="bfloat16")).rows
    assert (lean.memory.params, lean.memory.state) == (often.memory.params // 2, often.memory.state)


def test_the_verdict_names_what_fits():
    config = PlanConfig("demo", gpus=8, mesh=("ddp", "fsdp"), intervals=(1,))
    ddp, fsdp = plan(config).rows
    every = (
        f"fsdp keeps the least ({fsdp.memory.total / 1e9:.3g} GB), fsdp every 1 sends the least "
        f"({fsdp.bytes_mean / 1e6:.3g} MB)"
    )
    assert plan(config).verdict == f"{every}; all of these meshes fit."
    between = (ddp.memory.total + fsdp.memory.total) / 2
    small = plan(replace(config, memory_gb=between / 1e9, state_share=1.0)).verdict
    room = f"{between / 1e9:.3g} GB"
    assert small == f"{every}; ddp ({ddp.memory.total / 1e9:.3g} GB) does not fit into {room}."
    assert plan(replace(config, memory_gb=1e-6)).verdict.startswith("nothing here fits; ddp (")


@pytest.mark.slow
def test_seventy_billion_parameters_on_a_thousand_gpus():
    found = plan(PlanConfig("llama-70b", gpus=1024, mesh=("ddp", "fsdp"), intervals=(10,)))
    ddp, fsdp = found.rows
    assert (ddp.fits, fsdp.fits) == (False, True)
    assert ddp.memory.params == 4 * 70_553_706_496
    assert fsdp.memory.params == pytest.approx(4 * 70_553_706_496 / 1024, rel=0.01)
    assert "ddp (1,071 GB) does not fit" in found.verdict
