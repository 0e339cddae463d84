"""``python -m experiments.regret``."""

import sys
from collections.abc import Sequence

from experiments.command import run_command
from experiments.regret.experiment import RegretConfig, regret


def main(args: Sequence[str] | None = None) -> int:
    """Run the experiment; the words are those of the process if None."""
    return run_command("regret", RegretConfig, regret, args)


if __name__ == "__main__":
    sys.exit(main())
