"""The example scripts: where they are, the lines that switch asgo on, their data and how they are run."""

from dataclasses import dataclass

TOKENS = """
import json, pathlib
from tokenizers import Tokenizer, models, pre_tokenizers

words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "sleeps"]
lines = [" ".join(words[(i * j) % 10] for j in range(1, 24)) for i in range(1, 400)]
vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", *words])}
tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
"""
"""Words, lines of them, and their tokenizer."""

LANGUAGE = (
    TOKENS
    + """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

fast = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", model_max_length=64)
set_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), bos_token_id=None, eos_token_id=1, **sizes))
model.save_pretrained("model")
fast.save_pretrained("model")
pathlib.Path("data").mkdir()
pathlib.Path("data/train.jsonl").write_text("".join(json.dumps({"text": line}) + "\\n" for line in lines))
pathlib.Path("text.txt").write_text("\\n".join(lines))
"""
)
"""A model with random weights, its tokenizer and texts."""

INSTRUCTIONS = (
    LANGUAGE
    + """
rows = [{"instruction": line[:40], "output": line[40:]} for line in lines]
pathlib.Path("data/train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
)
"""The same model; the texts as prompts and responses."""

PAIRS = (
    TOKENS
    + """
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

set_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes))
model.save_pretrained("bert-base-cased")
PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>").save_pretrained("bert-base-cased")
rows = [
    {"idx": i, "sentence1": words[i % 10] + " " + words[i % 7], "sentence2": words[i % 3], "label": i % 2}
    for i in range(128)
]
data = pathlib.Path("nyu-mll/glue")
data.mkdir(parents=True)
for part in ("train", "validation"):
    (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
files = "".join(f"  - split: {part}\\n    path: {part}.jsonl\\n" for part in ("train", "validation"))
(data / "README.md").write_text(f"---\\nconfigs:\\n- config_name: mrpc\\n  data_files:\\n{files}---\\n")
pathlib.Path("glue").mkdir()
pathlib.Path("glue/glue.py").write_text('''
import datasets
import evaluate

class Share(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(kinds))

    def _compute(self, predictions, references):
        return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(references)}
''')
"""
)
"""A model, a dataset and a metric in folders with the names by which the script would load them from the Hub."""

TITAN = (
    TOKENS
    + """
tokens.add_special_tokens(["<eos>"])
tokenizer = pathlib.Path("tests/assets/tokenizer")
tokenizer.mkdir(parents=True)
tokens.save(str(tokenizer / "tokenizer.json"))
(tokenizer / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
text = pathlib.Path("tests/assets/c4_test")
text.mkdir()
(text / "data.json").write_text("".join(json.dumps({"text": line}) + "\\n" for line in lines))
pathlib.Path("run.py").write_text('''
import importlib.util, os, runpy, sys, types, torch

def nothing(*_, **__):
    return {}

def causal(q, k, v, *, enable_gqa, **_):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa), None

torch._utils._get_available_device_type = lambda: "cpu"
torch.distributed.set_timeout = nothing
for name in ("reset_peak_memory_stats", "empty_cache", "memory_stats"):
    setattr(torch.cpu, name, nothing)
torch.cpu.current_device, torch.cpu.get_device_name = lambda: 0, lambda *_: "cpu"
torch.cpu.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=1, name="cpu")
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
from torchtitan.models.common.attention import FlexAttention
import torchtitan.models.llama3
FlexAttention._compiled_flex_attn = staticmethod(causal)
name = "torchtitan.models.llama3.config_registry"
spec = importlib.util.spec_from_file_location(name, "script.py")
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
runpy.run_module("torchtitan.train", run_name="__main__")
''')
"""
)
"""A tokenizer and texts where the script looks for them, and what runs it on a CPU with torch 2.13: torchtitan is made
for accelerators and newer torch, asks the first for their memory, and its attention has no backward on a CPU."""

ALPACA = (
    LANGUAGE
    + """
rows = [{"instruction": line[:40], "input": "", "output": line[40:]} for line in lines[:64]]
pathlib.Path("alpaca_data.json").write_text(json.dumps(rows))
config = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 0}}
pathlib.Path("ds_config.json").write_text(json.dumps(config))
"""
)
"""The same model; prompts and responses in one file, and a configuration of DeepSpeed without ZeRO."""

PICTURES = """
import pathlib
from PIL import Image

for part in ("train", "validation"):
    folder = pathlib.Path("data") / part / "0"
    folder.mkdir(parents=True)
    for i in range(32):
        Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(folder / f"{i}.png")
"""
"""Pictures that are all the same: timm's script saves no random state, so that their order differs after resuming."""

SAME_SAFETENSORS = """
from safetensors.torch import load_file
a, b = (load_file(f"{folder}/model.safetensors") for folder in ("whole", "resumed"))
assert a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)
"""
SAME_EPOCHS = SAME_SAFETENSORS.replace("/model.", "/epoch_2/model.")
SAME_ADAPTERS = SAME_SAFETENSORS.replace("/model.", "/adapter_model.")
SAME_LIGHTNING = """
import torch
a, b = (torch.load(f"{name}.ckpt", weights_only=False)["state_dict"] for name in ("whole", "resumed"))
assert all(torch.equal(a[k], b[k]) for k in a)
"""
SAME_TIMM = """
import torch
a, b = (torch.load(f"out/{name}/last.pth.tar", weights_only=False)["state_dict"] for name in ("whole", "resumed"))
assert all(torch.equal(a[k], b[k]) for k in a)
"""

SAME_TITAN = """
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
for folder in ("whole", "resumed"):
    dcp_to_torch_save(f"{folder}/checkpoint/step-4", f"{folder}.pt")
a, b = (torch.load(f"{folder}.pt", weights_only=False) for folder in ("whole", "resumed"))
names = [name for name, value in a.items() if isinstance(value, torch.Tensor)]
assert len(names) > 50 and all(torch.equal(a[name], b[name]) for name in names)
"""

FIT = """
import sys, lightning, script, logging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

class Seeds(lightning.Callback):
    def on_train_batch_start(self, trainer, *_):  # the model has dropout, and Lightning saves no random state
        lightning.seed_everything(trainer.global_step, verbose=False)

lightning.seed_everything(0)
quiet = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
quiet["callbacks"] = [Seeds()]
name, steps, start = sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
trainer = lightning.Trainer(max_epochs=steps, limit_train_batches=10, **quiet)
trainer.fit(script.LightningTransformer(vocab_size=20), ckpt_path=start)
trainer.save_checkpoint(name)
"""
"""The makers' module has a model and its data; a Trainer is left to its user."""

TRAINER = (
    "--max_steps 8 --save_steps 4 --logging_steps 1 --report_to none --use_cpu True --per_device_train_batch_size 4"
)
TIMM = (
    "script.py --data-dir data --model vit_tiny_patch16_224 --img-size 32 --model-kwargs img_size=32 --num-classes 2 "
    "--device cpu --opt asgo --lr 1e-3 -b 8 --warmup-epochs 0 --workers 1 --no-prefetcher --no-aug --output out"
)


@dataclass(frozen=True)
class Example:
    """One script.

    Args:
        name: of the framework.
        packages: what to install beside torch.
        changes: lines of the script, whole, and what stands in the place of the first like each.
        prepare: a program that makes the data.
        whole: the words after ``python`` that train at once.
        resumed: those that continue from the middle.
        same: a program that fails if both gave other weights.
        module: of the installed package, that is the script.
        repository: of the makers, if no package has the script.
        tag: of the repository, or a commit.
        path: of the script in it.
        said: words of the report that it prints.
    """

    name: str
    packages: tuple[str, ...]
    changes: tuple[tuple[str, str], ...]
    prepare: str
    whole: list[str]
    resumed: list[str]
    same: str
    module: str = ""
    repository: str | None = None
    tag: str = ""
    path: str = ""
    said: tuple[str, ...] = ("AdamW", "OneSided")


def program(argv: list[str], first: str = "", script: str = "script.py") -> list[str]:
    """The words after ``python`` that do something first, then run a script with these arguments."""
    run = f"sys.argv = {argv}; runpy.run_path({script!r}, run_name='__main__')"
    return ["-c", f"import os, runpy, shutil, sys; {first}{run}"]


SWITCH = "optimizer_cls_and_kwargs=(asgo.hosts.transformers.factory, {'lr': 1e-2})"
SFT = f"script.py --model_name_or_path model --dataset_name data {TRAINER} --max_length 32 --bf16 False"
OLORA = (
    "script.py --base_model model --data_path data --seed 0 --lora_r 8 --lora_target_modules all-linear "
    "--dtype float32 --device_map cpu --save_step 10 --eval_step 10 --cutoff_len 64"
)
CLM = f"script.py --model_name_or_path model --train_file text.txt --block_size 32 --do_train {TRAINER}"
EPOCHS = "script.py --cpu --checkpointing_steps epoch"
ONE_PROCESS = (
    "os.environ |= {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'DS_ACCELERATOR': 'cpu', "
    "'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29511'}; "
)
DEBUG = (
    "--module llama3 --config llama3_debugmodel --training.steps 4 --training.seq_len 64 --training.local_batch_size 2 "
    "--checkpoint.enable --checkpoint.interval 2 --validator.no-enable"
)
ZERO = (
    f"script.py --model_name_or_path model --data_path alpaca_data.json {TRAINER} --model_max_length 32 --bf16 False "
    "--deepspeed ds_config.json"
)

EXAMPLES = {
    example.name: example
    for example in (
        Example(
            name="trl",
            packages=("trl==1.16.0", "transformers==5.24.0"),
            module="trl.scripts.sft",
            changes=(
                ("    import transformers", "    import asgo, asgo.hosts.transformers, transformers"),
                ("        args=training_args,", f"        args=training_args, {SWITCH},"),
                ("    # Log training complete", "    print(asgo.report(trainer.optimizer.optimizer))"),
            ),
            prepare=LANGUAGE,
            whole=[*SFT.split(), "--output_dir", "whole"],
            resumed=[*SFT.split(), "--output_dir", "resumed", "--resume_from_checkpoint", "whole/checkpoint-4"],
            same=SAME_SAFETENSORS,
        ),
        Example(
            name="transformers",
            packages=("transformers==5.24.0", "accelerate==1.15.0", "datasets", "evaluate", "scikit-learn"),
            repository="huggingface/transformers",
            tag="cc041637bc2b3639bba0b8f85672c1653cdb6248",
            path="examples/pytorch/language-modeling/run_clm.py",
            changes=(
                ("import transformers", "import asgo, asgo.hosts.transformers, transformers"),
                ("        args=training_args,", f"        args=training_args, {SWITCH},"),
                (
                    "        metrics = train_result.metrics",
                    "        metrics, _ = train_result.metrics, print(asgo.report(trainer.optimizer.optimizer))",
                ),
            ),
            prepare=LANGUAGE,
            whole=[*CLM.split(), "--output_dir", "whole"],
            resumed=[*CLM.split(), "--output_dir", "resumed", "--resume_from_checkpoint", "whole/checkpoint-4"],
            same=SAME_SAFETENSORS,
        ),
        Example(
            name="peft",
            packages=("peft==0.20.0", "transformers==5.24.0", "accelerate==1.15.0", "datasets"),
            repository="huggingface/peft",
            tag="v0.20.0",
            path="examples/olora_finetuning/olora_finetuning.py",
            changes=(
                ("import transformers", "import asgo, asgo.hosts.transformers, transformers"),
                ("        model=model,", f"        model=model, {SWITCH},"),
                (
                    "    trainer.train()",
                    "    trainer.train(os.environ.get('RESUME')), print(asgo.report(trainer.optimizer.optimizer))",
                ),
            ),
            prepare=INSTRUCTIONS,
            whole=[*OLORA.split(), "--output_dir", "whole"],
            resumed=program(
                [*OLORA.split(), "--output_dir", "resumed"], "os.environ['RESUME'] = 'whole/checkpoint-10'; "
            ),
            same=SAME_ADAPTERS,
            said=("OneSided",),
        ),
        Example(
            name="accelerate",
            packages=("accelerate==1.15.0", "transformers==5.24.0", "datasets", "evaluate", "scikit-learn"),
            repository="huggingface/accelerate",
            tag="16cb6eb80dd9aa8b4df1a63ef57863e455d53b83",
            path="examples/by_feature/checkpointing.py",
            changes=(
                ("import evaluate", "import asgo, evaluate"),
                (
                    "    optimizer = AdamW(params=model.parameters(), lr=lr)",
                    "    optimizer = asgo.ASGO(asgo.route(model), lr=1e-2)",
                ),
                ("    # Instantiate scheduler", "    print(asgo.report(optimizer))"),
            ),
            prepare=PAIRS,
            whole=[*EPOCHS.split(), "--output_dir", "whole"],
            resumed=[*EPOCHS.split(), "--output_dir", "resumed", "--resume_from_checkpoint", "whole/epoch_0"],
            same=SAME_EPOCHS,
        ),
        Example(
            name="deepspeed",
            packages=("setuptools", "deepspeed==0.19.8", "transformers==5.24.0", "accelerate==1.15.0"),
            repository="deepspeedai/DeepSpeedExamples",
            tag="45b4b7156c8794a3452a5a7d03dbd8d797068569",
            path="training/tensor_parallel/hf_integration/train.py",
            changes=(
                ("import transformers", "import asgo, asgo.hosts.transformers, transformers"),
                ("        args=training_args,", f"        args=training_args, {SWITCH},"),
                (
                    "    trainer.train()",
                    "    trainer.train(__import__('os').environ.get('RESUME')), "
                    "print(asgo.report(trainer.model_wrapped.optimizer))",
                ),
            ),
            prepare=ALPACA,
            whole=program([*ZERO.split(), "--output_dir", "whole"], ONE_PROCESS),
            resumed=program(
                [*ZERO.split(), "--output_dir", "resumed"],
                f"{ONE_PROCESS}os.environ['RESUME'] = 'whole/checkpoint-4'; ",
            ),
            same=SAME_SAFETENSORS,
        ),
        Example(
            name="torchtitan",
            packages=("torchtitan==0.3.0", "triton"),
            module="torchtitan.models.llama3.config_registry",
            changes=(
                (
                    "from torchtitan.components.optimizer import default_adamw, LRSchedulersContainer",
                    "from torchtitan.components.optimizer import default_adamw, LRSchedulersContainer; "
                    "from asgo.hosts.torchtitan import default_asgo",
                ),
                ("        optimizer=default_adamw(lr=8e-4),", "        optimizer=default_asgo(lr=1e-2),"),
            ),
            prepare=TITAN,
            whole=["run.py", *DEBUG.split(), "--dump_folder", "whole"],
            resumed=program(
                ["run.py", *DEBUG.split(), "--dump_folder", "resumed"],
                "shutil.copytree('whole/checkpoint/step-2', 'resumed/checkpoint/step-2'); ",
                "run.py",
            ),
            same=SAME_TITAN,
        ),
        Example(
            name="lightning",
            packages=("lightning==2.6.6", "requests"),
            module="lightning.pytorch.demos.transformer",
            changes=(
                ("import math", "import asgo, math"),
                (
                    "        return torch.optim.SGD(self.model.parameters(), lr=0.1)",
                    "        o = asgo.ASGO(asgo.route(self.model), lr=1e-2); print(asgo.report(o)); return o",
                ),
            ),
            prepare=(
                "import pathlib; pathlib.Path('data').mkdir(); pathlib.Path('data/wikitext-2.txt').write_text("
                "'\\n'.join(' '.join('abcdefghij'[(i * j) % 10] for j in range(1, 30)) for i in range(1, 200)))\n"
                f"pathlib.Path('fit.py').write_text({FIT!r})"
            ),
            whole=["fit.py", "whole.ckpt", "2"],
            resumed=program(
                ["fit.py", "resumed.ckpt", "2", "half.ckpt"],
                "sys.argv = ['fit.py', 'half.ckpt', '1']; runpy.run_path('fit.py'); ",
                "fit.py",
            ),
            same=SAME_LIGHTNING,
        ),
        Example(
            name="timm",
            packages=("timm==1.0.28",),
            repository="huggingface/pytorch-image-models",
            tag="v1.0.28",
            path="train.py",
            changes=(
                ("import argparse", "import argparse, asgo, asgo.hosts.timm; asgo.hosts.timm.register()"),
                (
                    "        **optimizer_kwargs(cfg=args),",
                    "        **optimizer_kwargs(cfg=args), param_group_fn=asgo.hosts.timm.groups,",
                ),
                (
                    "        defaults = copy.deepcopy(optimizer.defaults)",
                    "        defaults = copy.deepcopy(optimizer.defaults); print(asgo.report(optimizer))",
                ),
            ),
            prepare=PICTURES,
            whole=[*TIMM.split(), "--epochs", "2", "--experiment", "whole"],
            resumed=[*TIMM.split(), "--epochs", "2", "--experiment", "resumed",
                     "--resume", "out/whole/checkpoint-0.pth.tar"],
            same=SAME_TIMM,
        ),
    )
}  # fmt: skip
