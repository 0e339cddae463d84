#!/bin/sh
# transformers 5.24.0: reading an attribute that differs between layers raises RuntimeError, not AttributeError, so that
# hasattr and getattr with a default do not answer: they raise. Whoever asks a config for its key-value heads meets it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "transformers==5.24.0" 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import transformers
from transformers import AutoConfig

config = AutoConfig.for_model("embedding_gemma2_text")
print("transformers", transformers.__version__)
try:
    print("getattr with a default gave", getattr(config, "num_key_value_heads", None))
except Exception as error:
    print(f"getattr with a default raised {type(error).__name__}, a RuntimeError: {isinstance(error, RuntimeError)}")
    print(f"an AttributeError: {isinstance(error, AttributeError)}")
    sys.exit(not isinstance(error, RuntimeError) or isinstance(error, AttributeError))
sys.exit("it answers now")
PYTHON
