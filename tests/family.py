"""Every optimizer of the library, for the suites that all of them must pass. A new one is one more row."""

import pytest
import torch

from asgo import AGD, ASGO, BAG, BAGM, DASGO, SPAM, AdaBlock, AdaGram, AdamMini, OneSidedShampoo, Shampoo

PRESETS = {
    "ours": lambda params, **options: ASGO(params, **{"lr": 0.02, **options}),
    "ours, packed": lambda params, **options: ASGO(params, **{"lr": 0.02, "packed_state": True, **options}),
    "ours, square root": lambda params, **options: ASGO(params, **{"lr": 0.02, "root": "square_root", **options}),
    "paper": lambda params, **options: ASGO.paper(params, **{"lr": 0.02, **options}),
    "theory": lambda params, **options: ASGO.theory(params, **{"lr": 0.1, **options}),
    "reference": lambda params, **options: ASGO.reference(params, **{"lr": 0.02, **options}),
    "dasgo": lambda params, **options: DASGO(params, **{"lr": 0.02, **options}),
    "bag": lambda params, **options: BAG(params, **{"lr": 0.05, **options}),
    "bagm": lambda params, **options: BAGM(params, **{"lr": 0.02, **options}),
    "bagm, rows": lambda params, **options: BAGM(params, **{"lr": 0.02, "blocks": "row", **options}),
    "one-sided shampoo": lambda params, **options: OneSidedShampoo(params, **{"lr": 0.1, **options}),
    "shampoo": lambda params, **options: Shampoo(params, **{"lr": 0.1, **options}),
    "shampoo, packed": lambda params, **options: Shampoo(params, **{"lr": 0.1, "packed_state": True, **options}),
    "adagram": lambda params, **options: AdaGram(params, **{"lr": 0.1, **options}),
    "adagram, symmetric": lambda params, **options: AdaGram(params, **{"lr": 0.1, "direction": "symmetric", **options}),
    "adam-mini": lambda params, **options: AdamMini(params, **{"lr": 0.02, **options}),
    "adablock": lambda params, **options: AdaBlock(params, **{"lr": 0.02, **options}),
    "spam, asgo": lambda params, **options: SPAM(ASGO(params, **{"lr": 0.02, **options}), 5.0, 25, 5),
    "spam, adam-mini": lambda params, **options: SPAM(AdamMini(params, **{"lr": 0.02, **options}), 5.0, 6, 2),
    "agd": lambda params, **options: AGD(params, **{"lr": 0.02, **options}),
}
LARGEST = {
    "shampoo": lambda m, n: max(m * n, *(k * k for k in (m, n) if k <= 8192)),
    "shampoo, packed": lambda m, n: max(m * n, *(k * (k + 1) // 2 for k in (m, n) if k <= 8192)),
    "adablock": lambda m, n: 10 * n * (m + 10) + 1,
    "adagram": lambda m, n: 5 * m * n + 1,
    "adagram, symmetric": lambda m, n: 6 * m * n + 30,
}
"""Numbers in the largest tensor of the state of an ``m x n`` matrix, where it is not bounded by the shorter side."""

every_preset = pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS.keys())


def without_decay(optimizer):
    """The optimizer with weight decay off in every group."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


BAD = {
    "lr": [-1.0, float("nan"), float("inf"), "0.1", None, torch.ones(2), torch.tensor(-1.0)],
    "betas": [(1.0, 0.5), (-0.1, 0.5), (0.9, 1.1), (0.9,), 0.9, (0.9, "x")],
    "eps": [0.0, -1e-8, float("nan"), "small"],
    "weight_decay": [-0.1, float("inf"), None],
    "precondition_frequency": [0, -1, 1.5, True],
    "statistic": ["gradients", None],
    "nesterov": ["yes", 2],
    "cross_normalize": [None],
    "adjust_lr": ["match_rms_adamw", False],
    "root": ["svd", None],
    "maximize": ["no"],
}
"""Values that every hyperparameter refuses."""
