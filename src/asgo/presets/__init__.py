"""The named optimizers: each chooses a view and a structure and names its hyperparameters."""

from asgo.presets.adagram import AdaGram
from asgo.presets.agd import AGD
from asgo.presets.asgo import ASGO
from asgo.presets.blockwise import BAG, BAGM, AdamMini
from asgo.presets.dasgo import DASGO
from asgo.presets.shampoo import OneSidedShampoo, Shampoo

__all__ = ["AGD", "ASGO", "BAG", "BAGM", "DASGO", "AdaGram", "AdamMini", "OneSidedShampoo", "Shampoo"]
