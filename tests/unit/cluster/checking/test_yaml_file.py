from __future__ import annotations

import pytest

from bigray.cluster.checking.faults import Fault, dotted
from bigray.cluster.checking.yaml_file import YamlFaults, read_yaml


def told(text: str) -> list[str]:
    with pytest.raises(YamlFaults) as raised:
        read_yaml(text, "f.yaml")
    return [str(fault) for fault in raised.value.faults]


def test_values_are_plain_and_every_key_and_item_has_its_line() -> None:
    (document,) = read_yaml("a: 1\nb:\n  - x\n  - {c: 2.5}\nd: {e: true, f: null}\n")
    assert document.value == {"a": 1, "b": ["x", {"c": 2.5}], "d": {"e": True, "f": None}}
    assert document.line_of(("b", 1, "c")) == 4
    assert document.line_of(("d", "f")) == 5


def test_a_path_that_is_not_there_has_the_line_of_what_is_around_it() -> None:
    (document,) = read_yaml("# first\na: 1\nb:\n  c: 2\n")
    assert document.line_of(("b", "x", "y")) == 3
    assert document.line_of(("z",)) == 2


@pytest.mark.parametrize("mark", ["|", ">", "|-"])
def test_the_text_of_a_block_starts_one_line_below_its_key(mark: str) -> None:
    (document,) = read_yaml(f"a: 1\nb: {mark}\n  first\n  second\nc: plain\n")
    assert document.text_line_of(("b",)) == 3
    assert document.text_line_of(("c",)) == 5


def test_empty_documents_are_left_out_and_lines_go_on_through_the_file() -> None:
    first, second = read_yaml("---\na: 1\n---\n# nothing\n---\nb: 2\n")
    assert (first.value, second.value) == ({"a": 1}, {"b": 2})
    assert second.line_of(("b",)) == 6


def test_aliases_and_merges_are_written_out_and_own_keys_win() -> None:
    (document,) = read_yaml("base: &b\n  x: 1\n  y: [1]\none:\n  x: 2\n  <<: *b\ntwo: *b\n")
    assert document.value["one"] == {"x": 2, "y": [1]}
    assert document.value["two"] == {"x": 1, "y": [1]}
    assert document.line_of(("one", "x")) == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: is there twice, first on line 1; only the last would count"),
        ("a:\n\tb: 1\n", "f.yaml:2: is not YAML: a tab where YAML wants spaces; indent with spaces"),
        ("a: no\n", "f.yaml:1: a: no is read as false; write that, or quote it"),
        ("a: On\n", "f.yaml:1: a: On is read as true; write that, or quote it"),
        ("lr: 1e-4\n", "f.yaml:1: lr: 1e-4 is read as text, not as a number; write 1.0e-4"),
        ("lr: 2.5e6\n", "f.yaml:1: lr: 2.5e6 is read as text, not as a number; write 2.5e+6"),
        ("port: 22:22\n", "f.yaml:1: port: 22:22 is read as a number to the base 60; put it in quotes"),
        ("day: 2026-01-31\n", "f.yaml:1: day: 2026-01-31 is read as a date; put it in quotes"),
        ("a: !!python/object/apply:os.system [ls]\n", "tags are not taken, found '!!python/object/apply:os.system'"),
        ("a: !secret x\n", "f.yaml:1: a: tags are not taken, found '!secret'"),
        ("a: !!int x\n", "f.yaml:1: a: 'x' is not of the type of its tag"),
        ("a: &a [1, *a]\n", "f.yaml:1: an alias that holds itself"),
        ("? [1]\n: 2\n", "f.yaml:1: a key may not be a list"),
        ("a: [1,\n", "is not YAML: "),
        ("a: \x00\n", "is not YAML: "),
        ("", "f.yaml:1: holds no YAML document"),
        ("# only this\n", "f.yaml:1: holds no YAML document"),
        ("- " * 3000, "f.yaml:1: is nested too deeply"),
    ],
)
def test_what_pyyaml_takes_in_silence_is_told_in_one_line(text: str, line: str) -> None:
    (fault,) = told(text)
    assert line in fault


def test_nine_levels_of_aliases_are_refused_before_they_are_written_out() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (fault,) = told("\n".join(levels))
    assert "with its aliases written out" in fault


@pytest.mark.parametrize(
    "text", ["a: 'no'", 'a: "1e-4"', "a: 1.0e-4", "a: 010-x", "a: ::1", "mode: 0644", "a: 1e", "e: e1"]
)
def test_what_can_be_read_in_one_way_only_is_taken(text: str) -> None:
    assert len(read_yaml(text)) == 1


def test_all_faults_of_a_file_are_told_together() -> None:
    assert len(told("a: 1\na: 2\nb: yes\n---\nc: !x 1\n")) == 3


def test_a_fault_is_one_line_whatever_is_known_of_its_place() -> None:
    assert str(Fault("a.b", "is wrong", 3, "f.yaml")) == "f.yaml:3: a.b: is wrong"
    assert str(Fault("a", "is wrong", 3)) == "line 3: a: is wrong"
    assert str(Fault("", "two\nlines", file="f")) == "f: two lines"
    assert dotted(("a", 0, "b", 1)) == "a[0].b[1]"
