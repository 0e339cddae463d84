"""One run: the loop, its folder, its processes."""
