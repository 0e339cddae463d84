"""Prompts and responses from a file of JSON lines: the loss is taken over the responses alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asgo.lab.data.corpora import CorpusConfig, read_file
from asgo.lab.data.rows import IGNORED, RowBatches, RowData, Rows
from asgo.lab.data.sampling import Draw
from asgo.lab.data.tokenization import Tokenizer
from asgo.lab.errors import LabError

Message = dict[str, str]
Piece = tuple[str, bool]
"""A text, and whether it is learned."""

KEYS = "prompt and response, or messages with role and content"


def open_instructions(config: CorpusConfig, draw: Draw, tokenizer: Tokenizer, chat: Any = None) -> RowData:
    """The data of a run on prompts with responses, each example a row; the last of an order drawn once are held out.

    Args:
        config: whose name is the file.
        draw: batch shape and seed.
        tokenizer: of the model.
        chat: the same as `transformers` has it, for its chat template and its end of text; None: neither.

    Raises:
        LabError: for a file that cannot be read, a line that is no example, and examples that do not fit a block.
    """
    examples = read_examples(config.name)
    encoded = [encode(pieces(example, chat), tokenizer) for example in examples]
    fitting = [(ids, targets) for ids, targets in encoded if (targets[: draw.block_size] != IGNORED).any()]
    held = round(len(fitting) * config.validation_fraction)
    if not 0 < held < len(fitting):
        raise LabError(
            f"corpus '{config.name}' has {len(fitting)} of {len(examples)} examples with a response within "
            f"--block-size {draw.block_size}, too few to learn from and to hold out: pass more or shorter ones."
        )
    order = np.argsort(replace(draw, seed=0).numbers(0, len(fitting)), kind="stable")
    train, held_out = (_rows([fitting[i] for i in part], draw.block_size) for part in (order[held:], order[:held]))
    digest = hashlib.sha256(repr((tokenizer.fingerprint, draw.block_size)).encode())
    for rows in (train, held_out):
        digest.update(rows.inputs.numpy().tobytes() + rows.targets.numpy().tobytes())
    cut = sum(len(ids) > draw.block_size for ids, _ in fitting)
    description = (
        f"{config.name}: {len(train):,} training and {len(held_out):,} validation examples, {cut} cut at --block-size "
        f"and {len(examples) - len(fitting)} left out; vocabulary {tokenizer.vocab_size:,}"
    )
    batches = RowBatches(train, replace(draw, fingerprint=digest.hexdigest()))
    return RowData(batches, held_out, tokenizer.vocab_size, digest.hexdigest(), description)


def read_examples(name: str) -> list[list[Message]]:
    """The conversations of a file, one a line; a prompt with a response is one of two messages.

    Raises:
        LabError: naming the line that is none.
    """
    lines = read_file(Path(name).expanduser()).splitlines()
    return [_example(line, f"line {number} of '{name}'") for number, line in enumerate(lines, 1) if line.strip()]


def _example(line: str, where: str) -> list[Message]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LabError(f"{where} is not JSON: {error}. Write one object a line, with {KEYS}.") from error
    if isinstance(row, dict) and {"prompt", "response"} <= row.keys():
        row = {"messages": [{"role": r, "content": row[k]} for r, k in (("user", "prompt"), ("assistant", "response"))]}
    if not isinstance(row, dict) or "messages" not in row:
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise LabError(f"{where} has {found}: write {KEYS}.")
    messages = row["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise LabError(f"{where} has messages that are not texts with a role: write {KEYS}.")
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise LabError(f"{where} has no response: write a message of the role assistant that is not empty.")
    return messages


def _is_message(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(found.get(key), str) for key in ("role", "content"))


def pieces(messages: Sequence[Message], chat: Any = None) -> Iterator[Piece]:
    """The text of a conversation in pieces: what the assistant says is learned, the rest is not.

    With a chat template its text; without, the contents one after the other, each response with the end of text.
    """
    if getattr(chat, "chat_template", None) is None:
        end = getattr(chat, "eos_token", None) or ""
        for message in messages:
            learned = message["role"] == "assistant"
            yield message["content"] + (end if learned else ""), learned
        return
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for learned, upto in ((False, number), (True, number + 1)):
            text = chat.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=not learned)
            if not text.startswith(done):
                raise LabError("the chat template changes earlier messages with later ones: split them into examples.")
            yield text.removeprefix(done), learned
            done = text


def encode(found: Iterator[Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Inputs, and targets one token later, `IGNORED` outside of what is learned."""
    parts = [(tokenizer.encode(text).astype(np.int64), learned) for text, learned in found]
    ids = np.concatenate([ids for ids, _ in parts])
    learned = np.concatenate([np.full(len(ids), learned) for ids, learned in parts])
    return ids[:-1], np.where(learned, ids, IGNORED)[1:]


def _rows(examples: Sequence[tuple[np.ndarray, np.ndarray]], block_size: int) -> Rows:
    """The first `block_size` tokens of each example, filled up with token 0 that no target follows."""
    shape = len(examples), min(block_size, max(len(ids) for ids, _ in examples))
    inputs, targets = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
    for row, (ids, wanted) in enumerate(examples):
        inputs[row, : len(ids)] = ids[: shape[1]]
        targets[row, : len(ids)] = wanted[: shape[1]]
    return Rows(torch.from_numpy(inputs), torch.from_numpy(targets))
