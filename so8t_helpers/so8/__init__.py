"""SO(8): rotations in blocks of eight, and what a training left of them."""
