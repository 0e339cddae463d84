"""The optimizers that can be trained, compared and timed, by name."""
