"""One table of fused and headed weights: what is in them, in which order, and how many rows each part has.

Every row of `LAYOUTS` is a fact about a family: the attribute's exact name, what the module must be or have, the
parts as they are stored, and the sizes, which must add up to the weight's rows (see `asgo.views.sizes`); else the
weight stays one matrix, and `asgo.explain` says so. Adding a family is adding a row. The Hessians of
query and key are block-diagonal by head ("ASGO: Adaptive Structured Gradient Optimization", An et al., 2025): with
``per_head`` they are read as one matrix per head, values whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from asgo.views import sizes as rows_of
from asgo.views.patterns import Order, fused, heads
from asgo.views.projections import Reading, by_head_of
from asgo.views.sizes import HEAD_DIM, Place, Sizes


@dataclass(frozen=True)
class Layout:
    """One kind of fused weight.

    Args:
        names: of the layer's attribute, or of the parameter itself.
        parts: what it holds, in the order of storage.
        order: how rows of the parts alternate; see `asgo.views.patterns.fused`.
        sizes: rows of every part, in all or in each repetition; ``None`` where they do not add up.
        seen: in which models.
        classes: of the module that holds it; any if empty.
        needs: attributes that the module must have, true ones, each perhaps one of several: ``"a|b"``.
        heads: the parts that have heads.
        asks: what `sizes` needs to know besides, for the table of the documentation.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    order: Order
    sizes: Sizes
    seen: str
    classes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    asks: str = ""

    def fits(self, place: Place) -> bool:
        """Whether the module is of the classes and has the attributes that this row needs."""
        if self.classes and not place.classes.intersection(self.classes):
            return False
        return all(any(place.has(name) for name in needed.split("|")) for needed in self.needs)


_QKV, _QK = ("q", "k", "v"), ("q", "k")
_IN_BLOCKS = (
    *("qkv", "Wqkv", "att_proj", "qkv_proj", "to_qkv", "qkv_linear", "c_attn", "attn_qkv", "wqkv", "linear_qkv"),
    *("W_qkv", "w_qkv", "proj_qkv", "fc_qkv", "lin_qkv", "qkv_layer", "qkv_projection", "fused_qkv", "qkv_weight"),
)

LAYOUTS: tuple[Layout, ...] = (
    # -- query, key and value ---------------------------------------------------------------------------------
    Layout(
        ("c_attn",),
        ("k", "v"),
        "blocks",
        rows_of.keys_and_values,
        "GPT-2's cross attention",
        needs=("q_attn",),
        heads=("k",),
    ),
    Layout(("c_attn",), _QKV, "blocks", rows_of.one_key, "GPTBigCode", ("GPTBigCodeAttention",), ("multi_query",), _QK),
    Layout(("c_attn",), _QKV, "by head", rows_of.thirds_per_head, "GPTBigCode", ("GPTBigCodeAttention",), heads=_QKV),
    Layout(
        ("qkv", "queries_keys_values"),
        _QKV,
        "by head",
        rows_of.key_dims_per_head,
        "LeViT, TinyViT, EfficientFormer",
        needs=("key_dim",),
        heads=_QK,
    ),
    Layout(
        ("keys_values", "kv"),
        ("k", "v"),
        "by head",
        rows_of.key_dims_and_values,
        "LeViT's downsampling",
        needs=("key_dim",),
        heads=("k",),
    ),
    Layout(
        ("qkv",), ("k", "v"), "blocks", partial(rows_of.multiples, 2), "GCViT's global attention", needs=("use_global",)
    ),
    Layout(("qkv",), _QKV, "by head", rows_of.thirds_per_head, "MaxViT in timm", needs=("head_first",), heads=_QKV),
    Layout(
        ("qkv_proj",), _QKV, "by head", rows_of.thirds_per_head, "MiniMax", ("MiniMaxLightningAttention",), heads=_QKV
    ),
    Layout(("qkv_proj",), ("q", "v", "k"), "in blocks", rows_of.codegen, "CodeGen", ("CodeGenAttention",), heads=_QKV),
    Layout(("qkv_proj",), _QKV, "blocks", rows_of.one_query, "MobileViTV2", needs=("embed_dim|out_proj",)),
    Layout(
        ("projection_in", "f"), ("q", "context", "gates"), "blocks", rows_of.focal, "FocalNet", needs=("focal_level",)
    ),
    Layout(("qk",), _QK, "blocks", partial(rows_of.multiples, 2), "ConViT", heads=_QK),
    Layout(
        ("qkvs",),
        _QKV,
        "blocks",
        lambda p: rows_of.add_up(p, *rows_of.known(p, "key_dim", "key_dim", "val_dim")),
        "EfficientViT",
    ),
    Layout(
        ("to_qkv_mlp_proj",),
        (*_QKV, "gate", "up"),
        "blocks",
        lambda p: rows_of.add_up(p, *rows_of.known(p, *("inner_dim",) * 3, *("mlp_hidden_dim",) * 2)),
        "FLUX.2",
        heads=_QK,
    ),
    Layout(("wqkv",), _QKV, "by group", rows_of.query_rows_per_group, "InternLM2", ("InternLM2Attention",), heads=_QKV),
    Layout(("wqkv",), _QKV, "by group", rows_of.queries_of_one_key, "torchtitan", needs=("heads_per_kv",), heads=_QKV),
    Layout(
        ("linear_qkv",),
        _QKV,
        "by group",
        rows_of.query_rows_per_group,
        "Megatron-LM",
        needs=("num_query_groups_per_partition",),
        heads=_QKV,
    ),
    Layout(
        _IN_BLOCKS,
        _QKV,
        "blocks",
        rows_of.attention_blocks,
        "GPT-2, Phi-3, MPT, DBRX, ModernBERT, Bark, timm, SAM, BLIP, litgpt",
        heads=_QK,
    ),
    Layout(
        ("in_proj_weight",),
        _QKV,
        "blocks",
        rows_of.attention_blocks,
        "torch.nn.MultiheadAttention, open_clip",
        heads=_QK,
    ),
    Layout(
        ("query_key_value",),
        _QKV,
        "by group",
        rows_of.query_rows_per_group,
        "Falcon",
        needs=("new_decoder_architecture",),
        heads=_QKV,
    ),
    Layout(
        ("query_key_value",), _QKV, "blocks", rows_of.one_key, "Falcon", ("FalconAttention",), ("multi_query",), _QK
    ),
    Layout(
        ("query_key_value",),
        _QKV,
        "blocks",
        rows_of.attention_blocks,
        "ChatGLM",
        needs=("multi_query_attention",),
        heads=_QK,
    ),
    Layout(
        ("query_key_value",), _QKV, "by head", rows_of.thirds_per_head, "GPT-NeoX, BLOOM, Persimmon, Falcon", heads=_QKV
    ),
    Layout(
        ("in_proj",), _QKV, "by head", rows_of.thirds_per_head, "DeBERTa", ("DisentangledSelfAttention",), heads=_QKV
    ),
    Layout(
        ("in_proj",),
        _QKV,
        "blocks",
        rows_of.attention_in_projection,
        "hand-written attention",
        heads=_QK,
        asks="a number of heads, nothing of a state space or convolution",
    ),
    Layout(
        ("kv", "to_kv", "kv_proj", "kv_linear"),
        ("k", "v"),
        "blocks",
        rows_of.keys_and_values,
        "JetMoE, PVT, GraniteSpeech",
        needs=("q|to_q|q_proj|query|q_linear|kv_proj",),
        heads=("k",),
    ),
    Layout(
        ("qkv_opreact",),
        ("q", "k", "v", "o"),
        "blocks",
        lambda p: rows_of.add_up(p, *rows_of.known(p, *("qk_dim", "qk_dim", "v_dim", "v_dim"))),
        "xLSTM",
    ),
    Layout(("index_qk_proj",), _QK, "blocks", rows_of.index, "Qwen4"),
    # -- queries with a gate -------------------------------------------------------------------------------------
    Layout(
        ("q_proj",),
        ("q", "gate"),
        "by group",
        rows_of.gated_query_by_group,
        "gated attention",
        needs=("elementwise_attn_output_gate",),
        heads=("q", "gate"),
    ),
    Layout(
        ("q_proj",),
        ("q", "gate"),
        "by head",
        rows_of.gated_query,
        "Qwen3-Next, Qwen3.5",
        needs=("k_proj",),
        heads=("q", "gate"),
    ),
    Layout(("q_gate_proj",), ("q", "gate"), "by head", rows_of.query_and_gate, "A.X K2"),
    # -- latent attention ----------------------------------------------------------------------------------------
    Layout(
        ("kv_a_proj_with_mqa", "wkv_a"), ("latent", "rope"), "blocks", rows_of.latent, "DeepSeek-V2 and V3, Kimi, GLM"
    ),
    Layout(
        ("kv_b_proj", "wkv_b"),
        ("k", "v"),
        "by head",
        rows_of.latent_keys,
        "DeepSeek-V2 and V3, Kimi, GLM",
        heads=("k",),
    ),
    # -- state spaces, linear attention, short convolutions ---------------------------------------------------------
    Layout(
        ("in_proj",), ("x", "z"), "alternating", rows_of.halves_of("intermediate_size"), "Zamba", ("ZambaMambaMixer",)
    ),
    Layout(
        ("in_proj",),
        ("x", "z"),
        "blocks",
        rows_of.halves_of("intermediate_size", "d_inner"),
        "Mamba, Falcon-Mamba, Jamba",
        needs=("x_proj", "A_log|A_logs"),
    ),
    Layout(
        ("x_proj",),
        ("dt", "B", "C"),
        "blocks",
        rows_of.mamba_selection,
        "Mamba, Falcon-Mamba, Jamba",
        needs=("dt_proj",),
    ),
    Layout(
        ("in_proj",),
        ("z", "x", "B", "C", "dt"),
        "blocks",
        rows_of.mamba2,
        "Mamba-2, Bamba, Zamba2, Nemotron-H, Falcon-H1, GraniteHybrid",
    ),
    Layout(("in_proj_qkvz",), ("q", "k", "v", "z"), "by group", rows_of.delta_net_by_key_head, "Qwen3-Next"),
    Layout(("in_proj_ba",), ("b", "a"), "by group", rows_of.scalars_by_key_head, "Qwen3-Next"),
    Layout(("in_proj_qkv",), _QKV, "blocks", rows_of.delta_net, "Qwen3.5"),
    Layout(
        ("in_proj",), ("B", "C", "x"), "blocks", partial(rows_of.multiples, 3), "LFM2, LFM3", needs=("conv", "out_proj")
    ),
    Layout(("fn",), ("pre", "post", "comb"), "blocks", rows_of.hyper_connection, "DeepSeek-V4", needs=("hc_mult",)),
    Layout(("hz_proj",), ("x", "z"), "blocks", rows_of.halves_of("d_inner"), "EfficientViM"),
    Layout(
        ("BCdt_proj",),
        ("B", "C", "dt"),
        "blocks",
        lambda p: rows_of.add_up(p, *rows_of.known(p, *("state_dim",) * 3)),
        "EfficientViM",
    ),
    # -- modulation -----------------------------------------------------------------------------------------------
    Layout(
        (
            *("adaLN_modulation", "adaln_modulation", "modulation", "adaLN", "adaln", "ada_lin", "adaln_proj"),
            *("img_mod", "txt_mod", "time_mod_proj", "t_block"),
        ),
        ("shift", "scale", "gate"),
        "blocks",
        rows_of.chunks,
        "DiT",
    ),
    Layout(
        ("linear", "lin"),
        ("shift", "scale", "gate"),
        "blocks",
        rows_of.chunks,
        "diffusers",
        (
            "AdaLayerNormZero",
            "AdaLayerNormZeroSingle",
            "AdaLayerNormSingle",
            "AdaLayerNormContinuous",
            "AdaLayerNorm",
            "SD35AdaLayerNormZeroX",
            *(
                "Modulation",
                "Flux2Modulation",
                "AuraFlowPreFinalBlock",
                "HunyuanVideoAdaNorm",
                "CogVideoXLayerNormZero",
            ),
            *("HunyuanVideoTokenReplaceAdaLayerNormZero", "LuminaRMSNormZero", "EasyAnimateLayerNormZero"),
        ),
    ),
)
"""Every fused weight that is known. The first row whose name, classes and needs fit and whose sizes add up decides."""

_BY_NAME = {name: [row for row in LAYOUTS if name in row.names] for row in LAYOUTS for name in row.names}
FUSED = tuple(dict.fromkeys(name for row in LAYOUTS if row.parts[:3] == ("q", "k", "v") for name in row.names))
"""Names of weights that hold query, key and value."""

_SURELY_FUSED = {*_IN_BLOCKS, "query_key_value", "in_proj_weight", "to_kv", "kv"} - {"c_attn"}


def read(place: Place, ndim: int = 2, transposed: bool = False) -> Reading | None:
    """What a projection is, by its name, its module and its number of rows.

    ``None`` if no row of the table fits. A `Reading` without a view: the name is in the table, but sizes do not add up.

    Args:
        place: the weight.
        ndim: its axes; those after the second are a kernel's.
        transposed: whether it is stored as (in, out).
    """
    rows = [row for row in _BY_NAME.get(place.slot, ()) if row.fits(place)]
    for row in rows:
        sizes = row.sizes(place)
        if sizes is not None and place.rows > 0:
            return _reading(row, place, sizes, ndim, transposed)
    separate = by_head_of(place, ndim, transposed)
    if separate is None and rows and place.slot in _SURELY_FUSED:
        d = place.number(*HEAD_DIM)
        by_head = heads(place.rows // d, transposed) if d and place.rows % d == 0 and ndim == 2 else None
        return Reading(None, by_head, f"{place.slot}: sizes of the parts are not known", known=False)
    return separate


def _reading(row: Layout, place: Place, sizes: Sequence[int], ndim: int, transposed: bool) -> Reading:
    parts = _named(row.parts, sizes)
    view = fused(parts=parts, order=row.order, ndim=ndim, transposed=transposed)
    how = f"{place.slot}: {', '.join(row.parts)} {row.order}, {'+'.join(map(str, sizes))} ({row.seen})"
    d = _head_rows(row, place, sizes)
    with_heads = tuple(
        name for name, part in zip(parts, _cycled(row.parts, len(sizes)), strict=True) if part in row.heads
    )
    by_head = view
    if d and all(parts[name] % d == 0 for name in with_heads):
        by_head = fused(parts=parts, order=row.order, ndim=ndim, transposed=transposed, head_dim=d, heads=with_heads)
    return Reading(view, by_head, how)


def _named(parts: Sequence[str], sizes: Sequence[int]) -> dict[str, int]:
    """Sizes by unique names: a modulation has several shifts and scales."""
    names = _cycled(parts, len(sizes))
    return {
        name if len(sizes) == len(parts) else f"{name} {i}": size
        for i, (name, size) in enumerate(zip(names, sizes, strict=True))
    }


def _cycled(parts: Sequence[str], count: int) -> list[str]:
    return [parts[i % len(parts)] for i in range(count)]


def _head_rows(row: Layout, place: Place, sizes: Sequence[int]) -> int:
    """Rows of one head; 0 without heads or if their number is unknown."""
    if not row.heads:
        return 0
    if row.order == "by head":
        return sizes[0]
    if "q" in row.parts:
        q = sizes[row.parts.index("q")]
        d = place.number(*HEAD_DIM) or (q // place.heads if place.heads and q % place.heads == 0 else 0)
        return d if row.order != "in blocks" or not d or q % d == 0 else 0
    return place.head_dim or (sizes[0] // place.heads if place.heads and sizes[0] % place.heads == 0 else 0)
