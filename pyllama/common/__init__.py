"""Leaves that `pyllama` and `quantize` share. Nothing here imports anything but the standard library and numpy."""
