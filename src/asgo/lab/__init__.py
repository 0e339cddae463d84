"""The harness: train language models, compare optimizers, look at what an optimizer does.

A distribution of its own, ``asgo-lab``. The command is ``asgo``; the same in Python are
`asgo.lab.training.train.train`, `asgo.lab.compare.compare.compare` and `asgo.lab.inspection.routing.inspect_routing`,
each with a config.
"""
