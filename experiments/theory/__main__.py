"""``python -m experiments.theory``."""

import sys
from collections.abc import Sequence

from experiments.command import run_command
from experiments.theory.experiment import TheoryConfig, theory


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment; the words are those of the process if None."""
    return run_command("theory", TheoryConfig, theory, args)


if __name__ == "__main__":
    sys.exit(main())
