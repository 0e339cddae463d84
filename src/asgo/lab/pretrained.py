"""Models and tokenizers of Hugging Face with their weights: from a folder, a .gguf file, or the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from asgo.lab.errors import LabError
from asgo.lab.packages import need

INSTALL = "pip install 'asgo[finetune]'"


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, as `transformers` has it.

    Args:
        name: a folder, a .gguf file, or a name of the hub.

    Raises:
        LabError: if there is none that can be read.
    """
    transformers = need("transformers", "--model.pretrained", INSTALL)
    found = _load(transformers.AutoTokenizer.from_pretrained, name, "tokenizer", {})
    if not found.is_fast:
        raise LabError(
            f"the tokenizer of {name} is not one of the library tokenizers: pass a model with tokenizer.json."
        )
    return found


def as_pretrained(serialized: str) -> Any:
    """A tokenizer for `transformers` from the content of a tokenizer.json."""
    transformers, tokenizers = (need(module, "--save-model", INSTALL) for module in ("transformers", "tokenizers"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(serialized))


def load_model(name: str, options: Mapping[str, Any]) -> nn.Module:
    """A causal language model with its weights.

    Args:
        name: a folder, a .gguf file, or a name of the hub.
        options: for `from_pretrained`, as dtype, or fields of its config.

    Raises:
        LabError: if there is none that can be read.
    """
    transformers = need("transformers", "--model.pretrained", INSTALL)
    if _gguf(Path(name).expanduser()) and hasattr(transformers, "GgufConfig"):  # Else they stay packed, and untrained.
        options = {**options, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return _load(transformers.AutoModelForCausalLM.from_pretrained, name, "causal language model", options)


def _gguf(path: Path) -> Path | None:
    """The .gguf file that a path names, or that a folder has instead of a config.json."""
    if path.is_file():
        return path
    return None if (path / "config.json").exists() else min(path.glob("*.gguf"), default=None)


def _load(read: Callable[..., Any], name: str, what: str, options: Mapping[str, Any]) -> Any:
    path = Path(name).expanduser()
    try:
        if path.exists():
            file = _gguf(path)
            return read(path, **options) if file is None else read(file.parent, gguf_file=file.name, **options)
        if name.count("/") != 1 or name.startswith((".", "~", "/")):
            raise ValueError("there is no such folder")
        return read(name, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise LabError(
            f"--model.pretrained {name} gives no {what}: {lines[0].rstrip('.')}. Pass a folder of Hugging Face, a "
            ".gguf file, or OWNER/NAME of the hub."
        ) from error


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """The model with a pair of trainable factors beside every linear layer but the head, everything else frozen.

    "LoRA: Low-Rank Adaptation of Large Language Models", Hu et al., 2021. alpha is twice the rank.

    Args:
        model: changed in place.
        rank: inner size of the factors.

    Raises:
        LabError: without the package peft, or for a model without linear layers that it knows.
    """
    peft: Any = need("peft", "--model.lora-rank", INSTALL)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise LabError(f"--model.lora-rank {rank}: {str(error).splitlines()[0]}") from error
