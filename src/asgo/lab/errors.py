"""The errors of the lab that a person at the command line should see."""

from __future__ import annotations


class LabError(ValueError):
    """What was asked cannot be done, in one line: who, what was got, what would fit, what to do.

    The command ``asgo`` prints the message without a traceback and exits with code 2.
    """


class Diverged(LabError):
    """The loss, or a parameter, is no longer a finite number: on every process of the run at once."""
