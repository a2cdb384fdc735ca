"""What a run's journal says of it, before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bigray.paths import RunPaths
from bigray.specs import JobSpec, SearchSpec, TrialSpec
from bigray.storage import MANIFEST, open_storage
from bigray.training.request import RunRequest
from bigray.training.session import is_complete, known_trials, num_trials, stack_of
from bigray.tuning.leg import LegResult, Outcome
from bigray.workflow import Asked, request_of
from tests.integration.jobs import make_job

MakeTrial = Callable[..., TrialSpec]
SPACE = {"lr": {"log_uniform": [1e-3, 1e-1]}}


@pytest.fixture
def job(tmp_path: Path) -> JobSpec:
    return make_job(tmp_path)


def _request(job: JobSpec, **search: Any) -> RunRequest:
    return request_of(Asked(job, SearchSpec.model_validate({"space": SPACE, "trials": 5, **search}), None))


def _leg(kind: str, number: int, *outcomes: Outcome) -> dict[str, Any]:
    return {"kind": kind, **LegResult(number, outcomes).to_json()}


def _outcome(trial_id: str, stack: str | None) -> Outcome:
    return Outcome(trial_id, 2, 0.9, stack=stack)


def test_a_trial_is_in_the_stack_that_had_it_last() -> None:
    events = [
        _leg("leg", 0, _outcome("a", "leg-000000"), _outcome("b", "leg-000000")),
        _leg("leg", 1, _outcome("a", "leg-000001")),
        _leg("leg", 2, _outcome("b", None)),
    ]

    assert (stack_of("a", events), stack_of("b", events), stack_of("c", events)) == ("leg-000001", None, None)


def test_one_that_rests_inside_a_leg_is_in_the_stack_of_that_leg() -> None:
    events = [_leg("leg", 0, _outcome("a", "leg-000000")), _leg("rested", 1, _outcome("a", "leg-000001"))]

    assert stack_of("a", events) == "leg-000001"


def test_with_the_end_of_a_run_its_stacks_are_gone() -> None:
    events = [_leg("leg", 0, _outcome("a", "leg-000000")), {"kind": "completed", "whole": True}]
    assert stack_of("a", events) is None

    used_up = [events[0], {"kind": "completed", "whole": False}]
    assert stack_of("a", used_up) == "leg-000000"


def test_the_trials_of_a_run_are_those_drawn_and_those_proposed(job: JobSpec, make_trial: MakeTrial) -> None:
    clone = make_trial()
    events = [{"kind": "proposed", "trials": [clone.model_dump(mode="json")]}]

    drawn = _request(job).trials
    assert known_trials(_request(job), events) == (*drawn, clone)
    assert known_trials(_request(job, search="tpe"), events) == (clone,)


def test_a_run_that_was_extended_has_more_trials_than_its_command_asks_for(job: JobSpec) -> None:
    request = _request(job)
    assert num_trials(request, []) == 5
    assert num_trials(request, [{"kind": "extended", "trials": 9}]) == 9
    assert num_trials(replace(_request(job, search="tpe"), extended_to=7), []) == 7


def test_a_run_is_complete_when_as_many_trials_as_are_wanted_were_and_the_winner_is_there(tmp_path: Path) -> None:
    paths = RunPaths(open_storage(tmp_path), "run")
    done = {"kind": "completed", "whole": True, "trials": 5}
    assert not is_complete(5, paths, [done]), "there is no bundle"

    paths.bundle.write_bytes(MANIFEST, b"{}")
    assert is_complete(5, paths, [done])
    assert not is_complete(9, paths, [done]), "an extension has begun"
    assert is_complete(9, paths, [done, {**done, "trials": 9}])
    assert not is_complete(5, paths, [{**done, "whole": False}]), "the budget was used up"

    paths.bundle.write_bytes(MANIFEST, b'{"schema_version": 1}')
    assert not is_complete(5, paths, [done]), "an earlier bigray exported it"
