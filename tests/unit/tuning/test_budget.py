from __future__ import annotations

from typing import Any

import pytest

from bigray.errors import SpecError
from bigray.specs import ScalingSpec
from bigray.tuning.budget import budget_faults, parse_budget, used_before


@pytest.mark.parametrize(
    ("text", "wall_s", "gpu_s"),
    [
        ("90s", 90.0, None),
        ("10m", 600.0, None),
        ("1.5h", 5400.0, None),
        (".5h", 1800.0, None),
        ("30gpum", None, 1800.0),
        ("3gpuh", None, 10800.0),
        (" 3 GPUh ", None, 10800.0),
    ],
)
def test_a_budget_is_wall_time_or_gpu_time(text: str, wall_s: float | None, gpu_s: float | None) -> None:
    budget = parse_budget(text)

    assert (budget.wall_s, budget.gpu_s, budget.text) == (wall_s, gpu_s, text)


@pytest.mark.parametrize(
    "text", ["0m", "0.0gpuh", "-5m", "", "m", "ten minutes", "10", "10 years", "1e3s", "infh", "nanm"]
)
def test_what_is_no_budget_is_one_line(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_budget(text)

    (fault,) = caught.value.faults
    assert fault.startswith(f"budget: '{text}'") and "\n" not in fault


@pytest.mark.parametrize("text", ["10", "10d", "3gpu", "soon"])
def test_the_units_are_named_where_one_is_missing_or_unknown(text: str) -> None:
    with pytest.raises(SpecError, match=r"units are s, m, h, gpum .* or gpuh"):
        parse_budget(text)


def test_a_budget_of_nothing_says_so() -> None:
    with pytest.raises(SpecError, match="must be more than 0"):
        parse_budget("0m")


def test_wall_time_is_used_whatever_the_gpus_did() -> None:
    budget = parse_budget("10m")

    assert not budget.is_used(599.0, 1e9)
    assert budget.is_used(600.0, 0.0)


def test_gpu_time_is_used_whatever_the_clock_says() -> None:
    budget = parse_budget("1gpuh")

    assert not budget.is_used(1e9, 3599.0)
    assert budget.is_used(0.0, 3600.0)


def test_gpu_time_of_a_job_without_gpus_is_refused() -> None:
    (fault,) = budget_faults(parse_budget("3gpuh"), ScalingSpec())

    assert fault.startswith("budget: '3gpuh' is GPU time, but scaling.gpus_per_worker is 0")
    assert budget_faults(parse_budget("3gpuh"), ScalingSpec(gpus_per_worker=0.5)) == []
    assert budget_faults(parse_budget("10m"), ScalingSpec()) == []


def _events(attempt: int, *timed: tuple[float, str], gpus: float = 2.0) -> list[dict[str, Any]]:
    first = {"attempt": attempt, "time": 0.0, "kind": "attempt", "plan": {"gpus": gpus}}
    return [first, *({"attempt": attempt, "time": time, "kind": kind} for time, kind in timed)]


def test_what_earlier_attempts_used_counts_from_their_first_trial_to_the_last_that_was_heard_of_them() -> None:
    killed = _events(1, (100.0, "started"), (130.0, "epoch"), (160.0, "epoch"))
    ended = _events(2, (1000.0, "started"), (1010.0, "state"), (1012.0, "completed"))
    never_began = _events(3, (2000.0, "resumed"))

    used = used_before([*killed, *ended, *never_began])
    assert used.wall_s == 72.0
    assert used.gpu_s == 144.0
