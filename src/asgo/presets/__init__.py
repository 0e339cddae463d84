"""The named optimizers: each chooses a view and a structure and names its hyperparameters."""

from asgo.presets.adablock import AdaBlock
from asgo.presets.adagram import AdaGram
from asgo.presets.adam_mini import AdamMini
from asgo.presets.agd import AGD
from asgo.presets.asgo import ASGO
from asgo.presets.bag import BAG, BAGM
from asgo.presets.dasgo import DASGO
from asgo.presets.shampoo import OneSidedShampoo, Shampoo
from asgo.presets.spam import SPAM

__all__ = [
    "AGD",
    "ASGO",
    "BAG",
    "BAGM",
    "DASGO",
    "SPAM",
    "AdaBlock",
    "AdaGram",
    "AdamMini",
    "OneSidedShampoo",
    "Shampoo",
]
