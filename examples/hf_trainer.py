"""ASGO in the Hugging Face Trainer: pass the optimizer, keep everything else."""

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from asgo import ASGO, route


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards modulo 50, from random starts."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(24) + 7 * i) % 50
        return {"input_ids": tokens, "labels": tokens}


def main(steps: int = 30, folder: str = "runs/hf_trainer") -> float:
    """Train a tiny Llama with grouped-query attention; return the mean training loss."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = ASGO(route(model), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=16, logging_steps=10, save_steps=steps, report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Counting(), optimizers=(optimizer, schedule))
    return trainer.train().training_loss


if __name__ == "__main__":
    main()
