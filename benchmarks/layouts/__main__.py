"""Which rows of every weight belong together, by experiment, against what `asgo.route` makes of them.

    python -m benchmarks.layouts transformers > benchmarks/layouts/transformers.md
    python -m benchmarks.layouts census > benchmarks/layouts/census.md
    python -m benchmarks.layouts timm > benchmarks/layouts/timm.md
    python -m benchmarks.layouts litgpt > benchmarks/layouts/litgpt.md
    python -m benchmarks.layouts diffusers > benchmarks/layouts/diffusers.md
    python -m benchmarks.layouts model llama
    python -m benchmarks.layouts model FOLDER

``model`` takes a family of transformers by name, which is made small, or a folder with a ``config.json``.
"""

from __future__ import annotations

import importlib
import sys
import warnings

COMMANDS = {
    "transformers": ("hugging_face", "transformers_table"),
    "census": ("hugging_face", "census"),
    "model": ("hugging_face", "one_model"),
    "timm": ("vision", "timm_table"),
    "litgpt": ("language", "litgpt_table"),
    "diffusers": ("diffusion", "diffusers_table"),
}


def main(what: str, *names: str) -> None:
    """Run one of the commands above."""
    warnings.filterwarnings("ignore")
    module, function = COMMANDS[what]
    getattr(importlib.import_module(f"benchmarks.layouts.{module}"), function)(*names)


if __name__ == "__main__":
    main(*sys.argv[1:])
