"""``asgo plan``: memory and time of an optimizer step on many GPUs, on paper."""
