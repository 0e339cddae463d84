"""What a parameter is for where it is no layer of a known kind: a table, a gain, a bias, or a matrix.

The number of axes decides nothing by itself. Looked at, in this order: the module's class, what else the module holds,
and, for parameters that stand in a module of no known kind, the last word of their name.
"""

from __future__ import annotations

import re

from torch import nn

from asgo.views.model_scan import Site
from asgo.views.sizes import number
from asgo.views.vocabulary import TABLES, words

GAINS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU)
LAYERS = (
    *(nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Modules of torch whose weights are matrices."""

LOOKED_UP = {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias", "relative_attention_bias"}
"""Names of layers, whatever their class, whose weight is looked up by index (LayoutLMv3)."""

EXACT = {
    *("A_log", "A_logs", "D", "Ds", "dt_bias", "wpe", "wte", "pe", "W_E", "W_U", "W_pos", "r_w_bias", "r_r_bias"),
    *("r_s_bias", "rpb", "rpe", "ape", "bias_u", "bias_v", "attention_biases", "static_weight", "cls", "gamma", "beta"),
    *("h0", "c0", "h_0", "c_0", "bos", "eos", "r_k", "time_faaaa", "time_first"),
}
"""Exact names of parameters that are no matrices though they have two axes: positions, biases, decays."""

TABLE_CLASSES = (
    *(
        "Embedding",
        "Embeddings",
        "Embed",
        "Table",
        "Positions",
        "PositionBias",
        "PositionalEncoding",
        "Tokens",
        "Prompt",
    ),
    *("Codebook", "Lookup"),
)
"""Endings of the names of classes whose own parameters are tables."""

TABLE_WORDS = {
    *("token", "tokens", "pos", "position", "positions", "positional", "embed", "embeds", "embedding", "embeddings"),
    *("emb", "embs", "encoding", "encodings", "table", "tables", "latent", "latents", "queries", "prompt", "prompts"),
    *("bias", "biases", "scale", "scales", "gain", "gains", "gamma", "beta", "rpe", "rpb", "ape", "rel", "register"),
    *("registers", "memory", "memories", "mem", "mask", "masks", "prototype", "prototypes", "codebook", "codebooks"),
    *("codevectors", "codes", "anchor", "anchors", "centers", "centroids", "slots", "frequencies", "freqs", "freq"),
    *("temperature", "tau", "shift", "decay", "alpha", "prefix", "prefixes", "sinks", "lookup", "vocab", "landmarks"),
    *(
        "query",
        "pad",
        "pads",
        "padding",
        "modulation",
        "offsets",
        "points",
        "priors",
        "templates",
        "null",
        "initial",
        "init",
        "state",
        "states",
        "start",
        "sink",
        "bonus",
        "transitions",
        "transition",
        "concepts",
        "keypoints",
    ),
}
MATRIX_WORDS = {
    *("weight", "weights", "w", "wi", "wo", "proj", "projs", "projection", "projections", "projector", "kernel"),
    *("kernels", "matrix", "matrices", "linear", "lin", "up", "down", "gate", "gates", "in", "out", "fc", "dense"),
    *(
        "lora",
        "hada",
        "mlp",
        "expert",
        "experts",
        "router",
        "filter",
        "filters",
        "mixer",
        "transform",
        "rotation",
        "u",
        "v",
    ),
    *("q", "k", "o", "r", "kv", "qkv", "a", "b", "p", "s", "c", "mat", "fn", "layer", "layers", "value", "key", "head"),
}


def table_or_gain(site: Site) -> str | None:
    """Why a parameter is looked up or added or multiplied entry by entry; None if that is not known of it."""
    module, name = site.module, type(site.module).__name__
    kinds = [kind.__name__ for kind in type(module).__mro__]
    length = number(module, ("num_embeddings",))
    has_length = length > 0 and length in site.shape
    is_own = not isinstance(module, LAYERS)
    tests = (
        (isinstance(module, TABLES) or has_length, f"table of {name}"),
        (isinstance(module, GAINS) or any(kind.endswith("Norm") for kind in kinds), f"gain of {name}"),
        (bool(LOOKED_UP & {site.slot, site.leaf}), f"table {site.slot or site.leaf}, looked up by index"),
        (is_own and any(kind.endswith(TABLE_CLASSES) for kind in kinds), f"{site.leaf} of {name}"),
        (is_own and is_bias(site), f"bias {site.leaf}"),
        (is_own and site.leaf in EXACT, f"table or gain by its name, {site.leaf}"),
    )
    return next((why for holds, why in tests if holds), None)


def is_bias(site: Site) -> bool:
    """Whether a parameter is the bias beside a weight, such as one per expert."""
    leaf = site.leaf
    if leaf == "bias":
        return True
    for suffix in ("_bias", "_b", "bias"):
        base = leaf.removesuffix(suffix)
        if base not in (leaf, "") and any(hasattr(site.module, name) for name in (base, f"{base}_weight", f"{base}_w")):
            return True
    weight = {"b_": "W_", "b": "w"}.get(leaf[:2] if leaf[1:2] == "_" else leaf[:1], "")
    return bool(weight) and any(hasattr(site.module, w + leaf[len(weight) :]) for w in (weight, weight.lower()))


def named_table(site: Site) -> bool | None:
    """Whether the last word that is known in a parameter's name is one of tables; None if no word is known.

    A ``query`` beside a key is a matrix, one that stands alone is looked up. Names may end in their axes: ``w1_EFD``.
    """
    name = re.sub(r"_[A-Z]+$", "", site.leaf)
    beside_key = any(hasattr(site.module, key) for key in ("key", "value", "k"))
    if re.search(r"_w\d*$", name, re.IGNORECASE):
        return False
    if name.startswith(("null_", "mem_")):  # keys and values that are learned as such
        return True
    for word in reversed(words(name)):
        if word in TABLE_WORDS:
            return not (word == "query" and beside_key)
        if word in MATRIX_WORDS and (len(word) > 1 or len(words(name)) == 1):
            return False
    return None
