from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
from rich.console import Console, RenderableType

from bigray.serve.release.lineage import Lineage
from bigray.serve.release.record import (
    ChannelState,
    Release,
    ReplicaReport,
    Rollout,
    abort,
    initial,
    promote,
    propose,
    roll_back,
)
from bigray.serve.release.tables import (
    gate_table,
    history_document,
    lineage_table,
    roles_of,
    spans,
    versions_table,
)

A, B, C = (Release(version=letter * 12, bundle=f"/bundles/{letter}") for letter in "abc")


def at(minute: int) -> str:
    return f"2026-05-01T10:{minute:02d}:00+00:00"


def canary(release: Release) -> Rollout:
    return Rollout(kind="canary", release=release, share=0.1)


@pytest.fixture
def state() -> ChannelState:
    """A, then B, rolled back to A; C was tried and sent away; B is promoted again; C is a canary."""
    found = promote(propose(initial(A, at(0)), Rollout(kind="load", release=B)), at(1), "gate passed")
    found = roll_back(found, at(2), "wrong labels")
    found = abort(propose(found, canary(C)), at(3), "p95 [40 ms]")
    found = promote(propose(found, canary(B)), at(4), "fixed")
    return propose(found, canary(C))


def reports(*loaded: tuple[str, ...]) -> list[ReplicaReport]:
    return [
        ReplicaReport(replica=f"r{n}", node="n", pid=n, sequence=1, at=0, revision=1, live=versions[0], loaded=versions)
        for n, versions in enumerate(loaded)
    ]


def shown(renderable: RenderableType, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_who_served_when_is_told_newest_first_with_what_each_version_is_now(state: ChannelState) -> None:
    lines = shown(versions_table(state, reports((B.version, A.version, C.version), (B.version, A.version))))

    assert lines[0] == "revision 9; 2 of 2 replicas answer with bbbbbbbbbbbb"
    rows = [line.split() for line in lines[4:] if line]
    assert rows[0] == ["now", C.version, "canary", "10%", "1", "of", "2"]
    assert rows[1] == ["2026-05-01", "10:04:00", B.version, "live", "2", "of", "2", "promoted", "fixed"]
    assert rows[2] == ["2026-05-01", "10:03:00", C.version, "rolled", "back", "p95", "[40", "ms]"]
    assert rows[-1] == [
        *("2026-05-01", "10:00:00", A.version, "previous", "2", "of", "2", "deployed", "first", "version")
    ]


def test_that_no_replica_has_reported_is_told(state: ChannelState) -> None:
    assert shown(versions_table(state, []))[0] == "revision 9; no replica has reported"


def test_a_version_that_is_live_and_the_candidate_before_is_told_once() -> None:
    state = promote(propose(initial(A, at(0)), canary(B)), at(1), "")

    assert roles_of(propose(state, canary(A))) == {A.version: "canary 10%", B.version: "live"}


def test_the_spans_tell_which_version_was_live_from_when_until_when(state: ChannelState) -> None:
    assert spans(state) == (
        (A.version, at(0), at(1)),
        (B.version, at(1), at(2)),
        (A.version, at(2), at(4)),
        (B.version, at(4), None),
    )


def test_a_history_that_lost_its_beginning_tells_what_it_knows(state: ChannelState) -> None:
    cut = state.model_copy(update={"history": state.history[2:]})

    assert spans(cut) == ((B.version, at(4), None),)
    assert spans(state.model_copy(update={"history": ()})) == ()


def test_the_history_for_scripts_is_json_with_the_spans(state: ChannelState) -> None:
    document = json.loads(json.dumps(history_document(state)))

    assert document["live"] == {"version": B.version, "bundle": B.bundle}
    assert [entry["action"] for entry in document["history"]] == [
        *("deployed", "deployed", "rolled back", "rolled back", "promoted")
    ]
    assert document["served"][-1] == {"version": B.version, "from": at(4), "until": None}


def test_a_lineage_is_shown_one_thing_a_line_without_what_is_not_known() -> None:
    lineage = Lineage(
        version=A.version,
        bundle="/runs/digits-1/bundle",
        name="digits",
        run="digits-1",
        trial="cnn-7",
        model="cnn",
        step=1200,
        epoch=4,
        metrics={"accuracy": 0.98},
        config={"lr": 0.01, "names": ["x"]},
        more={"base_run": "digits-0"},
    )

    lines = shown(lineage_table(lineage))

    assert lines[0] == f"version {A.version}"
    found = {line[:10].strip(): line[10:].strip() for line in lines[1:]}
    assert found["trial"] == "cnn-7, step 1,200 (epoch 4)"
    assert found["settings"] == 'lr 0.01, names ["x"]'
    assert found["base run"] == "digits-0"
    assert found["git"] == "not in a repository"
    assert "predicts" not in found


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str
    seconds: float


def test_the_gate_is_shown_with_what_each_check_found() -> None:
    lines = shown(gate_table([Check("hashes", True, "2 files", 0.01), Check("holdout", False, "[accuracy] 0.1", 1.5)]))

    assert next(line.split() for line in lines if "hashes" in line) == ["hashes", "passed", "0.01", "2", "files"]
    assert next(line.split() for line in lines if "holdout" in line) == [
        *("holdout", "forced", "1.50", "[accuracy]", "0.1")
    ]
