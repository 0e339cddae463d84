"""Layouts by experiment: see `benchmarks/layouts/README.md`."""
