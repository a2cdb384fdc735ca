"""YAML read strictly: with the line of every key, and refusing what PyYAML takes in silence.

PyYAML keeps the last of two equal keys, runs tags, reads `no` as false, `12:30` as 750 and `1e-4` as text, and follows
aliases without end. Here each of these is a fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from bigray.cluster.checking.faults import Fault, Path, dotted

MOST_VALUES = 20_000
"""Of one document, each alias counted as often as it is used."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = frozenset(f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str"))
_CONTAINERS = frozenset(f"{_TAG}{name}" for name in ("map", "seq"))
_MERGE = f"{_TAG}merge"


@dataclass(frozen=True)
class Document:
    """One document of a YAML file."""

    value: Any
    """Plain dicts, lists and scalars."""
    lines: dict[Path, int] = field(repr=False)
    """Line of every key and list item, by its path."""
    text_lines: dict[Path, int] = field(repr=False)
    """For values written as a block (`|` or `>`): the line on which their text starts."""

    def line_of(self, path: Path) -> int:
        """The line of a key or list item; for one that is not there, that of the nearest value around it."""
        while path not in self.lines:
            path = path[:-1]
        return self.lines[path]

    def text_line_of(self, path: Path) -> int:
        """The line on which a string's own first line stands: one below its key for a block, else the key's own."""
        return self.text_lines.get(path, self.line_of(path))

    def fault(self, path: Path, message: str) -> Fault:
        """A fault at a path, with its line."""
        return Fault(dotted(path), message, self.line_of(path))


class YamlFaults(Exception):
    """The text is not YAML that is read the same everywhere; `faults` holds every reason found."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        super().__init__(faults)


def read_yaml(text: str, file: str | None = None) -> list[Document]:
    """The documents of a YAML text, without its empty ones.

    Raises:
        YamlFaults: it is no YAML, or holds duplicate keys, tags, too many aliases, or scalars of a doubtful type.
    """
    try:
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if not _is_null(node)]
        reader = _Reader(file)
        documents = [reader.document(node) for node in nodes]
    except yaml.MarkedYAMLError as error:
        raise YamlFaults([_syntax_fault(error, file)]) from None
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise YamlFaults([Fault("", f"is not YAML: {str(error).splitlines()[0]}", file=file)]) from None
    except RecursionError:
        raise YamlFaults([Fault("", "is nested too deeply", 1, file)]) from None
    if not documents and not reader.faults:
        reader.faults.append(Fault("", "holds no YAML document", 1, file))
    if reader.faults:
        raise YamlFaults(reader.faults)
    return documents


def _is_null(node: yaml.Node | None) -> bool:
    return node is None or (isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null")


def _syntax_fault(error: yaml.MarkedYAMLError, file: str | None) -> Fault:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    problem = error.problem or error.context or "cannot be read"
    if "'\\t'" in problem:
        problem = "a tab where YAML wants spaces; indent with spaces"
    return Fault("", f"is not YAML: {problem}", line, file)


class _Reader:
    """Builds values out of PyYAML's nodes, and gathers the faults met on the way."""

    def __init__(self, file: str | None) -> None:
        self.file = file
        self.faults: list[Fault] = []
        self.scalars = yaml.constructor.SafeConstructor()

    def document(self, root: yaml.Node) -> Document:
        self.lines: dict[Path, int] = {(): _line(root)}
        self.text_lines: dict[Path, int] = {}
        try:
            size = _size(root, {}, set())
        except _Endless:
            self._fault((), root, "an alias that holds itself")
            return Document(None, self.lines, {})
        if size > MOST_VALUES:
            self._fault((), root, f"holds {size:,} values with its aliases written out, the most is {MOST_VALUES:,}")
            return Document(None, self.lines, {})
        return Document(self._value(root, ()), self.lines, self.text_lines)

    def _value(self, node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag in _CONTAINERS:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag in _CONTAINERS:
            return self._list(node, path)
        return self._scalar(node, path)

    def _list(self, node: yaml.SequenceNode, path: Path) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.lines[(*path, index)] = _line(item)
            values.append(self._value(item, (*path, index)))
        return values

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[Any, Any]:
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        for _, source in (pair for pair in node.value if pair[0].tag == _MERGE):
            for mapping in source.value if isinstance(source, yaml.SequenceNode) else [source]:
                merged = {**self._merged(mapping, path), **merged}
        for key_node, value_node in (pair for pair in node.value if pair[0].tag != _MERGE):
            key = self._scalar(key_node, path)
            if key in own:
                first = self.lines[(*path, key)]
                self._fault((*path, key), key_node, f"is there twice, first on line {first}; only the last would count")
            self.lines[(*path, key)] = _line(key_node)
            own[key] = self._value(value_node, (*path, key))
        return {**merged, **own}

    def _merged(self, source: yaml.Node, path: Path) -> dict[Any, Any]:
        if isinstance(source, yaml.MappingNode):
            return self._mapping(source, path)
        self._fault(path, source, "`<<` takes a mapping")
        return {}

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        doubt = _doubt(node)
        if doubt:
            self._fault(path, node, doubt)
            return None
        if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
            self.text_lines[path] = _line(node) + 1
        try:
            return self.scalars.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self._fault(path, node, f"{node.value!r} is not of the type of its tag")
            return None

    def _fault(self, path: Path, node: yaml.Node, message: str) -> None:
        fault = Fault(dotted(path), message, _line(node), self.file)
        if fault not in self.faults:  # what is aliased is met more than once
            self.faults.append(fault)


def _doubt(node: yaml.Node) -> str | None:
    """What makes a scalar's type a surprise; None where it is plain."""
    if isinstance(node, yaml.CollectionNode) and node.tag not in _CONTAINERS:
        return f"tags are not taken, found {_shown(node.tag)!r}"
    if not isinstance(node, yaml.ScalarNode):
        return f"a key may not be a {'mapping' if isinstance(node, yaml.MappingNode) else 'list'}"
    tag, text = node.tag.removeprefix(_TAG), node.value
    if tag == "timestamp":
        return f"{text} is read as a date; put it in quotes"
    if node.tag not in _SCALARS:
        return f"tags are not taken, found {_shown(node.tag)!r}"
    if node.style is not None:
        return None
    if tag == "bool" and text.lower() not in ("true", "false"):
        return f"{text} is read as {'true' if text.lower() in ('yes', 'on') else 'false'}; write that, or quote it"
    if tag in ("int", "float") and ":" in text:
        return f"{text} is read as a number to the base 60; put it in quotes"
    if tag == "str" and (number := re.fullmatch(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)", text)):
        whole, fraction, sign, exponent = number.groups()
        return f"{text} is read as text, not as a number; write {whole}{fraction or '.0'}e{sign or '+'}{exponent}"
    return None


def _shown(tag: str) -> str:
    return f"!!{tag.removeprefix(_TAG)}" if tag.startswith(_TAG) else tag


class _Endless(Exception):
    pass


def _size(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node has with aliases written out; each shared node is walked once."""
    if id(node) in above:
        raise _Endless
    if id(node) not in known:
        above.add(id(node))
        known[id(node)] = 1 + sum(_size(child, known, above) for child in _children(node))
        above.remove(id(node))
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from child if isinstance(child, tuple) else (child,)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
