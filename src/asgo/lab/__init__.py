"""The harness: train language models, compare optimizers, look at what an optimizer does.

It is installed with ``asgo[lab]``. The command is ``asgo``; the same in Python are `asgo.lab.train.train`,
`asgo.lab.compare.compare` and `asgo.lab.inspect.inspect_routing`, each with a config of `asgo.lab.config`.
"""
