"""Image classification: BAGM's blocks against NAG and Adam."""
