"""``python -m experiments.vision``."""

import sys
from collections.abc import Sequence

from experiments.command import run_command
from experiments.vision.experiment import VisionConfig, vision


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment; the words are those of the process if None."""
    return run_command("vision", VisionConfig, vision, args)


if __name__ == "__main__":
    sys.exit(main())
