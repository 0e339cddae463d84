"""The views of real models against the rows that their own forward uses together."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from asgo.views.routing import Rule, explain

PATH = Path(__file__).parents[2] / "benchmarks" / "layouts.py"
SPEC = importlib.util.spec_from_file_location("layouts_by_experiment", PATH)
assert SPEC is not None
assert SPEC.loader is not None
layouts = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = layouts
SPEC.loader.exec_module(layouts)

FAMILIES = {
    "gpt_neox": {"query_key_value": (48, 48, 48)},
    "falcon": {"query_key_value": (48, 12, 12)},
    "codegen": {"qkv_proj": (48, 48, 48)},
    "gpt_bigcode": {"c_attn": (48, 12, 12)},
    "phi3": {"qkv_proj": (48, 24, 24), "gate_up_proj": (80, 80)},
    "modernbert": {"Wqkv": (48, 48, 48), "Wi": (80, 80)},
    "gpt2": {"c_attn": (48, 48, 48)},
    "deepseek_v3": {"kv_b_proj": (32, 32)},
    "qwen3_next": {"q_proj": (48, 48)},
    "mamba": {"in_proj": (80, 80), "x_proj": (3, 10, 10)},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_matrix_holds_rows_that_the_forward_keeps_apart(kind):
    model, seen = layouts.run_family(kind)
    judged = [layouts.judge(each, seen[each.name]) for each in explain(model) if each.name in seen]
    found = {each.name.split(".")[-2]: each for each in judged if each is not None}
    for name, parts in FAMILIES[kind].items():
        assert sorted(found[name].parts) == sorted(parts)
        assert found[name].verdict in ("right", "separate, apart")
    assert not [each for each in judged if each is not None and each.verdict in ("WRONG", "whole")]


class Attention(nn.Module):
    """Queries, keys and values in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("view", "verdict"),
    [
        (None, "right"),
        ("m n -> 1 m n", "whole"),
        ("(h r d) n -> r (h d) n", "WRONG"),
        ("(h d) n -> h d n", "right"),
    ],
)
def test_the_experiment_sees_a_wrong_view(view, verdict):
    model = Attention()
    seen = layouts.trace(model, lambda: model(torch.randn(1, 5, 8)))
    sizes = {"r": 3, "d": 4} if view == "(h r d) n -> r (h d) n" else {"d": 4} if view == "(h d) n -> h d n" else {}
    rules = [] if view is None else [Rule("qkv.weight", {"pattern": view, "sizes": sizes})]
    decision = next(each for each in explain(model, rules) if each.name == "qkv.weight")
    judged = layouts.judge(decision, seen["qkv.weight"])
    assert judged.parts == (8, 8, 8)
    assert judged.verdict == verdict
