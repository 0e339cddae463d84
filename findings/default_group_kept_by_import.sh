#!/bin/sh
# torch.distributed.nn takes the default process group into the default arguments of its functions (broadcast, reduce and
# others have group=group.WORLD) when it is first imported. If a group exists by then, they hold it for good: after
# destroy_process_group the object lives on and threads of gloo run until the process ends. torch._dynamo imports
# torch.distributed.nn, and DistributedDataParallel torch._dynamo, so that ordinary programs come to it after
# init_process_group. Imported before, nothing is held. Exits with 1 if that has changed. Reads /proc.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
cat >"$folder/program.py" <<'PYTHON'
import sys
import weakref
from pathlib import Path

import torch
from torch import distributed, nn

if sys.argv[1] == "before":
    import torch.distributed.nn
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
wrapped(torch.ones(1, 4)).sum().backward()
del wrapped
import torch.distributed.nn.functional as functional

group = weakref.ref(distributed.group.WORLD)
distributed.destroy_process_group()
threads = sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
default = functional.broadcast.__defaults__[0]
print(f"torch {torch.__version__}, imported {sys.argv[1]}: default {default}, threads of gloo left {threads}")
kept = group() is not None and default is group() and threads > 0
gone = group() is None and default is None and threads == 0
sys.exit(not (gone if sys.argv[1] == "before" else kept))
PYTHON
"$folder/venv/bin/python" "$folder/program.py" before
"$folder/venv/bin/python" "$folder/program.py" after
