"""What a part of a document may look like: keys, types and bounds, as tables that `mismatches` walks.

Faults are told as (path, message), where a path is the keys and indexes from the document's root: who knows the file
turns it into a line. Nothing is converted: YAML's `1` is no string, and `"1"` no number, as the API server has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.nearest import unknown
from bigray.errors import did_you_mean

Mistake = tuple[Path, str]

QUANTITY = re.compile(r"^[+-]?(\d+\.?\d*|\.\d+)(n|u|m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][+-]?\d+)?$")


@dataclass(frozen=True)
class Scalar:
    """One value. `kind` is a key of `_KINDS`."""

    kind: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    """Less than every value, and no value itself."""
    pattern: str | None = None
    """What the whole text has to be; `hint` says it in words."""
    hint: str = ""


@dataclass(frozen=True)
class Each:
    """A list whose items all look alike."""

    of: Shape
    least: int = 0


@dataclass(frozen=True)
class Table:
    """A mapping with keys of the user's own."""

    of: Shape
    keys: str | None = None
    """What each key has to be, as a pattern; `known` are the usual ones."""
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fields:
    """A mapping with known keys only."""

    fields: Mapping[str, Shape]
    required: tuple[str, ...] = ()
    gone: Mapping[str, str] = field(default_factory=dict)
    """Keys of other versions or other objects that people write here, and what to do instead."""
    one_of: tuple[str, ...] = ()
    """Keys of which at most one may be there, such as the sources of a volume."""


@dataclass(frozen=True)
class Anything:
    """Not looked into."""


Shape = Scalar | Each | Table | Fields | Anything

TEXT = Scalar("text")
FLAG = Scalar("flag")
WHOLE = Scalar("whole")
COUNT = Scalar("whole", least=0)
AMOUNT = Scalar("quantity")
PORT = Scalar("whole", least=1, most=65535)
TEXTS = Each(TEXT)
TEXT_TABLE = Table(TEXT)
ANYTHING = Anything()


def choice(*values: str) -> Scalar:
    """A text that is one of these."""
    return Scalar("text", choices=values)


def fields(required: str = "", /, **shapes: Shape) -> Fields:
    """Known keys; `required` names some of them, with spaces between."""
    return Fields(shapes, tuple(required.split()))


def pruned(value: Any) -> Any:
    """The document without nulls, which the API server takes for keys that are not there."""
    if isinstance(value, dict):
        return {key: pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [pruned(item) for item in value]
    return value


def mismatches(shape: Shape, value: Any, path: Path = ()) -> Iterator[Mistake]:
    """Every place where `value`, already pruned, does not look like `shape`."""
    if isinstance(shape, Scalar):
        message = _scalar_fault(shape, value)
        if message:
            yield path, message
    elif isinstance(shape, Each):
        yield from _list_faults(shape, value, path)
    elif isinstance(shape, Table):
        yield from _table_faults(shape, value, path)
    elif isinstance(shape, Fields):
        yield from _field_faults(shape, value, path)


def _list_faults(shape: Each, value: Any, path: Path) -> Iterator[Mistake]:
    if not isinstance(value, list):
        yield path, f"expected a list ('- ' before each item), got {shown(value)}"
        return
    if len(value) < shape.least:
        yield path, "is empty, give at least one item"
    for index, item in enumerate(value):
        yield from mismatches(shape.of, item, (*path, index))


def _table_faults(shape: Table, value: Any, path: Path) -> Iterator[Mistake]:
    if not isinstance(value, dict):
        yield path, f"expected a mapping, got {shown(value)}"
        return
    for key, item in value.items():
        if not isinstance(key, str):
            yield (*path, key), f"a key has to be text, quote it: '{key}'"
        elif shape.keys is not None and not re.fullmatch(shape.keys, key):
            yield (*path, key), unknown(key, shape.known)
        else:
            yield from mismatches(shape.of, item, (*path, key))


def _field_faults(shape: Fields, value: Any, path: Path) -> Iterator[Mistake]:
    if not isinstance(value, dict):
        yield path, f"expected a mapping, got {shown(value)}"
        return
    meant = ""
    for key in value:
        if key not in shape.fields:
            message = shape.gone.get(key) or unknown(key, shape.fields)
            meant += message
            yield (*path, key), message
    for key in shape.required:
        if key not in value and f"'{key}'" not in meant:  # a misspelt key is not missing too
            yield path, f"'{key}' is required, but missing"
    given = [key for key in shape.one_of if key in value]
    if len(given) > 1:
        yield (*path, given[1]), f"'{given[0]}' and '{given[1]}' exclude each other; keep one"
    for key, item in value.items():
        if key in shape.fields:
            yield from mismatches(shape.fields[key], item, (*path, key))


def _scalar_fault(shape: Scalar, value: Any) -> str | None:
    fits, wanted = _KINDS[shape.kind]
    if not fits(value):
        quote = "; put it in quotes" if shape.kind == "text" and isinstance(value, int | float) else ""
        return f"expected {wanted}, got {shown(value)}{quote}"
    if shape.choices and value not in shape.choices:
        suggestion = did_you_mean(str(value), shape.choices)
        return f"'{value}' is not a choice here{suggestion}"
    if shape.least is not None and isinstance(value, int | float) and value < shape.least:
        return f"must be at least {shape.least:g}, got {value}"
    if shape.above is not None and isinstance(value, int | float) and value <= shape.above:
        return f"must be more than {shape.above:g}, got {value}"
    if shape.most is not None and isinstance(value, int | float) and value > shape.most:
        return f"must be at most {shape.most:g}, got {value}"
    if shape.pattern is not None and not re.fullmatch(shape.pattern, str(value)):
        return f"'{value}' is not {shape.hint}"
    return None


def shown(value: Any) -> str:
    """A value in a message: its kind, and the value itself where it is short. Long text may be a secret."""
    if isinstance(value, bool):
        return f"the flag {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value}'" if len(value) <= 40 else "a text"
    kinds: dict[type, str] = {dict: "a mapping", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_quantity(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, str) and QUANTITY.match(value) is not None)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (lambda value: isinstance(value, str), "a text"),
    "flag": (lambda value: isinstance(value, bool), "true or false"),
    "whole": (_is_whole, "a whole number"),
    "number": (_is_number, "a number"),
    "quantity": (_is_quantity, "an amount such as 500m, 2 or 8Gi"),
    "whole or text": (lambda value: _is_whole(value) or isinstance(value, str), "a whole number or a name"),
}


def amount(value: Any) -> float:
    """A Kubernetes quantity as a plain number (bytes, CPUs); the value has passed as one."""
    if _is_number(value):
        return float(value)
    found = re.match(r"^([+-]?[\d.]+)(\D.*)?$", str(value))
    if found is None:
        return math.nan
    number, suffix = float(found[1]), found[2] or ""
    if suffix[:1] in ("e", "E") and len(suffix) > 1 and suffix != "Ei":
        return float(str(value))
    return number * _SUFFIXES.get(suffix, math.nan)


_SUFFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3}
_SUFFIXES |= {letter: 1000.0**power for power, letter in enumerate("MGTPE", 2)}
_SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", 1)}
