"""Layouts: no matrix of a view holds rows of two parts, whatever their order; sizes that do not add up are said."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from asgo import ASGO
from asgo.views import MATRIX, STACK, TRANSPOSED, View, fused
from asgo.views.layouts import LAYOUTS
from asgo.views.routing import Rule, explain, route

D = 24


class Holder(nn.Module):
    """A module with these attributes: numbers, flags, and layers by their sizes (out, in)."""

    def __init__(self, **attributes: object) -> None:
        super().__init__()
        for name, value in attributes.items():
            is_size = isinstance(value, tuple) and len(value) == 2
            setattr(self, name, nn.Linear(value[1], value[0], bias=False) if is_size else value)


def named(name: str, **attributes: object) -> nn.Module:
    """The same, of a class with this name."""
    return type(name, (Holder,), {})(**attributes)


def views(model: nn.Module, per_head: bool = False) -> dict[str, View | None]:
    return {each.name: each.view for each in explain(model, per_head=per_head)}


def rows_of(view: View, shape: Sequence[int], dim: int = 0) -> list[set[int]]:
    """The rows, or the indices along another axis, that each matrix of a view holds."""
    index = torch.arange(shape[dim]).reshape([-1 if i == dim else 1 for i in range(len(shape))]).expand(*shape)
    return [set(matrix.flatten().tolist()) for stack in view.matrices(index) for matrix in stack]


def blocks(*sizes: int) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda rows: rows.split(list(sizes))


def repeated(times: int, *sizes: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """The parts of each repetition, as in ``x.view(times, -1).split(sizes, -1)``."""
    return lambda rows: rows.view(times, -1).split(list(sizes), -1)


MLA = {"num_heads": 4, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 6, "kv_lora_rank": 10}
MAMBA2 = {"intermediate_size": 48, "n_groups": 2, "ssm_state_size": 5, "num_heads": 6}
DELTA = {"num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 6, "head_v_dim": 6, "key_dim": 12, "value_dim": 24}
CONFIG = SimpleNamespace(n_head=4, n_query_groups=2, head_size=6)

# name: the module, its fused weight, the parts by the module's own forward
APART: dict[str, tuple[nn.Module, str, Callable[[Tensor], Sequence[Tensor]]]] = {
    "blocks": (Holder(n_head=4, qkv=(72, D)), "qkv", blocks(24, 24, 24)),
    "blocks, heads unknown": (Holder(qkv=(72, D)), "qkv", blocks(24, 24, 24)),
    "grouped, by config": (Holder(config=CONFIG, qkv=(48, D)), "qkv", blocks(24, 12, 12)),
    "grouped, by the output": (Holder(n_head=4, Wqkv=(36, D), out_proj=(D, 24)), "Wqkv", blocks(24, 6, 6)),
    "grouped, by key heads": (Holder(heads=4, kv_heads=1, to_qkv=(36, D)), "to_qkv", blocks(24, 6, 6)),
    "one key": (
        named("GPTBigCodeAttention", num_heads=4, head_dim=6, multi_query=True, c_attn=(36, D)),
        "c_attn",
        blocks(24, 6, 6),
    ),
    "by head": (
        Holder(num_attention_heads=4, head_size=6, query_key_value=(72, D)),
        "query_key_value",
        repeated(4, 6, 6, 6),
    ),
    "by head, DeBERTa": (
        named("DisentangledSelfAttention", num_attention_heads=4, in_proj=(72, D)),
        "in_proj",
        repeated(4, 6, 6, 6),
    ),
    "by head, MaxViT": (Holder(num_heads=4, head_first=True, qkv=(72, D)), "qkv", repeated(4, 6, 6, 6)),
    "by head, LeViT": (Holder(num_heads=4, key_dim=3, qkv=(48, D)), "qkv", repeated(4, 3, 3, 6)),
    "by group": (
        Holder(num_heads=4, num_kv_heads=2, head_dim=6, new_decoder_architecture=True, query_key_value=(48, D)),
        "query_key_value",
        repeated(2, 12, 6, 6),
    ),
    "in blocks of a device": (
        named("CodeGenAttention", num_attention_heads=4, qkv_proj=(72, D)),
        "qkv_proj",
        repeated(4, 6, 6, 6),
    ),
    "key and value": (Holder(heads=4, to_q=(24, D), to_kv=(48, D)), "to_kv", blocks(24, 24)),
    "key and value, global": (
        Holder(num_heads=4, use_global=True, qkv=(48, D), proj=(D, 24)),
        "qkv",
        blocks(24, 24),
    ),
    "gated queries": (
        Holder(num_attention_heads=4, head_dim=6, q_proj=(48, D), k_proj=(12, D)),
        "q_proj",
        repeated(4, 6, 6),
    ),
    "latent and rope": (Holder(**MLA, kv_a_proj_with_mqa=(12, D)), "kv_a_proj_with_mqa", blocks(10, 2)),
    "latent keys": (Holder(**MLA, q_proj=(32, D), kv_b_proj=(48, 10)), "kv_b_proj", repeated(4, 6, 6)),
    "Mamba": (
        Holder(A_log=nn.Parameter(torch.ones(48, 5)), intermediate_size=48, in_proj=(96, D), x_proj=(13, 48)),
        "in_proj",
        blocks(48, 48),
    ),
    "Mamba's selection": (
        Holder(ssm_state_size=5, time_step_rank=3, x_proj=(13, 48), dt_proj=(48, 3)),
        "x_proj",
        blocks(3, 5, 5),
    ),
    "Mamba-2": (Holder(**MAMBA2, in_proj=(122, D)), "in_proj", blocks(48, 48, 10, 10, 6)),
    "Zamba": (named("ZambaMambaMixer", intermediate_size=48, in_proj=(96, D)), "in_proj", repeated(48, 1, 1)),
    "delta net by key head": (Holder(**DELTA, in_proj_qkvz=(72, D)), "in_proj_qkvz", repeated(2, 6, 6, 12, 12)),
    "delta net's scalars": (Holder(**DELTA, in_proj_ba=(8, D)), "in_proj_ba", repeated(2, 2, 2)),
    "delta net": (Holder(**DELTA, in_proj_qkv=(48, D)), "in_proj_qkv", blocks(12, 12, 24)),
    "short convolution": (
        Holder(conv=nn.Conv1d(D, D, 3, groups=D), in_proj=(72, D), out_proj=(D, D)),
        "in_proj",
        blocks(24, 24, 24),
    ),
    "modulation": (
        Holder(adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))),
        "adaLN_modulation.1",
        blocks(*[24] * 6),
    ),
    "gates by shape": (Holder(first=(20, D), second=(D, 10)), "first", blocks(10, 10)),
    "gates by name, square": (Holder(Wi=(48, D), Wo=(D, 24)), "Wi", blocks(24, 24)),
    "gates of a unit": (
        nn.Sequential(named("GEGLU", proj=(20, D)), nn.Dropout(), nn.Linear(10, D)),
        "0.proj",
        blocks(10, 10),
    ),
    "gates before a GLU": (nn.Sequential(nn.Linear(D, 48), nn.GLU(), nn.Linear(24, D)), "0", blocks(24, 24)),
    "by head, BigCode": (
        named("GPTBigCodeAttention", num_heads=4, head_dim=6, c_attn=(72, D)),
        "c_attn",
        repeated(4, 6, 6, 6),
    ),
    "cross attention": (Holder(num_heads=4, q_attn=(24, D), c_attn=(48, D)), "c_attn", blocks(24, 24)),
    "by head, LeViT's downsampling": (
        Holder(num_heads=4, key_dim=3, queries=(12, D), keys_values=(36, D)),
        "keys_values",
        repeated(4, 3, 6),
    ),
    "by head, MiniMax": (
        named("MiniMaxLightningAttention", num_attention_heads=4, qkv_proj=(72, D)),
        "qkv_proj",
        repeated(4, 6, 6, 6),
    ),
    "by group, InternLM2": (
        named("InternLM2Attention", num_heads=4, num_key_value_heads=2, head_dim=6, wqkv=(48, D)),
        "wqkv",
        repeated(2, 12, 6, 6),
    ),
    "by group, torchtitan": (Holder(heads_per_kv=2, head_dim=6, wqkv=(48, D)), "wqkv", repeated(2, 12, 6, 6)),
    "by group, torchtitan without grouped queries": (
        Holder(heads_per_kv=1, head_dim=6, wqkv=(72, D)),
        "wqkv",
        repeated(4, 6, 6, 6),
    ),
    "by group, Megatron": (
        Holder(num_heads=4, num_query_groups=2, num_query_groups_per_partition=2, head_dim=6, linear_qkv=(48, D)),
        "linear_qkv",
        repeated(2, 12, 6, 6),
    ),
    "one key, Falcon": (
        named("FalconAttention", num_heads=4, head_dim=6, multi_query=True, query_key_value=(36, D)),
        "query_key_value",
        blocks(24, 6, 6),
    ),
    "blocks, ChatGLM": (
        Holder(num_heads=4, head_dim=6, multi_query_attention=True, query_key_value=(36, D)),
        "query_key_value",
        blocks(24, 6, 6),
    ),
    "with an output gate": (
        Holder(qk_dim=12, v_dim=24, qkv_opreact=(72, D)),
        "qkv_opreact",
        blocks(12, 12, 24, 24),
    ),
    "a hyper-connection": (Holder(hc_mult=3, fn=(15, D)), "fn", blocks(3, 3, 9)),
    "one number per query": (Holder(embed_dim=D, qkv_proj=(49, D)), "qkv_proj", blocks(1, 24, 24)),
    "focal modulation": (Holder(focal_level=2, projection_in=(51, D)), "projection_in", blocks(24, 24, 3)),
    "focal modulation, as a convolution": (Holder(focal_level=2, f=nn.Conv2d(D, 51, 1)), "f", blocks(24, 24, 3)),
    "queries and keys alone": (Holder(num_heads=4, qk=(48, D), v=(D, D)), "qk", blocks(24, 24)),
    "a list with one for each head": (
        Holder(key_dim=3, val_dim=6, qkvs=nn.ModuleList(Holder(conv=nn.Conv2d(6, 12, 1)) for _ in range(2))),
        "qkvs.0.conv",
        blocks(3, 3, 6),
    ),
    "with an MLP beside it": (
        Holder(heads=4, head_dim=6, inner_dim=24, mlp_hidden_dim=36, to_qkv_mlp_proj=(144, D), to_out=(D, 60)),
        "to_qkv_mlp_proj",
        blocks(24, 24, 24, 36, 36),
    ),
    "EfficientViM": (Holder(d_inner=24, hz_proj=(48, D)), "hz_proj", blocks(24, 24)),
    "EfficientViM's selection": (Holder(state_dim=5, BCdt_proj=nn.Conv1d(D, 15, 1)), "BCdt_proj", blocks(5, 5, 5)),
    "an index": (
        Holder(index_n_heads=4, index_kv_heads=1, index_head_dim=6, index_qk_proj=(30, D)),
        "index_qk_proj",
        blocks(24, 6),
    ),
    "gated queries by group": (
        Holder(
            num_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            elementwise_attn_output_gate=True,
            q_proj=(48, D),
            k_proj=(12, D),
        ),
        "q_proj",
        repeated(2, 12, 12),
    ),
    "queries and a gate of another size": (
        Holder(num_heads=4, qk_head_dim=6, v_head_dim=3, q_gate_proj=(36, D)),
        "q_gate_proj",
        repeated(4, 6, 3),
    ),
    "modulation in diffusers": (
        Holder(norm=named("AdaLayerNormZero", linear=(6 * D, D), other=nn.LayerNorm(D))),
        "norm.linear",
        blocks(*[24] * 6),
    ),
    "query, key and value, as torch names it": (
        Holder(num_heads=4, in_proj=(48, D), num_key_value_heads=2, out_proj=(D, 24)),
        "in_proj",
        blocks(24, 12, 12),
    ),
    "latent attention by its authors' names": (
        Holder(**MLA, wkv_a=(12, D), wkv_b=(48, 10)),
        "wkv_b",
        repeated(4, 6, 6),
    ),
    "latent keys and values of unequal size": (
        Holder(**MLA | {"v_head_dim": 3}, q_proj=(32, D), kv_b_proj=(36, 10)),
        "kv_b_proj",
        repeated(4, 6, 3),
    ),
    "a wrapper around it": (
        Holder(num_heads=4, qkv=Holder(linear=(72, D), norm=nn.BatchNorm1d(72))),
        "qkv.linear",
        blocks(24, 24, 24),
    ),
}


@pytest.mark.parametrize(("model", "slot", "parts"), APART.values(), ids=APART)
@pytest.mark.parametrize("per_head", [False, True])
def test_no_matrix_holds_rows_of_two_parts(model, slot, parts, per_head):
    view = views(model, per_head)[f"{slot}.weight"]
    shape = model.get_submodule(slot).weight.shape
    expected = [set(part.flatten().tolist()) for part in parts(torch.arange(shape[0]))]
    held = rows_of(view, shape)
    assert all(any(rows <= part for part in expected) for rows in held)
    assert sorted([row for rows in held for row in rows]) == list(range(shape[0]))
    if not per_head:
        assert sorted(held, key=min) == sorted(expected, key=min)


@pytest.mark.parametrize(("model", "slot", "parts"), APART.values(), ids=APART)
def test_a_part_that_alone_has_a_gradient_moves_as_a_matrix_of_its_own(model, slot, parts):
    model = copy.deepcopy(model)
    weight, optimizer = model.get_parameter(f"{slot}.weight"), ASGO(route(model), lr=1.0, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for part in parts(torch.arange(len(weight))):
        optimizer.state.clear()
        before, weight.grad = weight.detach().clone(), torch.zeros_like(weight)
        weight.grad[part.flatten()] = torch.randn(part.numel(), *weight.shape[1:], generator=generator)
        optimizer.step()
        moved = (weight.detach() - before).flatten(1).square().mean(1)
        assert moved[part.flatten()].mean().sqrt() == pytest.approx(0.2, rel=1e-3)
        assert moved.count_nonzero() == part.numel()


def test_every_row_of_the_table_has_a_case():
    used = {each.how.rpartition("(")[2].rstrip(")") for model, _, _ in APART.values() for each in explain(model)}
    used |= {each.how.rpartition("(")[2].rstrip(")") for each in explain(nn.MultiheadAttention(D, 4))}
    assert {row.seen for row in LAYOUTS} <= used


UNKNOWN = {
    "grouped queries without a head size": Holder(n_head=32, qkv=(192, 128)),
    "sizes that contradict": Holder(num_heads=4, head_dim=5, qkv=(72, D)),
    "key heads that do not fit": Holder(num_heads=4, head_dim=6, num_kv_heads=3, qkv_proj=(48, D)),
    "twice the output: half heads, or keys and values": Holder(num_heads=4, qkv=(48, D), proj=(D, 24)),
    "by head, with fewer keys": Holder(num_heads=4, head_dim=6, num_key_value_heads=2, query_key_value=(48, D)),
    "by head, of another size": Holder(num_heads=4, head_dim=4, query_key_value=(72, D)),
    "fused by its name": Holder(num_heads=4, fused_attn_ff_proj=(80, D), out=(D, 24)),
    "rows that heads do not divide": Holder(num_heads=5, query_key_value=(72, D)),
    "three widths under an unknown name": Holder(num_heads=4, everything=(72, D), out=(D, 24)),
}


@pytest.mark.parametrize("model", UNKNOWN.values(), ids=UNKNOWN)
def test_a_size_that_is_not_known_leaves_the_weight_whole_and_is_said(model):
    with pytest.warns(UserWarning, match=r"nothing tells(.|\n)*Rule\('NAME', fused\(q=\.\.\., k=\.\.\., v=\.\.\."):
        groups = route(model)
    (matrices,) = groups
    assert View.of(matrices["views"][0]) == MATRIX
    assert sum(not each.known for each in explain(model)) == 1
    name = matrices["params"][0][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(model, [Rule(name, MATRIX)])


def test_a_rule_says_what_is_fused():
    model = UNKNOWN["sizes that contradict"]
    (group,) = route(model, [Rule("qkv.weight", fused(q=6, k=6, v=6, order="by head"))])
    held = rows_of(View.of(group["views"][0]), (72, D))
    assert held == [set(part.flatten().tolist()) for part in torch.arange(72).view(4, 3, 6).unbind(1)]


PLAIN = {
    "an MLP": Holder(num_heads=4, fc1=(96, D), fc2=(D, 96)),
    "an MLP of three widths": Holder(num_heads=4, fc1=(72, D), fc2=(D, 72)),
    "layers that halve": Holder(a=(64, 32), b=(48, 64), c=(24, 48), d=(12, 24)),
    "layers side by side": Holder(a=(48, D), b=(D, 24)),
    "queries wider than the model": Holder(
        num_heads=4, head_dim=12, q_proj=(48, D), k_proj=(48, D), v_proj=(48, D), o_proj=(D, 48)
    ),
}


@pytest.mark.parametrize("model", PLAIN.values(), ids=PLAIN)
def test_what_holds_one_matrix_stays_one(model):
    decisions = explain(model)
    assert {each.view for each in decisions} == {MATRIX}
    assert all(each.known for each in decisions)


HEADS = {
    "heads": (Holder(heads=4, to_q=(24, D), to_k=(24, D)), {"to_q.weight": 4, "to_k.weight": 4}),
    "grouped": (Holder(nhead=4, kv_heads=2, wq=(24, D), wk=(12, D)), {"wq.weight": 4, "wk.weight": 2}),
    "of a known size": (Holder(head_dim=6, wq=(24, D), wk=(12, D)), {"wq.weight": 4, "wk.weight": 2}),
    "a key with its value": (Holder(h=4, to_q=(24, D), to_kv=(48, D)), {"to_q.weight": 4}),
    "wrapped": (
        Holder(num_heads=4, q_proj=Holder(linear=(24, D)), k_proj=Holder(linear=(24, D))),
        {"q_proj.linear.weight": 4, "k_proj.linear.weight": 4},
    ),
    "gated": (
        Holder(num_attention_heads=4, head_dim=6, q_proj=(48, D), k_proj=(12, D)),
        {"q_proj.weight": 8, "k_proj.weight": 2},
    ),
    "of a narrower stream": (
        Holder(num_heads=4, head_dim=6, channel_shrink_ratio=2, layout_query=(12, D), layout_key=(12, D)),
        {"layout_query.weight": 4, "layout_key.weight": 4},
    ),
    "smaller than those of the values": (
        Holder(num_heads=4, q_proj=(12, D), k_proj=(12, D), v_proj=(D, D), o_proj=(D, D)),
        {"q_proj.weight": 4, "k_proj.weight": 4},
    ),
    "a multiple of the heads that is none": (
        Holder(num_attention_heads=4, head_dim=6, q_proj=(72, D), k_proj=(12, D)),
        {"q_proj.weight": 1, "k_proj.weight": 2},
    ),
}


@pytest.mark.parametrize(("model", "expected"), HEADS.values(), ids=HEADS)
def test_queries_and_keys_by_head(model, expected):
    found = views(model, per_head=True)
    assert {name: found[name].shapes(model.get_parameter(name).shape)[0][0] for name in expected} == expected


# ---- more than two axes, and stacks --------------------------------------------------------------------------------


def bare(**shapes: tuple[int, ...]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.randn(shape)))
    return model


def test_one_expert_is_read_as_two_are():
    def experts(count):
        found = views(bare(gate_up_proj=(count, 20, 8), down_proj=(count, 8, 10)))
        return {
            name: view and view.shapes((count, 20, 8) if "gate" in name else (count, 8, 10))
            for name, view in found.items()
        }

    assert experts(1) == {"gate_up_proj": [(2, 10, 8)], "down_proj": [(1, 8, 10)]}
    assert experts(2) == {"gate_up_proj": [(4, 10, 8)], "down_proj": [(2, 8, 10)]}
    assert views(nn.Bilinear(3, 4, 1))["weight"] == STACK


def test_expert_counts_of_neighbours_may_differ():
    view = views(bare(gate_up_proj=(5, 20, 8), down_proj=(3, 8, 10)))["gate_up_proj"]
    assert view.shapes((5, 20, 8)) == [(10, 10, 8)]


EINSUMS = {
    "in, heads, size": ("n h d", "m h d", (24, 4, 6), (24, 4, 6)),
    "heads, in, size": ("h n d", "h d m", (4, 24, 6), (4, 6, 24)),
    "heads, size, in": ("h d n", "h d m", (4, 6, 24), (4, 6, 24)),
}


@pytest.mark.parametrize(("source", "output", "shape", "out"), EINSUMS.values(), ids=EINSUMS)
def test_heads_as_an_axis_are_rows_of_one_projection(source, output, shape, out):
    model = bare(q=shape, k=shape, v=shape, o=out)
    model.config = SimpleNamespace(n_head=4, d_head=6)
    found, by_head, x, a = views(model), views(model, True), torch.randn(24), torch.randn(4, 6)
    heads_of = {
        name: torch.einsum(f"{source.replace(' ', '')},n->hd", model.get_parameter(name), x).detach() for name in "qkv"
    }
    for name, each in heads_of.items():
        (whole,) = found[name].matrices(model.get_parameter(name).detach())
        torch.testing.assert_close(whole @ x, each.flatten()[None])
    for name in "qk":
        (stack,) = by_head[name].matrices(model.get_parameter(name).detach())
        torch.testing.assert_close(stack @ x, heads_of[name])
    assert by_head["v"] == found["v"]
    (o,) = found["o"].matrices(model.o.detach())
    torch.testing.assert_close(
        o[0] @ a.flatten(), torch.einsum(f"{output.replace(' ', '')},hd->m", model.o, a).detach()
    )


@pytest.mark.parametrize(
    ("equation", "shape"),
    [("rmn,n->rm", (3, 24, 24)), ("rhdn,n->rhd", (3, 4, 6, 24)), ("nrhd,n->rhd", (24, 3, 4, 6))],
)
def test_query_key_and_value_along_an_axis(equation, shape):
    model, x = bare(qkv=shape), torch.randn(24)
    model.num_heads, model.head_dim = 4, 6
    expected = torch.einsum(equation, model.qkv, x).detach().reshape(3, 24)
    (whole,) = views(model)["qkv"].matrices(model.qkv.detach())
    torch.testing.assert_close(whole @ x, expected)
    q, k, v = views(model, True)["qkv"].matrices(model.qkv.detach())
    torch.testing.assert_close(torch.stack([(q @ x).flatten(), (k @ x).flatten(), (v @ x).flatten()]), expected)
    assert (q.shape, v.shape) == ((4, 6, 24), (1, 24, 24))


def test_experts_and_groups_along_the_rows_are_matrices_of_their_own():
    experts = bare(w1=(60, 8), w2=(60, 8))
    experts.moe_num_experts, experts.ffn_hidden_size = 5, 12
    assert {view.shapes((60, 8))[0] for view in views(experts).values()} == {(5, 12, 8)}

    class GroupedLinear(nn.Linear):
        n_groups = 3

    assert views(GroupedLinear(8, 12, bias=False))["weight"].shapes((12, 8)) == [(3, 4, 8)]
    router = bare(weight=(5, 8))
    router.num_experts, router.hidden = 5, 8
    assert views(router)["weight"] == MATRIX


def test_depthwise_kernels_are_rows_of_one_matrix_whatever_their_multiplier():
    for layer, rows in [
        (nn.ConvTranspose1d(8, 8, 4, groups=8), 8),
        (nn.ConvTranspose1d(8, 16, 4, groups=8), 16),
        (nn.Conv1d(8, 16, 4, groups=8), 16),
    ]:
        (stack,) = views(layer)["weight"].matrices(layer.weight.detach())
        assert stack.shape == (1, rows, 4)
        assert torch.equal(stack[0], layer.weight.detach().reshape(rows, 4))


def test_kernels_over_channels_in_a_class_of_its_own():
    assert views(named("CausalConv1d", weight=nn.Parameter(torch.randn(8, 1, 4))))["weight"].shapes((8, 1, 4)) == [
        (1, 8, 4)
    ]


def lora(base: nn.Module, rank: int, **attributes: object) -> nn.Module:
    """A layer of PEFT."""
    rows, columns = base.weight.shape
    factors = {"lora_A": (rank, columns), "lora_B": (rows, rank)}
    inner = {name: nn.ModuleDict({"default": nn.Linear(n, m, bias=False)}) for name, (m, n) in factors.items()}
    return Holder(base_layer=base.requires_grad_(False), **inner, **attributes)


def test_adapters_are_read_as_what_they_adapt():
    linear = {name: nn.Linear(24, rows, bias=False) for name, rows in (("qkv", 48), ("q_proj", 24), ("gate_up", 40))}
    model = Holder(
        num_heads=4,
        num_kv_heads=2,
        q_proj=lora(linear["q_proj"], 3),
        k_proj=(12, D),
        qkv=lora(linear["qkv"], 3),
        mlp=Holder(gate_up_proj=lora(linear["gate_up"], 3), down_proj=lora(nn.Linear(20, 24, bias=False), 3)),
    )
    found = views(model)
    assert rows_of(found["qkv.lora_B.default.weight"], (48, 3)) == [set(range(24)), {*range(24, 36)}, {*range(36, 48)}]
    assert rows_of(found["mlp.gate_up_proj.lora_B.default.weight"], (40, 3)) == [set(range(20)), set(range(20, 40))]
    assert found["qkv.lora_A.default.weight"] == found["mlp.down_proj.lora_B.default.weight"] == MATRIX
    assert views(model, True)["q_proj.lora_B.default.weight"].shapes((24, 3)) == [(4, 6, 3)]


@pytest.mark.parametrize("rows", [12, 24, 48, 72, 96])
def test_adapters_of_a_plain_layer_are_one_matrix_each(rows):
    """Also of one with twice or three times as many outputs as inputs, which looks fused."""
    model = Holder(num_heads=4, mlp=Holder(up_proj=lora(nn.Linear(24, rows, bias=False), 3), down_proj=(24, rows)))
    found = explain(model)
    assert [each.view for each in found if "lora" in each.name] == [MATRIX, MATRIX]
    assert all(each.known for each in found)


def test_adapters_of_stacked_experts_are_a_matrix_each():
    experts = lora(nn.Linear(24, 10, bias=False), 3 * 2, num_experts=3)
    a, b = experts.lora_A["default"].weight, experts.lora_B["default"].weight
    found = views(Holder(mlp=Holder(experts=experts)))
    (A,) = found["mlp.experts.lora_A.default.weight"].matrices(a)
    (B,) = found["mlp.experts.lora_B.default.weight"].matrices(b)
    delta = torch.einsum("ore,eri->eoi", b.reshape(10, -1, 3), a.reshape(3, -1, 24))  # as PEFT computes it
    torch.testing.assert_close(B @ A, delta)


def test_projections_of_several_codes_in_one_weight():
    model = Holder(
        num_heads=4,
        head_dim=6,
        q_proj=bare(weight=(3, 24, 8)),
        k_proj=bare(weight=(3, 12, 8)),
        qkv=bare(weight=(3, 72, 24)),
    )
    model.qkv.in_features = 24
    found, by_head = views(model), views(model, True)
    assert {name: view.shapes(model.get_parameter(name).shape) for name, view in found.items()} == {
        "q_proj.weight": [(3, 24, 8)],
        "k_proj.weight": [(3, 12, 8)],
        "qkv.weight": [(3, 24, 24)] * 3,
    }
    assert by_head["q_proj.weight"].shapes((3, 24, 8)) == [(12, 6, 8)]
    assert by_head["k_proj.weight"].shapes((3, 12, 8)) == [(6, 6, 8)]


def test_fused_convolutions():
    model = Holder(num_heads=4, qkv=nn.Conv2d(24, 72, 1))
    assert views(model)["qkv.weight"].shapes((72, 24, 1, 1)) == [(1, 24, 24)] * 3
    conformer = Holder(a=nn.Conv1d(24, 48, 1), b=nn.Conv1d(24, 24, 3, groups=24), c=nn.Conv1d(24, 24, 1))
    held = rows_of(views(conformer)["a.weight"], (48, 24, 1))
    assert held == [set(range(24)), set(range(24, 48))]


# ---- fused by hand ---------------------------------------------------------------------------------------------------


def test_fused_by_hand():
    assert rows_of(fused(q=4, k=2, v=2), (8, 3)) == [{0, 1, 2, 3}, {4, 5}, {6, 7}]
    assert rows_of(fused(q=2, k=2, order="by head"), (8, 3)) == [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert rows_of(fused(parts={"gate": 1, "up": 1}, order="alternating"), (6, 3)) == [{0, 2, 4}, {1, 3, 5}]
    assert rows_of(fused(q=4, k=2, v=2, order="by group"), (16, 3)) == [
        {0, 1, 2, 3, 8, 9, 10, 11},
        {4, 5, 12, 13},
        {6, 7, 14, 15},
    ]
    assert rows_of(fused(q=4, k=2, v=2, order="by group", head_dim=2), (16, 3)) == [
        *({0, 1}, {2, 3}, {8, 9}, {10, 11}, {4, 5}, {12, 13}),
        {6, 7, 14, 15},
    ]
    assert rows_of(fused(q=2, k=2, v=2, transposed=True), (3, 6), 1) == [{0, 1}, {2, 3}, {4, 5}]
    assert fused(q=4, k=4, v=4, head_dim=2).shapes((12, 3)) == [(2, 2, 3), (2, 2, 3), (1, 4, 3)]
    assert fused(parts={"v": 5}) == MATRIX
    assert fused(parts={"v": 5}, transposed=True) == TRANSPOSED


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (fused, r"needs parts of one row or more; got {}. Pass q=, k= and v=, or parts="),
        (lambda: fused(parts={"q": 0}), r"needs parts of one row or more; got {'q': 0}"),
        (lambda: fused(q=2, order="headwise"), r"order='headwise' .* choose from 'blocks', 'by head', 'by group'"),
        (lambda: fused(q=6, k=4, head_dim=4), r"head_dim=4 does not divide the rows of q in {'q': 6, 'k': 4}"),
    ],
)
def test_a_fused_weight_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()
