"""``python -m experiments.glm``."""

import sys
from collections.abc import Sequence

from experiments.command import run_command
from experiments.glm.experiment import GlmConfig, glm


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment; the words are those of the process if None."""
    return run_command("glm", GlmConfig, glm, args)


if __name__ == "__main__":
    sys.exit(main())
