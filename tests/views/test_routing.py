"""Routing: every trainable parameter in exactly one group, and heads where the model's own forward has them."""

import io
from collections import Counter
from fnmatch import fnmatchcase
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from asgo.views import MATRIX, STACK, View, heads
from asgo.views.defaults import default_views
from asgo.views.patterns import label
from asgo.views.routing import Rule
from asgo.views.routing import route as route_by_default

route = partial(route_by_default, per_head=True)

SIZE = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 28}
TEXT = {**SIZE, "vocab_size": 48, "max_position_embeddings": 16}
TOKENS = torch.arange(10).reshape(2, 5)
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2(**options):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=24, n_layer=1, n_head=4, n_positions=16, vocab_size=48, **IDS, **options)
    )


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, **options))


def bert(kind=hf.BertForMaskedLM, **options):
    return kind(hf.BertConfig(**TEXT, **options))


def t5(kind=hf.T5ForConditionalGeneration):
    return kind(hf.T5Config(d_model=24, d_kv=5, d_ff=28, num_layers=1, num_heads=4, vocab_size=48))


def deepseek():
    small = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    experts = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**TEXT, **small, **experts, num_key_value_heads=4, first_k_dense_replace=0)
    )


def whisper():
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ffn = {"encoder_ffn_dim": 28, "decoder_ffn_dim": 28, "max_source_positions": 8, "max_target_positions": 8}
    config = hf.WhisperConfig(d_model=24, num_mel_bins=6, vocab_size=48, **layers, **ffn, **IDS)
    return hf.WhisperForConditionalGeneration(config)


def clip():
    text = {**TEXT, **IDS, "projection_dim": 20}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config={**SIZE, "image_size": 8, "patch_size": 4}))


class CharGPT(nn.Module):
    """A small model in plain PyTorch, its head tied or not."""

    def __init__(self, tied=False, vocabulary=24):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, 24), nn.Embedding(8, 24)
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 32, batch_first=True), 1)
        self.head = nn.Linear(24, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class NanoAttention(nn.Module):
    """Fused attention with a Linear ``c_attn``, as small GPTs are often written."""

    def __init__(self, d=24, n_head=4):
        super().__init__()
        self.n_head, self.c_attn, self.c_proj = n_head, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1))
        return self.c_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5))
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5))
        self.gate_weight, self.gate_bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 5))
        self.pos_embed, self.cls_token = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(1, 1, 4))
        self.latents, self.gain = nn.Parameter(torch.randn(1, 6, 4)), nn.Parameter(torch.randn(4, 1, 1))
        self.projection, self.kernel = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 3, 2, 2))


def misleading():
    names = ("embed", "layer_norm", "bias", "lm_head", "position_embeddings", "wte")
    return nn.ModuleDict({name: nn.Linear(4, 6) for name in names})


def weight_normed():
    old = nn.utils.spectral_norm(nn.Linear(4, 6))
    modules = [parametrizations.weight_norm(nn.Linear(4, 6)), parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), old]
    return nn.Sequential(*modules, parametrizations.orthogonal(nn.Linear(4, 4)))


# For every model: names that must be there, and the group they must be in. Other rows of the same model say
# what a certain option changes.
MODELS = {
    "gpt2": (
        gpt2,
        {
            "*.wte.weight": "adamw",
            "*.wpe.weight": "adamw",
            "*.bias": "adamw",
            "*.ln_*.weight": "adamw",
            "*.attn.c_attn.weight": "3 parts (d=6, 24+24+24)",
            "*.attn.c_proj.weight": "transposed matrix",
            "*.mlp.c_*.weight": "transposed matrix",
        },
    ),
    "gpt2 untied": (partial(gpt2, tie_word_embeddings=False), {"*.wte.weight": "adamw", "lm_head.weight": "adamw"}),
    "gpt2 without head": (lambda: gpt2().transformer, {"h.0.mlp.c_proj.weight": "transposed matrix"}),
    "gpt2 with cross attention": (
        partial(gpt2, add_cross_attention=True),
        {
            "*.crossattention.c_attn.weight": "2 parts (d=6, 24+24)",
            "*.crossattention.q_attn.weight": "transposed heads (h=4)",
            "*.crossattention.c_proj.weight": "transposed matrix",
        },
    ),
    "llama": (
        llama,
        {
            "model.embed_tokens.weight": "adamw",
            "lm_head.weight": "adamw",
            "*norm.weight": "adamw",
            "*.q_proj.weight": "heads (h=4)",
            "*.k_proj.weight": "heads (h=2)",
            "*.[vo]_proj.weight": "matrix",
            "*.mlp.*.weight": "matrix",
        },
    ),
    "llama tied": (partial(llama, tie_word_embeddings=True), {"model.embed_tokens.weight": "adamw"}),
    "llama with one key head": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
        {"*.q_proj.weight": "heads (h=4)", "*.k_proj.weight": "matrix"},
    ),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, num_key_value_heads=2)),
        {"*.q_proj.weight": "heads (h=4)", "*.k_proj.weight": "heads (h=2)", "*.[qkv]_proj.bias": "adamw"},
    ),
    "qwen3": (
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8)),
        {"*.q_proj.weight": "heads (h=4)", "*.k_proj.weight": "heads (h=2)", "*.[qk]_norm.weight": "adamw"},
    ),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=3)),
        {"*.gate_up_proj": "stack of gates (g=2)", "*.experts.down_proj": "stack", "*.mlp.gate.weight": "matrix"},
    ),
    "gpt-oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**TEXT, num_key_value_heads=2, num_local_experts=3, head_dim=6, **IDS)
        ),
        {
            "*.experts.gate_up_proj": "stack of gates (g=2)",
            "*.experts.down_proj": "stack",
            "*.experts.*_bias": "adamw",
            "*.sinks": "adamw",
            "*.k_proj.weight": "heads (h=2)",
        },
    ),
    "deepseek": (
        deepseek,
        {"*.q_b_proj.weight": "heads (h=4)", "*.q_a_proj.weight": "matrix", "*.kv_a_proj*": "2 parts (8+4)"},
    ),
    "phi3": (
        lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, num_key_value_heads=2, **IDS)),
        {"*.qkv_proj.weight": "3 parts (d=6, 24+12+12)", "*.gate_up_proj.weight": "gates (g=2)"},
    ),
    "gpt-neox": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)),
        {"*.query_key_value.weight": "heads (d=6)", "*.embed_in.weight": "adamw"},
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=24, n_layer=1, n_head=4, vocab_size=48)),
        {"*.query_key_value.weight": "heads (d=6)", "*.dense_h_to_4h.weight": "matrix"},
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(**SIZE, vocab_size=48, new_decoder_architecture=True, num_kv_heads=2)
        ),
        {"*.query_key_value.weight": "heads (d=6)"},
    ),
    "modernbert": (
        lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**TEXT, **IDS, cls_token_id=3, sep_token_id=4)),
        {"*.Wqkv.weight": "3 parts (d=6, 24+24+24)", "*.Wo.weight": "matrix", "head.dense.weight": "matrix"},
    ),
    "bert": (
        bert,
        {
            "*.*_embeddings.weight": "adamw",
            "*.self.query.weight": "heads (h=4)",
            "*.self.key.weight": "heads (h=4)",
            "*.self.value.weight": "matrix",
            "*.dense.weight": "matrix",
            "cls.predictions.bias": "adamw",
        },
    ),
    "bert untied": (partial(bert, tie_word_embeddings=False), {"cls.predictions.decoder.weight": "adamw"}),
    "bert classifier": (
        partial(bert, hf.BertForSequenceClassification),
        {"classifier.weight": "matrix", "bert.pooler.dense.weight": "matrix"},
    ),
    "distilbert": (
        lambda: hf.DistilBertModel(hf.DistilBertConfig(dim=24, n_layers=1, n_heads=4, hidden_dim=28, vocab_size=48)),
        {"*.[qk]_lin.weight": "heads (h=4)", "*.v_lin.weight": "matrix", "*.lin1.weight": "matrix"},
    ),
    "deberta-v2": (
        lambda: hf.DebertaV2Model(hf.DebertaV2Config(**TEXT)),
        {"*.query_proj.weight": "heads (h=4)", "*.key_proj.weight": "heads (h=4)", "*.value_proj.weight": "matrix"},
    ),
    "t5": (
        t5,
        {
            "shared.weight": "adamw",
            "*.relative_attention_bias.weight": "adamw",
            "*.[qk].weight": "heads (h=4)",
            "*.[vo].weight": "matrix",
        },
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3)),
        {
            "*.cls_token": "adamw",
            "*.position_embeddings": "adamw",
            "*.projection.weight": "conv2d",
            "classifier.weight": "matrix",
        },
    ),
    "whisper": (
        whisper,
        {"*.q_proj.weight": "heads (h=4)", "*.k_proj.weight": "heads (h=4)", "*.conv[12].weight": "conv1d"},
    ),
    "clip": (
        clip,
        {
            "*.q_proj.weight": "heads (h=4)",
            "*.patch_embedding.weight": "conv2d",
            "*.class_embedding": "adamw",
            "logit_scale": "adamw",
            "text_projection.weight": "matrix",
        },
    ),
    "blip vision": (
        lambda: hf.BlipVisionModel(hf.BlipVisionConfig(**SIZE, image_size=8, patch_size=4)),
        {"*.qkv.weight": "3 parts (d=6, 24+24+24)"},
    ),
    "nano": (NanoAttention, {"c_attn.weight": "3 parts (d=6, 24+24+24)", "c_proj.weight": "matrix"}),
    "chargpt": (
        CharGPT,
        {
            "embed.weight": "adamw",
            "position.weight": "adamw",
            "head.weight": "adamw",
            "*.in_proj_weight": "3 parts (d=6, 24+24+24)",
            "*.out_proj.weight": "matrix",
            "*.linear[12].weight": "matrix",
            "*.norm?.weight": "adamw",
        },
    ),
    "chargpt tied": (partial(CharGPT, tied=True), {"embed.weight": "adamw"}),
    "multihead of other widths": (
        lambda: nn.MultiheadAttention(24, 4, kdim=10, vdim=14, add_bias_kv=True),
        {
            "[qk]_proj_weight": "heads (h=4)",
            "v_proj_weight": "matrix",
            "bias_[kv]": "adamw",
            "out_proj.weight": "matrix",
        },
    ),
    "convnet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 16, 3, groups=4),
            nn.ConvTranspose2d(16, 8, 2, groups=2),
            nn.ConvTranspose1d(8, 8, 3, groups=8),
            nn.Conv1d(8, 4, 3, groups=4),
            nn.Conv3d(4, 4, 1),
            nn.PReLU(4),
        ),
        {
            "0.weight": "conv2d",
            "1.weight": "adamw",
            "2.weight": "conv2d",
            "3.weight": "conv2d (g=4)",
            "4.weight": "conv2d (g=2)",
            "5.weight": "conv1d (g=8)",
            "6.weight": "conv1d",
            "7.weight": "conv3d",
            "8.weight": "adamw",
        },
    ),
    "recurrent": (
        lambda: nn.ModuleList(
            [nn.LSTM(4, 5, 2, proj_size=3, bidirectional=True), nn.GRU(4, 5), nn.RNN(4, 5), nn.LSTMCell(4, 5)]
        ),
        {
            "0.weight_?h_*": "gates (g=4)",
            "0.weight_hr_*": "matrix",
            "1.weight_*": "gates (g=3)",
            "2.weight_*": "matrix",
            "3.weight_?h": "gates (g=4)",
            "*.bias_*": "adamw",
        },
    ),
    "bare": (
        Experts,
        {
            "up": "stack",
            "weight": "stack",
            "up_bias": "adamw",
            "gate_weight": "stack",
            "gate_bias": "adamw",
            "bias": "adamw",
            "pos_embed": "adamw",
            "cls_token": "adamw",
            "latents": "adamw",
            "gain": "adamw",
            "projection": "matrix",
            "kernel": "conv2d",
        },
    ),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), {"weight": "stack", "bias": "adamw"}),
    "gains of two axes": (lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4))), {"*": "adamw"}),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 4), {"weight": "adamw"}),
    "misleading names": (misleading, {"*.weight": "matrix", "*.bias": "adamw"}),
    "parametrized": (
        weight_normed,
        {
            "0.parametrizations.weight.original0": "adamw",
            "0.parametrizations.weight.original1": "matrix",
            "1.parametrizations.weight.original0": "adamw",
            "1.parametrizations.weight.original1": "conv1d",
            "2.weight_orig": "matrix",
            "3.parametrizations.weight.original": "matrix",
        },
    ),
    "thin and empty": (
        lambda: nn.ModuleList([nn.Linear(5, 1), nn.Linear(5, 0), nn.Linear(4, 30000)]),
        {"*.weight": "matrix", "*.bias": "adamw"},
    ),
    "one matrix": (lambda: nn.Linear(3, 2, bias=False), {"weight": "matrix"}),
}


def members(groups):
    """Every (name, parameter, view) of the groups."""
    return [
        (name, param, View.of(view))
        for group in groups
        for (name, param), view in zip(group["params"], group["views"], strict=True)
    ]


def views(groups):
    return {name: view for name, _, view in members(groups)}


def labels(groups):
    return {name: label(view) for name, view in views(groups).items()}


@pytest.mark.parametrize("name", MODELS)
def test_kinds(name):
    make, expected = MODELS[name]
    got = labels(route(make()))
    for pattern, kind in expected.items():
        matching = {key: value for key, value in got.items() if fnmatchcase(key, pattern)}
        assert matching, f"no parameter is called {pattern}"
        assert set(matching.values()) == {kind}, matching


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_one_group_and_fits_its_view(name):
    model = MODELS[name][0]()
    groups = route(model)
    found = members(groups)
    assert Counter(n for n, _, _ in found) == Counter(n for n, p in model.named_parameters() if p.requires_grad)
    assert all(param is dict(model.named_parameters())[n] for n, param, _ in found)
    for n, param, view in found:
        if view is not None:
            view.check(n, param.shape)
            assert sum(b * m * k for b, m, k in view.shapes(param.shape)) == param.numel()
    assert {group["name"] for group in groups} <= {"matrices", "adamw"}
    assert all((view is None) == (group["name"] == "adamw") for group in groups for view in group["views"])
    plain = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    torch.save(plain, file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True) == plain


def test_the_order_is_that_of_the_model():
    model = llama()
    first, second = route(model), route(model)
    assert [labels([group]) for group in first] == [labels([group]) for group in second]
    order = [n for n, _ in model.named_parameters()]
    for group in first:
        assert [n for n, _ in group["params"]] == sorted((n for n, _ in group["params"]), key=order.index)
    starts = [order.index(group["params"][0][0]) for group in first]
    assert starts == sorted(starts)


@pytest.mark.parametrize("device", ["meta"])
def test_shapes_are_enough(device):
    with torch.device(device):
        on_meta = gpt2()
    assert labels(route(on_meta)) == labels(route(gpt2()))


# ---- heads are where the model's own forward has them -------------------------------------------------------


def attention_of(model, inputs):
    """Query, key and value, ``(batch, head, token, dim)``, of the first attention that the model computes."""
    fused, products = [], []
    attend, matmul = nn.functional.scaled_dot_product_attention, torch.matmul

    def recording_attend(query, key, value, *args, **kwargs):
        fused.append((query.clone(), key.clone(), value.clone()))
        return attend(query, key, value, *args, **kwargs)

    def recording_matmul(a, b):
        if a.ndim == b.ndim == 4:
            products.append((a.clone(), b.clone()))
        return matmul(a, b)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "scaled_dot_product_attention", recording_attend)
        patch.setattr(torch, "matmul", recording_matmul)
        model(**inputs)
    if fused:
        return dict(zip("qkv", fused[0], strict=True))
    return {"q": products[0][0], "k": products[0][1].mT, "v": products[1][1]}


def changed_heads(before, after):
    """Which heads of q, k and v differ, and that they became zero."""
    changed = set()
    for role, x in before.items():
        for head in range(x.shape[1]):
            if not torch.equal(x[:, head], after[role][:, head]):
                assert not after[role][:, head].any(), f"head {head} of {role} changed in part"
                changed.add((role, head))
    return changed


X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(1))
PIXELS = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
VISION = {**SIZE, "image_size": 8, "patch_size": 4}
PROVED = {
    **{name: (MODELS[name][0], {"input_ids": TOKENS}) for name in ("gpt2", "llama", "llama with one key head")},
    **{name: (MODELS[name][0], {"input_ids": TOKENS}) for name in ("qwen2", "qwen3", "mixtral", "deepseek", "phi3")},
    **{name: (MODELS[name][0], {"input_ids": TOKENS}) for name in ("gpt-neox", "falcon", "modernbert")},
    **{name: (MODELS[name][0], {"input_ids": TOKENS}) for name in ("bert", "distilbert")},
    "gpt2 without head": (MODELS["gpt2 without head"][0], {"input_ids": TOKENS}),
    "t5": (lambda: t5(hf.T5EncoderModel), {"input_ids": TOKENS}),
    "clip": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION)), {"pixel_values": PIXELS}),
    "vit": (MODELS["vit"][0], {"pixel_values": PIXELS}),
    "blip": (MODELS["blip vision"][0], {"pixel_values": PIXELS}),
    "nano": (NanoAttention, {"x": X}),
    "torch": (lambda: nn.MultiheadAttention(24, 4), {"query": X, "key": X, "value": X, "need_weights": False}),
    "torch with other widths": (
        lambda: nn.MultiheadAttention(24, 4, kdim=10, vdim=10),
        {"query": X, "key": Y, "value": Y, "need_weights": False},
    ),
}
ONLY_QUERIES = ("llama with one key head", "deepseek")


@pytest.mark.parametrize("name", PROVED)
def test_each_slice_is_one_head_of_the_models_own_attention(name):
    torch.manual_seed(0)
    make, inputs = PROVED[name]
    model = make().train(name.startswith("torch"))  # in eval mode torch's own attention takes another path
    for n, param in model.named_parameters():
        if n.endswith("bias"):
            nn.init.zeros_(param)
    before = attention_of(model, inputs)
    hit = []
    for n, _, view in members(route(model)):
        if label(view).startswith(("heads", "transposed heads", "3 parts")):
            hit += heads_hit(model, n, view, before, inputs)
    assert len(hit) == len(set(hit))
    proved = {role for role, _ in hit}
    assert proved >= ({"q"} if name in ONLY_QUERIES else {"q", "k"})
    assert set(hit) == {(role, head) for role in proved for head in range(before[role].shape[1])}


def heads_hit(model, name, view, before, inputs):
    """Zero every slice of a weight in turn: each must silence heads of one role, and nothing else."""
    param, hit = model.get_parameter(name), []
    original = param.detach().clone()
    for part, stack in enumerate(view.matrices(original)):
        for i in range(len(stack)):
            zeroed = [each.clone() for each in view.matrices(original)]
            zeroed[part][i] = 0
            with torch.no_grad():
                param.copy_(view.restore(zeroed, param.shape))
            changed = changed_heads(before, attention_of(model, inputs))
            (role,) = {role for role, _ in changed}
            assert role != "q" or len(changed) == 1  # a shared head of k or v may be seen once per query head
            hit += changed
    with torch.no_grad():
        param.copy_(original)
    return hit


def test_alternating_heads_of_bloom():
    torch.manual_seed(0)
    model = MODELS["bloom"][0]()
    attention = model.transformer.h[0].self_attention
    (stack,) = heads(12).matrices(attention.query_key_value.weight.detach())
    x = torch.randn(1, 3, 24)
    q, k, v = attention._reshape(attention.query_key_value(x))
    for i in range(12):
        role, head = (q, k, v)[i % 3], i // 3
        torch.testing.assert_close(role[0, head], x[0] @ stack[i].T)


def test_a_head_count_that_does_not_divide_leaves_the_matrix_whole():
    class Odd(nn.Module):
        def __init__(self, num_heads):
            super().__init__()
            self.num_heads, self.q_proj, self.k_proj = num_heads, nn.Linear(8, 8), nn.Linear(8, 8)

    assert labels(route(Odd(4)))["q_proj.weight"] == "heads (h=4)"
    for unknown in (3, 0, None, True, "4", [4]):
        assert labels(route(Odd(unknown)))["q_proj.weight"] == "matrix", unknown
        assert labels(route(Odd(unknown)))["k_proj.weight"] == "matrix", unknown


# ---- frozen, tied, wrapped ----------------------------------------------------------------------------------


def test_frozen_parameters_are_left_out():
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].mlp.requires_grad_(False)
    got = labels(route(model))
    assert set(got) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "transformer.wte.weight" not in got


def test_a_tied_weight_is_an_embedding_wherever_it_is_named_first():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.hidden, self.embed = nn.Linear(4, 9), nn.Linear(4, 4), nn.Embedding(9, 4)
            self.out.weight = self.embed.weight

    assert labels(route(Backwards())) == {
        "out.weight": "adamw",
        "out.bias": "adamw",
        "hidden.weight": "matrix",
        "hidden.bias": "adamw",
    }


def test_a_vocabulary_head_is_the_last_linear_of_an_embeddings_shape():
    square = CharGPT(vocabulary=24)  # every matrix of attention has the shape of the embedding, too
    got = labels(route(square))
    assert got["head.weight"] == "adamw"
    assert got["blocks.layers.0.self_attn.out_proj.weight"] == "matrix"
    chain = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert labels(route(chain))["1.weight"] == "matrix"
    assert labels(route(chain))["2.weight"] == "adamw"
    regression = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    assert labels(route(regression))["1.weight"] == "matrix"


def test_wrappers_do_not_change_names():
    model = gpt2()
    expected = labels(route(model))
    assert labels(route(nn.DataParallel(model))) == expected
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert labels(route(nn.parallel.DistributedDataParallel(model))) == expected
    finally:
        torch.distributed.destroy_process_group()
    assert labels(route(torch.compile(model))) == expected  # pyright: ignore


class Nested(nn.Module):
    """Wrappers inside a model, around a projection and around a whole block."""

    def __init__(self, wrap):
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj = wrap(nn.Linear(4, 4)), wrap(nn.Linear(4, 4))
        self.block = wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), checkpoint_wrapper, nn.DataParallel])
def test_wrappers_inside_a_model_change_neither_names_nor_views(wrap):
    expected = views(route(Nested(lambda module: module)))
    assert str(expected["q_proj.weight"]) == str(heads(2))
    assert views(route(Nested(wrap))) == expected
    assert views(route(Nested(wrap), [Rule("block.0.weight", None)]))["block.0.weight"] is None


def test_a_prefix_keeps_two_models_apart():
    groups = [
        *route(nn.Linear(3, 2), prefix="first"),
        *route(nn.Linear(3, 2), [Rule("bias", name="b")], prefix="second."),
    ]
    assert [n for group in groups for n, _ in group["params"]] == [
        *("first.weight", "first.bias", "second.weight", "second.bias"),
    ]


def test_names_alone_tell_tables_and_heads():
    named = [(n, p) for n, p in gpt2(tie_word_embeddings=False).named_parameters()]
    got = {n: view for (n, _), view in zip(named, default_views(named), strict=True)}
    assert {n for n, view in got.items() if view is not None} == {
        f"transformer.h.0.{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    w = nn.Parameter(torch.zeros(4, 3))
    assert default_views([("weight", w), ("lm_head_norm.weight", w), ("pos_embed", w)]) == [MATRIX, MATRIX, None]


# ---- rules --------------------------------------------------------------------------------------------------


def test_the_first_rule_wins():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    whole, blocked = Rule("*.weight", MATRIX), Rule("0.weight", "(a m) n -> a m n", {"lr": 1.0})
    with pytest.raises(ValueError, match="'0.weight' decides nothing: earlier rules match all of its parameters"):
        route(model, [whole, blocked])
    blocked = Rule("0.weight", heads(2), {"lr": 1.0})
    groups = route(model, [blocked, whole])
    assert labels(groups) == {
        "0.weight": "heads (h=2)",
        "0.bias": "adamw",
        "1.weight": "matrix",
        "1.bias": "adamw",
    }
    assert [group["name"] for group in groups] == ["lr=1.0", "adamw", "matrices"]
    assert groups[0]["lr"] == 1.0
    assert "lr" not in groups[1]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(nn.Linear, heads(2)), {"0.weight", "2.weight"}),
        (Rule(nn.Linear, heads(2), parameter="weight"), {"0.weight", "2.weight"}),
        (Rule((nn.Linear, nn.LayerNorm), None), {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}),
        (Rule(nn.LayerNorm, None), {"1.weight", "1.bias"}),
        (Rule(nn.Linear), {"0.weight", "2.weight"}),
        (Rule("2.*"), {"2.weight", "2.bias"}),
        (Rule("?.weight", None), {"0.weight", "1.weight", "2.weight"}),
        (Rule(lambda name, module, param: param.shape == (6, 4)), {"0.weight"}),
        (Rule(lambda name, module, param: module.__class__ is nn.LayerNorm), {"1.weight", "1.bias"}),
    ],
)
def test_what_a_rule_matches(rule, expected):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    named = Rule(rule.match, rule.view, {"lr": 0.5}, "mine", rule.parameter)
    groups = [group for group in route(model, [named]) if group["name"] == "mine"]
    assert {n for group in groups for n, _ in group["params"]} == expected
    assert all(group["lr"] == 0.5 for group in groups)


def test_a_rule_without_a_view_changes_options_only():
    plain = views(route(llama()))
    groups = route(llama(), [Rule("*.self_attn.*", options={"lr": 3e-3})])
    assert views(groups) == plain
    assert all(("self_attn" in n) == (g.get("lr") == 3e-3) for g in groups for n, _ in g["params"])


def test_equal_options_share_a_group_unless_named():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    rules = [Rule("0.weight", "m n -> 1 m n"), Rule("1.weight", MATRIX.to_dict()), Rule("2.weight", MATRIX, name="two")]
    assert [(g["name"], [n for n, _ in g["params"]]) for g in route(model, rules)] == [
        ("matrices", ["0.weight", "1.weight", "3.weight"]),
        ("two", ["2.weight"]),
    ]


def test_rules_on_tied_weights():
    tied = gpt2()
    groups = route(tied, [Rule("lm_head.weight", None, {"lr": 1e-3})])
    assert [n for g in groups if "lr" in g for n, _ in g["params"]] == ["transformer.wte.weight"]
    with pytest.raises(ValueError, match="rule Linear matches no trainable parameter"):
        route(tied, [Rule(nn.Linear, MATRIX)])  # the tied head is an Embedding's, and no other Linear is there


LSTM_RULE = Rule(nn.LSTM, "m n -> 1 m n", parameter="weight_hh_l0")


def test_a_parameter_of_a_class():
    got = labels(route(nn.LSTM(3, 4), [LSTM_RULE]))
    assert got["weight_hh_l0"] == "matrix"
    assert got["weight_ih_l0"] == "gates (g=4)"


NET = {"up": nn.Linear(4, 6), "norm": nn.LayerNorm(6)}
BAD_RULES = [
    (
        Rule("up.wieght", None),
        "rule 'up.wieght' matches no trainable parameter; the model has 'up.weight'",
    ),
    (Rule("up", None), "A pattern must match the whole name; '*' stands for any part."),
    (Rule(nn.Conv2d, None), "rule Conv2d matches no trainable parameter; the model has 'LayerNorm', 'Linear'."),
    (Rule((nn.Conv1d, nn.Conv2d), None), "rule Conv1d | Conv2d matches no"),
    (Rule(nn.LayerNorm), "own parameters with two or more axes, with view=None all of them."),
    (Rule(nn.Linear, None, parameter="weights"), "the model has 'bias', 'weight'. parameter='weights' must be"),
    (Rule(lambda n, m, p: False, name="odd"), "rule odd matches no trainable parameter; the model has 'up.weight'"),
    (
        Rule("up.weight", heads(4)),
        "view '(h d) n -> h d n' with h=4 does not fit 'up.weight' (6, 4): 6 is not a multiple of 4. ",
    ),
    (Rule(nn.Linear, heads(4)), "does not fit 'up.weight' (6, 4)"),
    (Rule("up.*", MATRIX), "view 'm n -> 1 m n' does not fit 'up.bias' (6,): the pattern reads 2 axes"),
]


@pytest.mark.parametrize(("rule", "message"), BAD_RULES)
def test_rules_that_fail_say_why(rule, message):
    with pytest.raises(ValueError) as error:
        route(nn.ModuleDict(NET), [rule])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_view_that_does_not_fit_is_the_first_thing_said():
    with pytest.raises(ValueError, match="does not fit 'up.weight'"):
        route(nn.ModuleDict(NET), [Rule("nothing"), Rule("up.weight", heads(4))])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule(3, None), TypeError, "match must be a module class, a name pattern or a function; got 3."),
        (lambda: Rule(int, None), TypeError, "got <class 'int'>"),
        (lambda: Rule((), None), TypeError, "got ()"),
        (lambda: Rule((nn.Linear, int), None), TypeError, "match must be"),
        (lambda: Rule(nn.Linear(2, 2), None), TypeError, "For a single module pass the pattern of its names."),
        (lambda: Rule("*", "m n"), ValueError, "view 'm n' is not a pattern"),
        (lambda: Rule("*", 3), ValueError, "view 3 is not understood"),
        (lambda: Rule("*", None, {"view": None}), ValueError, "options may not set view"),
        (lambda: Rule("*", None, {"params": [], "name": ""}), ValueError, "options may not set name, params"),
        (lambda: Rule("*", None, parameter="weight"), ValueError, "parameter='weight' needs a module class"),
        (lambda: route([nn.Linear(2, 2)]), TypeError, "route needs a torch.nn.Module; got list."),
        (lambda: route(nn.Linear(2, 2), Rule("*")), TypeError, "rules must be a list of asgo.Rule"),
        (lambda: route(nn.Linear(2, 2), ["*"]), TypeError, "rules must be a list of asgo.Rule"),
        (lambda: route(nn.ReLU()), ValueError, "ReLU has no trainable parameter"),
        (lambda: route(nn.Linear(2, 2).requires_grad_(False)), ValueError, "Linear has no trainable parameter"),
        (lambda: route(nn.LazyLinear(2)), ValueError, "'weight' has no shape of its own: run a lazy model once"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heads_are_whole_by_default():
    assert set(labels(route_by_default(gpt2())).values()) == {
        "adamw",
        "3 parts (24+24+24)",
        "transposed matrix",
    }
    assert set(labels(route_by_default(llama())).values()) == {"adamw", "matrix"}
    assert "heads (h=4)" in labels(route(llama())).values()
    mine = [Rule("*.q_proj.weight", heads(2))]
    assert "heads (h=2)" in labels(route_by_default(llama(), mine)).values()  # a rule's view is obeyed as it stands


# ---- gated MLPs --------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Experts with a fused projection of gate and up, which `halves` takes out of the weight."""

    def __init__(self, fused, down):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(fused)), nn.Parameter(torch.randn(down))


class GptOssExperts(Gated):
    """Known by its name."""


class GptOssGroupedExperts(Gated):
    """The same in torchtitan, stored as (out, in)."""


GATED = {
    "rows": (Gated, (3, 10, 4), (3, 4, 5), lambda w: w.chunk(2, 1)),
    "rows, as wide as tall": (Gated, (3, 8, 8), (3, 8, 4), lambda w: w.chunk(2, 1)),
    "columns": (Gated, (3, 4, 10), (3, 5, 4), lambda w: w.chunk(2, 2)),
    "columns, twice as wide": (Gated, (3, 4, 8), (3, 4, 4), lambda w: w.chunk(2, 2)),
    "alternating rows": (GptOssGroupedExperts, (3, 10, 4), (3, 4, 5), lambda w: (w[:, ::2], w[:, 1::2])),
    "alternating columns": (GptOssExperts, (3, 4, 10), (3, 5, 4), lambda w: (w[..., ::2], w[..., 1::2])),
}


@pytest.mark.parametrize(("kind", "fused", "down", "halves"), GATED.values(), ids=GATED)
def test_gate_and_up_are_matrices_of_their_own(kind, fused, down, halves):
    mlp = kind(fused, down)
    gate, up = halves(mlp.gate_up_proj)
    (stack,) = views(route(mlp))["gate_up_proj"].matrices(mlp.gate_up_proj)
    assert torch.equal(stack, torch.stack([gate, up], 1).flatten(0, 1))


@pytest.mark.parametrize(("fused", "down"), [((3, 10, 4), (3, 4, 6)), ((3, 10, 4), (4, 5)), ((3, 4, 10), (3, 4, 5))])
def test_a_projection_that_fits_no_neighbour_stays_whole(fused, down):
    assert views(route(Gated(fused, down)))["gate_up_proj"] == STACK
