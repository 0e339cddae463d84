"""The Trainer's FSDP2: it builds the optimizer first, then accelerate puts sharded parameters in the place of others.

accelerate chooses FSDP on accelerators alone, so the kind of its state is set by hand; all else is its own and the
Trainer's: preparation, clipping, saving, loading.
"""

import pytest
import torch

from asgo import ASGO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
STEPS, SAVED, WAIT = 6, 3, 600


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, i):
        tokens = (torch.arange(10) + 5 * i) % 32
        return {"input_ids": tokens, "labels": tokens}


def model():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=32, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def trainer(folder, size, sharded):
    import os

    import transformers
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from asgo.hosts.transformers import factory

    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = transformers.TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4 // size, save_steps=SAVED, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1,
    )  # fmt: skip
    built = transformers.Trainer(
        model(), arguments, train_dataset=Counting(), optimizer_cls_and_kwargs=(factory, {"lr": 1e-2})
    )
    if sharded:
        state = built.accelerator.state
        state.distributed_type, built.is_fsdp_enabled = DistributedType.FSDP, True
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
        )  # fmt: skip
    return built


def run(folder, size, sharded, resume=None):
    """Losses, placements of the optimizer's parameters, and the ratio of update to weight of each at the end."""
    from asgo.hosts.transformers import MetricsCallback, transformers

    class Kept(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **given):
            ratios.update({key: value for key, value in logs.items() if key.startswith("ratio")})

    ratios = {}
    built = trainer(folder, size, sharded)
    built.add_callback(MetricsCallback(built))
    built.add_callback(Kept())
    built.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    inner = built.optimizer.optimizer
    assert type(inner) is ASGO
    names = [name for group in inner.param_groups for name in group["param_names"]]
    kinds = {type(p).__name__ for group in inner.param_groups for p in group["params"]}
    return losses, names, kinds, ratios


def test_the_trainers_fsdp2_gives_the_losses_of_one_process_and_resumes_on_another_count(worlds, tmp_path):
    losses, names, _, ratios = worlds(1)(run, str(tmp_path / "plain"), 1, False, seconds=WAIT)[0]
    assert losses[-1] < losses[0]
    for found, theirs, kinds, measured in worlds(2)(run, str(tmp_path / "two"), 2, True, seconds=WAIT):
        assert kinds == {"DTensor"}
        assert theirs == names
        assert found == pytest.approx(losses, rel=1e-4)
        assert measured == pytest.approx(ratios, rel=1e-3)
    saved = str(tmp_path / f"two/checkpoint-{SAVED}")
    found, *_ = worlds(1)(run, str(tmp_path / "one"), 1, True, saved, seconds=WAIT)[0]
    assert found == pytest.approx(losses, rel=1e-4)
