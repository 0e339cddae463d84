"""What the benchmarks of speed share: their flags, shapes, optimizers, clocks and tables."""
