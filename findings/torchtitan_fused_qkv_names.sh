#!/bin/sh
# torchtitan 0.3.0: the Llama 3 models have one weight for query, key and value, `qkv_linear.wqkv.weight`, among their
# parameters, and three, `wq`, `wk` and `wv`, in their state_dict. So state of an optimizer that is kept by the names of
# parameters has no partner of that name in a checkpoint of the model, and three names there belong to no parameter.
# Its first third is not the query either: the rows of all three alternate by key head. An optimizer that cuts a
# fused weight into equal blocks, as fits GPT-2 and Phi-3, mixes them.
# Exits with 1 if that has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchtitan==0.3.0 triton==3.9.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torchtitan.models.llama3 import model_registry

model = model_registry("debugmodel").model.build()
block = "layers.0.attention.qkv_linear."
named = {name for name, _ in model.named_parameters() if name.startswith(block)}
weight = model.get_parameter(f"{block}wqkv.weight")
with torch.no_grad():
    weight.copy_(torch.arange(len(weight))[:, None].expand_as(weight))  # every row holds its own number
saved = {name: value for name, value in model.state_dict().items() if name.startswith(block)}
print("torch", torch.__version__, "torchtitan", version("torchtitan"))
print("among the parameters:", *sorted(named))
print("in the state_dict:", *sorted(saved))
rows = {name.split(".")[-2]: value[:, 0].int().tolist() for name, value in saved.items()}
for name, held in rows.items():
    print(f"{name} holds the rows", *held[:3], "...", *held[15:18], "... of", len(weight))
head = model.layers["0"].attention.qkv_linear.head_dim
expected = {
    part: [3 * head * group + head * place + row for group in range(len(weight) // (3 * head)) for row in range(head)]
    for place, part in enumerate(("wq", "wk", "wv"))
}
sys.exit(not (named == {f"{block}wqkv.weight"} and rows == expected))
PYTHON
