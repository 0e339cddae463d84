"""The example scripts: where they are, the lines that switch asgo on, their data and how they are run."""

from dataclasses import dataclass

LANGUAGE = """
import json, pathlib
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "sleeps"]
lines = [" ".join(words[(i * j) % 10] for j in range(1, 24)) for i in range(1, 400)]
vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", *words])}
tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
tokens.pre_tokenizer = pre_tokenizers.Whitespace()
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
"""A model with random weights, its tokenizer and texts."""

INSTRUCTIONS = (
    LANGUAGE
    + """
rows = [{"instruction": line[:40], "output": line[40:]} for line in lines]
pathlib.Path("data/train.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""
)
"""The same model; the texts as prompts and responses."""

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
        changes: lines of the script, whole, and what stands in their place.
        prepare: a program that makes the data.
        whole: the words after ``python`` that train at once.
        resumed: those that continue from the middle.
        same: a program that fails if both gave other weights.
        module: of the installed package, that is the script.
        repository: of the makers, if no package has the script.
        tag: of the repository.
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


SWITCH = "optimizer_cls_and_kwargs=(asgo.hosts.transformers.factory, {'lr': 1e-2})"
SFT = f"script.py --model_name_or_path model --dataset_name data {TRAINER} --max_length 32 --bf16 False"
OLORA = (
    "script.py --base_model model --data_path data --seed 0 --lora_r 8 --lora_target_modules all-linear "
    "--dtype float32 --device_map cpu --save_step 10 --eval_step 10 --cutoff_len 64"
)
CLM = f"script.py --model_name_or_path model --train_file text.txt --block_size 32 --do_train {TRAINER}"

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
            tag="v5.24.0",
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
            resumed=["-c", "import os, runpy, sys; os.environ['RESUME'] = 'whole/checkpoint-10'; "
                     f"sys.argv = {[*OLORA.split(), '--output_dir', 'resumed']}; "
                     "runpy.run_path('script.py', run_name='__main__')"],
            same=SAME_ADAPTERS,
            said=("OneSided",),
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
            resumed=["-c", "import runpy, sys; sys.argv = ['fit.py', 'half.ckpt', '1']; runpy.run_path('fit.py'); "
                     "sys.argv = ['fit.py', 'resumed.ckpt', '2', 'half.ckpt']; runpy.run_path('fit.py')"],
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
