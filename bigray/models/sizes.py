"""What the sizes of a network in a job file have to be, before torch is asked. Pure."""

from __future__ import annotations

from bigray.errors import SpecError


def is_widths(values: object) -> bool:
    """Whether these are sizes of layers: a list, maybe empty, of whole numbers from 1."""
    return isinstance(values, list | tuple) and all(is_count(value) for value in values)


def is_count(value: object) -> bool:
    """Whether this is a whole number from 1: TOML tells 8 from 8.0, and torch takes the first alone."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_blocks(factory: str, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float) -> None:
    """Raise `SpecError`, with the factory's name, unless a transformer's blocks can have these."""
    if not all(is_count(value) for value in (width, depth, heads)):
        raise SpecError(
            f"{factory}: width, depth and heads must be whole numbers from 1, got {width!r}, {depth!r} and {heads!r}"
        )
    if width % heads:
        raise SpecError(f"{factory}: width {width} cannot be cut into {heads} heads; use a multiple of {heads}")
    if int(mlp_ratio * width) < 1:
        raise SpecError(f"{factory}: mlp_ratio {mlp_ratio} leaves a width of {width} nothing; use 1 or more")
    if not 0 <= dropout < 1:
        raise SpecError(f"{factory}: dropout must be at least 0 and less than 1, got {dropout}")
