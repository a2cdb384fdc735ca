"""What the sizes of layers in a job file have to be, before torch is asked. Pure."""

from __future__ import annotations


def is_widths(values: object) -> bool:
    """Whether these are sizes of layers: a list, maybe empty, of whole numbers from 1."""
    if not isinstance(values, list | tuple):
        return False
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in values)
