"""Hugging Face transformers: a small model of every family, and the census of all classes."""

from __future__ import annotations

import collections
import difflib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from asgo.views.routing import explain
from benchmarks.layouts.trace import Rows, Table, generic, time_limit, trace

LAYERS = {
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth"),
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
}

SECONDS = 40
"""How long a family may take."""

SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("depth", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "embed_dim", "embedding_size", "d_embed"), 48
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "kv_channels", "d_head"), 12),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 80
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size"), 56),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 131),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_topk"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("kv_lora_rank",), 20),
    **dict.fromkeys(("qk_nope_head_dim",), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 4),
    **dict.fromkeys(("v_head_dim",), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 12),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 10),
    **dict.fromkeys(("rotary_dim",), 8),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
}


def small(config: Any, depth: int = 0) -> dict[str, Any]:
    """Arguments that make a config like this one small, and the configs inside."""
    found: dict[str, Any] = {}
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 4 and not name.startswith("_"):
            found[name] = small(value, depth + 1)
        elif name in SMALL and type(value) is int:
            found[name] = min(SMALL[name], value)
        elif name.endswith("token_id") and type(value) is int:
            found[name] = min(value, 3)
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            found[name] = [kinds[i % len(kinds)] for i in range(2)]
    if "qk_rope_head_dim" in found:
        found.pop("head_dim", None)
    if "layers_block_type" in vars(config) or "attn_layer_indices" in vars(config):
        found |= {name: [1] for name in ("attn_layer_indices",) if name in vars(config)}
    return found


def inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    """What a model may take."""
    ids = {"input_ids": torch.arange(6)[None]}
    yield ids
    yield {**ids, "decoder_input_ids": torch.arange(6)[None]}
    for shape in dict.fromkeys([(3, 32, 32), image_shape(model)]):
        pixels = {"pixel_values": torch.randn(1, *shape)}
        yield pixels
        yield {**pixels, **ids}
    yield {"input_values": torch.randn(1, 4000)}
    yield {"input_features": torch.randn(1, 80, 64)}
    yield {"input_features": torch.randn(1, 64, 80)}


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images that the model's config names, which may be that of its vision part."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", None)
    sizes = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    given = (getattr(config, "num_channels", None), *sizes)
    channels, height, width = (n if isinstance(n, int) else usual for n, usual in zip(given, (3, 32, 32), strict=True))
    return channels, height, width


def run_once(model: nn.Module) -> dict[str, Rows]:
    """The traces of the first input that the model takes."""
    taken = set(inspect.signature(model.forward).parameters)
    error: Exception = RuntimeError("no input fits")
    for given in inputs(model):
        if set(given) <= taken:
            try:
                return trace(model, lambda given=given: model(**given))
            except Exception as failed:
                error = failed
    raise error


def variants(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Small sizes as they are; with as many keys as queries; with all layers."""
    yield found
    yield _edited(found, lambda part: part | {"num_key_value_heads": 4} if "num_key_value_heads" in part else part)
    layers = ("num_hidden_layers", "layer_types", "mlp_layer_types")
    yield _edited(found, lambda part: {name: value for name, value in part.items() if name not in layers})


def _edited(found: dict[str, Any], edit: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    return {name: _edited(value, edit) if isinstance(value, dict) else value for name, value in edit(found).items()}


def family(kind: str, variant: int = 0) -> nn.Module:
    """A small model of one family of transformers."""
    config = AutoConfig.for_model(kind)
    config = type(config)(**list(variants(small(config)))[variant])
    torch.manual_seed(0)
    try:
        return AutoModel.from_config(config, attn_implementation="sdpa").eval()
    except ValueError:
        return AutoModel.from_config(config, attn_implementation="eager").eval()


def run_family(kind: str) -> tuple[nn.Module, dict[str, Rows]]:
    """The first variant of a family that runs, with its traces."""
    error: Exception = ValueError(f"there is no family {kind!r}")
    for variant in range(3):
        try:
            with time_limit(SECONDS):
                model = family(kind, variant)
                return model, run_once(model)
        except Exception as failed:
            error = failed
    raise error


def transformers_table(*kinds: str) -> None:
    """Print the table of these families, by default all that run."""
    ran, failed, table = 0, collections.Counter[str](), Table()
    for kind in kinds or CONFIG_MAPPING:
        try:
            table.add(kind, *run_family(kind))
        except Exception as error:
            failed[type(error).__name__] += 1
            print(f"{kind}: {type(error).__name__}: {str(error)[:90]!r}", file=sys.stderr)
            continue
        ran += 1
    print(f"\ntransformers {transformers.__version__}, torch {torch.__version__}: {ran} families ran.")
    print(f"Weights: {dict(table.counts)}.")
    print(f"Not built or not run here: {dict(failed)}.")


def one_model(name: str) -> None:
    """Print the table of one model: a family by name, made small, or a folder with a config at its own size.

    Only the config of a folder is read: weights are random, in float32.

    Raises:
        SystemExit: for a folder without a config, and for a name that is neither a folder nor a family.
    """
    if Path(name).is_dir():
        if not Path(name, "config.json").is_file():
            raise SystemExit(f"{name} has no config.json; give a folder made by save_pretrained.")
        torch.manual_seed(0)
        model = AutoModel.from_config(AutoConfig.from_pretrained(name, local_files_only=True)).float().eval()
        seen = run_once(model)
    elif name in CONFIG_MAPPING:
        model, seen = run_family(name)
    else:
        close = difflib.get_close_matches(name, list(CONFIG_MAPPING), 3)
        hint = f"; did you mean {' or '.join(close)}" if close else ""
        raise SystemExit(f"{name} is neither a folder nor a family of transformers {transformers.__version__}{hint}.")
    table = Table()
    table.add(Path(name).name, model, seen)
    print(f"\n{type(model).__name__}, transformers {transformers.__version__}: {len(seen)} weights were followed.")
    print(f"Those with parts: {dict(table.counts)}." if table.counts else "None has parts that are kept apart.")


def census() -> None:
    """Print what is not known in any class of transformers that can be built without memory."""
    kinds = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("_NAMES")]
    tables = [getattr(modeling_auto, name) for name in kinds]
    entries = [entry for table in tables for entry in table.values()]
    names = sorted({name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)} - {None})
    built, parameters, unknown = 0, 0, collections.defaultdict[tuple[str, ...], list[str]](list)
    for name in names:
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)(_shallow(getattr(transformers, name).config_class()))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:90]!r}", file=sys.stderr)
            continue
        built += 1
        for each in explain(model):
            parameters += 1
            if not each.known:
                unknown[(generic(each.name), str(each.shape), each.how)].append(name)
    print("| parameter | shape | why | seen in |\n|---|---|---|---|")
    for (parameter, shape, how), classes in sorted(unknown.items()):
        print(f"| {parameter} | {shape} | {how} | {', '.join(dict.fromkeys(classes))} |")
    print(
        f"\ntransformers {transformers.__version__}: {built} of {len(names)} classes built, {parameters:,} parameters."
    )


def _shallow(config: Any, depth: int = 0) -> Any:
    """The config with two layers and eight experts, where that can be set, and the configs inside."""
    for name, value in list(vars(config).items()):
        few = 8 if "expert" in name else 2
        if hasattr(value, "to_dict") and depth < 4:
            _shallow(value, depth + 1)
        elif type(value) is int and name in LAYERS and value > few:
            setattr(config, name, few)
        elif name == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            config.layer_types = [kinds[i % len(kinds)] for i in range(2)]
    return config
