"""Models and tokenizers of Hugging Face with their weights: from a folder, a .gguf file, or the hub."""

from __future__ import annotations

from collections.abc import Callable
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
    found = _load(transformers.AutoTokenizer.from_pretrained, name, "tokenizer")
    if not found.is_fast:
        raise LabError(
            f"the tokenizer of {name} is not one of the library tokenizers: pass a model with tokenizer.json."
        )
    return found


def as_pretrained(serialized: str) -> Any:
    """A tokenizer for `transformers` from the content of a tokenizer.json."""
    transformers, tokenizers = (need(module, "--save-model", INSTALL) for module in ("transformers", "tokenizers"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(serialized))


def load_model(name: str, **options: Any) -> nn.Module:
    """A causal language model with its weights.

    Args:
        name: a folder, a .gguf file, or a name of the hub.
        options: for `from_pretrained`: dtype, or fields of its config.

    Raises:
        LabError: if there is none that can be read.
    """
    transformers = need("transformers", "--model.pretrained", INSTALL)
    return _load(transformers.AutoModelForCausalLM.from_pretrained, name, "causal language model", **options)


def load_config(name: str, **options: Any) -> Any:
    """What `load_model` reads before any weights."""
    transformers = need("transformers", "--model.pretrained", INSTALL)
    return _load(transformers.AutoConfig.from_pretrained, name, "model", **options)


def _load(read: Callable[..., Any], name: str, what: str, **options: Any) -> Any:
    path = Path(name).expanduser()
    try:
        if path.exists():
            files = [path] if path.is_file() else [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
            gguf = {"gguf_file": files[0].name} if files else {}
            return read(path.parent if path.is_file() else path, **gguf, **options)
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
