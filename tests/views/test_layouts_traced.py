"""The experiment on layouts: it tells right views from wrong ones, and finds the views of small real models right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional as F

from asgo.views import MATRIX, View, fused
from asgo.views.routing import Decision
from benchmarks.layouts.hugging_face import one_model, run_family
from benchmarks.layouts.trace import judge, trace, verdicts


class Attention(nn.Module):
    """Two queries, their key and value by group, in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.anything = nn.Linear(8, 2 * 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.anything(x).view(1, -1, 2, 16).transpose(1, 2).split([8, 4, 4], -1)
        k, v = (part.repeat_interleave(2, 1) for part in (k, v))
        return F.scaled_dot_product_attention(q.unflatten(-1, (2, 4)).transpose(2, 3).flatten(1, 2), k, v)


VIEWS = {
    "right": fused(q=8, k=4, v=4, order="by group"),
    "whole": MATRIX,
    "WRONG": fused(q=16, k=8, v=8),
}


@pytest.mark.parametrize(("verdict", "view"), VIEWS.items(), ids=VIEWS)
def test_the_experiment_tells_right_from_wrong(verdict: str, view: View) -> None:
    model = Attention()
    seen = trace(model, lambda: model(torch.randn(1, 5, 8)))["anything.weight"]
    found = judge(Decision("anything.weight", (32, 8), view, ""), seen)
    assert found is not None
    assert (found.verdict, sum(found.parts)) == (verdict, 32)


TEXT: dict[str, Any] = {"vocab_size": 40, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "falcon, by group": lambda: hf.FalconModel(
        hf.FalconConfig(**TEXT, new_decoder_architecture=True, num_kv_heads=2, attn_implementation="sdpa")
    ),
    "bloom, by head": lambda: hf.BloomModel(hf.BloomConfig(vocab_size=40, hidden_size=48, n_layer=1, n_head=4)),
    "deepseek, by head and uneven": lambda: hf.DeepseekV3Model(
        hf.DeepseekV3Config(
            **TEXT,
            intermediate_size=80,
            num_key_value_heads=4,
            kv_lora_rank=20,
            q_lora_rank=24,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=6,
            first_k_dense_replace=1,
            attn_implementation="sdpa",
        )
    ),
}


PARTS = {
    "falcon, by group": ("query_key_value", (48, 24, 24)),
    "bloom, by head": ("query_key_value", (48, 48)),
    "deepseek, by head and uneven": ("kv_b_proj", (32, 24)),
}
"""Rows of the parts that meet in a product or are computed with apart, in all; the value of BLOOM is not followed."""


@pytest.mark.parametrize("name", MODELS)
def test_views_of_real_models_are_right(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    found = {
        each.name.split(".")[-2]: each for each in verdicts(model, trace(model, lambda: model(torch.arange(6)[None])))
    }
    assert "WRONG" not in {each.verdict for each in found.values()}
    weight, parts = PARTS[name]
    assert found[weight].parts == parts
    assert found[weight].verdict in ("right", "separate, apart")


FAMILIES = {
    "gpt_neox": {"query_key_value": (48, 48, 48)},
    "codegen": {"qkv_proj": (48, 48, 48)},
    "gpt_bigcode": {"c_attn": (48, 12, 12)},
    "phi3": {"qkv_proj": (48, 24, 24), "gate_up_proj": (80, 80)},
    "modernbert": {"Wqkv": (48, 48, 48), "Wi": (80, 80)},
    "gpt2": {"c_attn": (48, 48, 48)},
    "mamba": {"in_proj": (80, 80), "x_proj": (3, 10, 10)},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_by_name(kind: str) -> None:
    judged = list(verdicts(*run_family(kind)))
    found = {each.name.split(".")[-2]: each for each in judged}
    for name, parts in FAMILIES[kind].items():
        assert sorted(found[name].parts) == sorted(parts)
        assert found[name].verdict in ("right", "separate, apart")
    assert not {"WRONG", "whole"} & {each.verdict for each in judged}


SAVED = {
    "text": (
        lambda: hf.Phi3Model(
            hf.Phi3Config(**TEXT, intermediate_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
        ),
        ("qkv_proj.weight | 48+24+24 |", "gate_up_proj.weight | 64+64 |"),
    ),
    "grey images in bfloat16": (
        lambda: hf.ViTModel(
            hf.ViTConfig(
                hidden_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=40,
                patch_size=8,
                num_channels=1,
            )
        ).bfloat16(),
        ("\nNone has parts that are kept apart.\n",),
    ),
}
"""Models to save, and what the table of their folder holds."""


@pytest.mark.parametrize("name", SAVED)
def test_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, expected = SAVED[name]
    model = build()
    model.save_pretrained(tmp_path / "small")
    one_model(str(tmp_path / "small"))
    table = capsys.readouterr().out
    for part in expected:
        assert part in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| small |")]
    assert {row[4] for row in rows} <= {"right", "separate, apart"}
    assert f"\n{type(model).__name__}, transformers {hf.__version__}: " in table


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has no config.json"):
        one_model(str(tmp_path))
    with pytest.raises(SystemExit, match="neither a folder nor a family .* did you mean falcon"):
        one_model("falcn")
