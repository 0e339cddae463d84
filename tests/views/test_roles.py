"""Roles: vocabulary heads, tables, gains and biases are AdamW's, whatever their class and number of axes."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as hf
from test_layouts import Holder, bare, views
from torch import nn

from asgo.views.defaults import default_views
from asgo.views.routing import explain

SMALL = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 28}
TEXT = {
    **SMALL,
    "vocab_size": 60,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA = hf.LlamaConfig(**TEXT, num_key_value_heads=2)
V, D = 60, 24


def block() -> nn.Module:
    return Holder(up=(48, D), down=(D, 48), wide=(V, D), narrow=(D, V))


def model(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"embed": nn.Embedding(V, D), "blocks": nn.ModuleList([block(), block()]), **layers})


def tied() -> nn.Module:
    net = model(decoder=nn.Linear(D, V))
    net["decoder"].weight = net["embed"].weight
    return net


HEADS = {
    "last": (model(head=nn.Linear(D, V)), ["head.weight"]),
    "a value head after it": (model(lm_head=nn.Linear(D, V), value=nn.Linear(D, 1)), ["lm_head.weight"]),
    "before the blocks": (
        nn.ModuleDict({"head": nn.Linear(D, V), "embed": nn.Embedding(V, D), "blocks": nn.ModuleList([block()])}),
        ["head.weight"],
    ),
    "in a sequence": (nn.Sequential(nn.Embedding(V, D), block(), block(), nn.Linear(D, V)), ["3.weight"]),
    "several": (model(heads=nn.ModuleList(nn.Linear(D, V) for _ in range(3))), [f"heads.{i}.weight" for i in range(3)]),
    "several with layers of their own": (
        model(more=nn.ModuleList(nn.Sequential(nn.Linear(D, 23), nn.SiLU(), nn.Linear(23, V)) for _ in range(2))),
        ["more.0.2.weight", "more.1.2.weight"],
    ),
    "padded": (model(head=nn.Linear(D, V - 1)), ["head.weight"]),
    "padded to a multiple": (
        nn.ModuleDict({"embed": nn.Embedding(50257, D), "head": nn.Linear(D, 50304)}),
        ["head.weight"],
    ),
    "padded much, the last": (
        nn.ModuleDict({"embed": nn.Embedding(1000, D), "blocks": nn.ModuleList([block()]), "out": nn.Linear(D, 1024)}),
        ["out.weight"],
    ),
    "factorised": (
        nn.ModuleDict({"embed": nn.Embedding(V, 8), "project": nn.Linear(8, D), "to_logits": nn.Linear(D, V)}),
        ["to_logits.weight"],
    ),
    "a convolution": (model(head=nn.Conv1d(D, V, 1)), ["head.weight"]),
    "adaptive softmax": (
        model(out=nn.AdaptiveLogSoftmaxWithLoss(D, V, [20, 40])),
        ["out.head.weight", "out.tail.0.0.weight", "out.tail.0.1.weight", "out.tail.1.0.weight", "out.tail.1.1.weight"],
    ),
    "one weight for several codes": (model(out=bare(weight=(3, D, V))), ["out.weight"]),
    "on a body that knows of none": (
        nn.ModuleDict({"body": hf.LlamaModel(LLAMA), "lm_head": nn.Linear(D, V, bias=False)}),
        ["lm_head.weight"],
    ),
    "in a wrapper": (
        model(lm_head=Holder(original=nn.Linear(D, V), saved=nn.ModuleDict({"default": nn.Linear(D, V)}))),
        ["lm_head.original.weight", "lm_head.saved.default.weight"],
    ),
    "of a transducer, with a blank": (
        Holder(
            encoder=nn.ModuleList([block(), block()]),
            predictor=nn.ModuleDict({"embed": nn.Embedding(41, 8), "rnn": nn.LSTM(8, D)}),
            joint=Holder(encoded=(D, D), predicted=(D, D), net=nn.Sequential(nn.Tanh(), nn.Linear(D, 42))),
        ),
        ["joint.net.1.weight"],
    ),
    **{
        f"{name}, no vocabulary is told": (
            Holder(conv=nn.Conv1d(1, D, 3), blocks=nn.ModuleList([block(), block()]), **{name: head}),
            [f"{name}{'.1' if isinstance(head, nn.Sequential) else ''}.weight"],
        )
        for name, head in {
            "ctc_head": nn.Linear(D, 29),
            "ctc_proj": nn.Conv1d(D, 29, 1),
            "head_ctc": nn.Sequential(nn.Linear(D, D), nn.Linear(D, 29)),
            "lm_head": nn.Linear(D, 29, bias=False),
            "vocab_proj": nn.Linear(D, 29),
        }.items()
    },
    "and what it reads, one of all tokens": (
        Holder(tokens=(D, 99), blocks=nn.ModuleList([block(), block()]), lm_head=(99, D)),
        ["lm_head.weight", "tokens.weight"],
    ),
    "beside hidden layers of the same shapes": (
        Holder(embed=nn.Embedding(V, D), up=(V, D), down=(D, V), lm_head=(V, D)),
        ["lm_head.weight"],
    ),
    "with a bias, tied": (tied(), ["decoder.weight"]),
    "of letters": (
        hf.Wav2Vec2ForCTC(
            hf.Wav2Vec2Config(
                **SMALL,
                vocab_size=30,
                conv_dim=[16] * 2,
                conv_stride=[2] * 2,
                conv_kernel=[2] * 2,
                num_conv_pos_embedding_groups=4,
            )
        ),
        ["lm_head.weight"],
    ),
}


@pytest.mark.parametrize(("net", "names"), HEADS.values(), ids=HEADS)
def test_vocabulary_heads(net, names):
    found = views(net)
    assert {name for name in names if found.get(name) is not None} == set()
    hidden = (".up.weight", ".wide.weight", "project.weight")
    assert all(view is not None for name, view in found.items() if name.endswith(hidden))


NOT_HEADS = {
    "two classes and two segments": nn.ModuleDict(
        {"embed": nn.Embedding(V, D), "segment": nn.Embedding(2, D), "classifier": nn.Linear(D, 2)}
    ),
    "as many classes as positions": nn.ModuleDict(
        {"embed": nn.Embedding(V, D), "position": nn.Embedding(16, D), "classifier": nn.Linear(D, 16)}
    ),
    "a classifier after a head of Hugging Face": hf.BertForSequenceClassification(hf.BertConfig(**TEXT)),
    "a layer inside a block": model(classifier=nn.Linear(D, 5)),
}

NUMBERED = nn.ModuleDict(
    {"embed": nn.Embedding(V, D), "layers": nn.ModuleDict({"0": block(), "1": block()}), "lm_head": nn.Linear(D, V)}
)
"""Blocks in a dictionary by number, as torchtitan has them; some layers are as long as the vocabulary by chance."""


def test_blocks_in_a_dictionary_by_number_are_blocks():
    found = views(NUMBERED)
    assert {name for name, view in found.items() if view is None} == {"embed.weight", "lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize("net", NOT_HEADS.values(), ids=NOT_HEADS)
def test_a_classifier_is_a_matrix(net):
    assert views(net)["classifier.weight"] is not None


class OwnEmbedding(nn.Module):
    """A table as model parallel libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = 50, 8
        self.weight = nn.Parameter(torch.randn(50, 8))


class GroupNormalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 6))


GroupNormalized.__name__ = "HeadwiseRMSNorm"


def own(name: str, **attributes: object) -> nn.Module:
    return type(name, (Holder,), {})(**attributes)


TABLES = {
    "states before the first": bare(
        h0=(2, 1, 8), init_state=(2, 8), initial_hidden=(2, 8), null_kv=(2, 4, 8), mem_kv=(2, 4, 8, 8)
    ),
    "own classes by their names": Holder(
        a=own("EmbeddingTable", weight=nn.Parameter(torch.randn(9, 8))),
        b=own("LearnedPositions", weight=nn.Parameter(torch.randn(9, 8))),
        c=own("Words", num_embeddings=9, weight=nn.Parameter(torch.randn(9, 8))),
        d=own("PositionalEncoding", weight=nn.Parameter(torch.randn(1, 9, 8))),
        e=own("RelativePositionBias", heads=nn.Parameter(torch.randn(4, 9))),
        f=own("QuantEmbedding", weight=nn.Parameter(torch.randn(9, 8)), num=9),
    ),
    "positions of every number of axes": bare(
        pos_y=(1, 14, 1, 8), pos_t=(8, 1, 1, 8), abs_pos=(1, 3, 14, 14, 8), rel_h=(27, 8), pos=(7, 8), pos_xy=(3, 3, 8)
    ),
    "tables": bare(
        W_E=(48, 24),
        pos_emb=(16, 24),
        queries=(10, 24),
        register_tokens=(4, 24),
        scale_shift_table=(6, 24),
        latents=(5, 24),
        mask_tokens=(1, 3, 24),
        cls_register_token=(3, 24),
        latents_1d=(3, 24),
        positional_embedding_vlm=(9, 24),
    ),
    "of more axes": bare(
        head_scale=(4, 1, 6),
        rpb=(4, 15, 15),
        position_embedding_table=(2, 9, 8),
        memory_temporal_positional_encoding=(7, 1, 1, 6),
        mid_position_embeddings=(7, 1, 9, 6),
        pos_frequencies=(3, 4, 5),
        qk_norm_q_scale=(4, 1, 6),
    ),
    "decays": bare(A_log=(4, 8), D=(2, 8), dt_bias=(2, 8)),
    "biases of experts": bare(w1=(3, 4, 5), b1=(3, 4), W_Q=(3, 4, 5), b_Q=(3, 5), up=(3, 4, 5), up_bias=(3, 5)),
    "an own class": OwnEmbedding(),
    "an own class by its name": type("VocabParallelEmbedding", (nn.Module,), {"__init__": nn.Module.__init__})(),
    "a gain": GroupNormalized(),
    "several axes in a list": Holder(
        pos=type("AxialPositionEmbeddings", (Holder,), {})(
            weights=nn.ParameterList([nn.Parameter(torch.randn(8, 1, 6)), nn.Parameter(torch.randn(1, 8, 6))])
        )
    ),
    "a linear layer that is looked up": Holder(rel_pos_bias=(4, 32)),
    "old weight_norm of gates": nn.utils.weight_norm(nn.LSTM(4, 8), "weight_hh_l0"),
    "old weight_norm of attention": nn.utils.weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
}
TABLES["an own class by its name"].weight = nn.Parameter(torch.randn(50, 8))
MATRICES = {
    *("w1", "W_Q", "up", "weight_ih_l0", "weight_hh_l0_v", "in_proj_weight_v", "out_proj.weight"),
}


@pytest.mark.parametrize("net", TABLES.values(), ids=TABLES)
def test_tables_and_gains(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = views(net)
    assert {name for name, view in found.items() if view is not None} <= MATRICES
    assert all(found[name] is not None for name in MATRICES & set(found))


def test_matrices_of_modules_that_are_not_known():
    found = views(
        bare(
            time_decay_w1=(4, 5),
            weight=(4, 5),
            in_weight=(1, 4, 5),
            proj=(6, 4),
            expert_kernels=(3, 4, 5),
            token_proj=(4, 6),
        )
    )
    assert all(view is not None for view in found.values())


def test_what_nothing_is_known_of_is_said():
    decisions = {each.name: each for each in explain(bare(zork=(4, 5), glim=(1, 4, 5), weight=(4, 5)))}
    assert {name: each.known for name, each in decisions.items()} == {"zork": False, "glim": False, "weight": True}


def test_every_decision_says_why():
    decisions = explain(hf.LlamaForCausalLM(LLAMA))
    assert all(each.how for each in decisions)
    hows = {each.name.rpartition("layers.0.")[2]: each.how for each in decisions}
    assert hows["model.embed_tokens.weight"] == "table of Embedding"
    assert hows["lm_head.weight"] == "vocabulary head"
    assert hows["self_attn.k_proj.weight"] == "k_proj: 2 heads"
    assert hows["input_layernorm.weight"] == "vector"
    assert hows["mlp.down_proj.weight"] == "Linear"


def test_names_alone():
    w = nn.Parameter(torch.zeros(4, 3))
    tables = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "h.wte.weight",
        "pos_embed",
        "blocks.0.norm1.weight",
        "wpe",
    ]
    assert default_views((name, w) for name in tables) == [None] * len(tables)
    matrices = ["weight", "embed_norm_proj.weight", "head_proj.weight", "blocks.0.mlp.fc1.weight"]
    assert None not in default_views((name, w) for name in matrices)


def test_seventy_billion_parameters_are_routed_in_seconds():
    config = hf.LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    )
    with torch.device("meta"):
        net = hf.LlamaForCausalLM(config)
    kinds = {each.how for each in explain(net)}
    assert kinds == {"table of Embedding", "vocabulary head", "vector", "Linear", "q_proj: 64 heads", "k_proj: 8 heads"}
