"""Speed: ``asgo bench step`` times whole optimizer steps, ``asgo bench root`` the inverse roots inside them.

In Python they are `asgo.lab.bench.step.bench_step` and `asgo.lab.bench.root.bench_root`.
"""
