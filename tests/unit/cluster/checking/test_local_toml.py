"""Mistakes planted one by one in our own cluster/local.toml: each is found, in its line, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigray.cluster.checking.kinds import Kind, check_file, kind_of
from bigray.cluster.checking.local_toml import check_local_toml, lines_of
from bigray.cluster.dry_run.spec import load_local_spec

FILE = Path(__file__).parents[4] / "cluster/local.toml"
OURS = FILE.read_text()

NODES = "nodes = 3 "
CPUS = "cpus_per_node = 2 "
STORE = "object_store_mib = 128 "
LABELS = 'labels = { "bigray.io/zone" = "a" }'
SPOT = 'name   = "spot" '
COUNT = "count  = 1"

MISTAKES: dict[str, tuple[str, str, str | None, str]] = {
    # name: (old text, new text, a text in the line of the fault, a part of the message)
    "key misspelt": (NODES, "node = 3 ", "node = 3", "nodes"),
    "key in words of Ray": (CPUS, "num_cpus = 2 ", "num_cpus", "known"),
    "key of a group misspelt": (COUNT, "counts = 1", "counts = 1", "count"),
    "key of the cluster in a group": (COUNT, "count = 1\nobject_store_mib = 100", "object_store_mib = 100", "unknown"),
    "table misspelt": ("[[groups]]", "[[group]]", "[[group]]", "groups"),
    "table instead of several": ("[[groups]]", "[groups]", "[groups]", "groups"),
    "key twice": (STORE, f"{STORE}\nobject_store_mib = 256 ", "object_store_mib = 256", "overwrite"),
    "no nodes": (NODES, "nodes = 0 ", "nodes = 0", "greater"),
    "fewer than no nodes": (NODES, "nodes = -1 ", "nodes = -1", "greater"),
    "half a node": (NODES, "nodes = 2.5 ", "nodes = 2.5", "integer"),
    "nodes as text": (NODES, 'nodes = "3" ', 'nodes = "3"', "integer"),
    "nodes as a truth": (NODES, "nodes = true ", "nodes = true", "integer"),
    "more nodes than one machine takes": (NODES, "nodes = 1000 ", "nodes = 1000", "32"),
    "too many with the groups": (NODES, "nodes = 32 ", None, "33"),
    "no CPUs": (CPUS, "cpus_per_node = 0 ", "cpus_per_node = 0", "greater"),
    "CPUs without end": (CPUS, "cpus_per_node = 100000 ", "cpus_per_node", "1024"),
    "CPUs that are none": (CPUS, "cpus_per_node = nan ", "cpus_per_node", "nan"),
    "fewer than no GPUs": ("gpus_per_node = 0", "gpus_per_node = -2", "gpus_per_node", "greater"),
    "half a GPU": ("gpus_per_node = 0", "gpus_per_node = 0.5", "gpus_per_node", "integer"),
    "more GPUs than a node has": ("gpus_per_node = 0", "gpus_per_node = 640", "gpus_per_node", "64"),
    "CPUs of the head as text": ("head_cpus = 2 ", 'head_cpus = "all" ', "head_cpus", "integer"),
    "store too small for Ray": (STORE, "object_store_mib = 64 ", "object_store_mib", "76"),
    "store in bytes": (STORE, "object_store_mib = 134217728 ", "object_store_mib", "1048576"),
    "store with a unit": (STORE, 'object_store_mib = "128M" ', "object_store_mib", "integer"),
    "memory that the store takes": (STORE, f"memory_mib = 100\n{STORE}", "memory_mib", "128"),
    "no memory": (STORE, f"memory_mib = 0\n{STORE}", "memory_mib", "greater"),
    "name of a path": ('name  = "local"', 'name  = "../local"', "name  =", "letters"),
    "name with a space": ('name  = "local"', 'name  = "my cluster"', "name  =", "letters"),
    "empty name": ('name  = "local"', 'name  = ""', "name  =", "letters"),
    "label that is a number": (LABELS, "labels = { zone = 1 }", "labels = { zone", "string"),
    "label with a space": (LABELS, 'labels = { zone = "a b" }', "labels = { zone", "zone"),
    "label's key with a space": (LABELS, 'labels = { "my zone" = "a" }', "labels = { ", "my zone"),
    "label of bigray's own": (LABELS, 'labels = { "bigray.io/fake-gpu" = "true" }', "labels = { ", "fake-gpu"),
    "labels as text": (LABELS, 'labels = "zone=a"', "labels = ", "dict"),
    "group without a name": (SPOT, "# ", "[[groups]]", "missing"),
    "group of the head's name": (SPOT, 'name = "head" ', "[[groups]]", "plain nodes"),
    "group of none": (COUNT, "count  = 0", "count  = 0", "greater"),
    "group of too many": (COUNT, "count  = 33", "count  = 33", "32"),
    "group's CPUs as text": ("cpus   = 1", 'cpus   = "1"', "cpus   =", "integer"),
    "two groups of one name": (COUNT, f'{COUNT}\n[[groups]]\nname = "spot"', "[[groups]]", "twice"),
    "token in the file": (NODES, 'token = "abcdefghijkl"\nnodes = 3 ', "token =", "token"),
    "nothing to run on": (f"{NODES}", "nodes = 1 ", "head_cpus = 0", "nothing could run"),
    "quote that is not closed": ('name  = "local"', 'name  = "local', "name  =", "TOML"),
    "value missing": (NODES, "nodes = ", "nodes =", "TOML"),
    "yaml": (NODES, "nodes: 3 ", "nodes: 3", "TOML"),
}


def _planted(name: str) -> str:
    old, new, _, _ = MISTAKES[name]
    assert OURS.count(old) == 1, f"{old!r} is in the file {OURS.count(old)} times"
    text = OURS.replace(old, new)
    if name == "nothing to run on":
        text = text.replace("head_cpus = 2 ", "head_cpus = 0 ").replace("cpus   = 1", "cpus   = 0")
    return text


def test_our_own_file_has_no_fault_and_is_what_the_command_reads() -> None:
    assert kind_of(OURS, FILE.name) is Kind.LOCAL
    assert [str(fault) for fault in check_file(FILE)] == []
    assert load_local_spec(FILE).num_nodes == 4


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_the_one_fault_that_is_found(name: str) -> None:
    text, (_, _, where, part) = _planted(name), MISTAKES[name]

    faults = list(check_local_toml(text))

    assert len(faults) == 1, [str(fault) for fault in faults]
    assert part in str(faults[0])
    assert "\n" not in str(faults[0])
    assert faults[0].line == (None if where is None else text[: text.index(where)].count("\n") + 1)


def test_several_mistakes_are_told_together_each_in_its_line() -> None:
    text = OURS.replace(NODES, "nodes = 0 ").replace(CPUS, "cpu = 2 ").replace(COUNT, "count = 0")

    assert [fault.place for fault in check_local_toml(text)] == ["nodes", "groups.0.count", "cpu"]
    assert len({fault.line for fault in check_local_toml(text)}) == 3


def test_the_lines_of_keys_are_found_in_tables_arrays_and_dotted_keys() -> None:
    text = 'a = 1\nb.c = 2\n[d]\n"e.f" = 3\n[[g]]\nh = 4\n[g.i]\nj = 5\n[[g]]\nh = 6\n'

    found = lines_of(text)

    assert (found["a"], found["b.c"], found["d"], found["g"]) == (1, 2, 3, 5)
    assert (found["g.0.h"], found["g.0.i.j"], found["g.1"], found["g.1.h"]) == (6, 8, 9, 10)


def test_an_empty_file_is_a_cluster_of_defaults() -> None:
    assert list(check_local_toml("")) == []
