"""What the sizes of layers in a job file have to be, before torch is asked. Pure."""

from __future__ import annotations


def is_widths(values: object) -> bool:
    """Whether these are sizes of layers: a list, maybe empty, of whole numbers from 1."""
    return isinstance(values, list | tuple) and all(is_count(value) for value in values)


def is_count(value: object) -> bool:
    """Whether this is a whole number from 1: TOML tells 8 from 8.0, and torch takes the first alone."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
