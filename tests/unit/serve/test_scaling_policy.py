from __future__ import annotations

import json
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from bigray.errors import SpecError
from bigray.serve.scaling.policy import (
    OFFERED,
    QUEUE_AGE,
    QUEUED,
    SHED,
    STATE_KEY,
    UTILISATION,
    WHY_KEY,
    ArrivalPolicy,
    ReplicaLoad,
    ScalingMemory,
    decide,
)
from bigray.serve.scaling.settings import ScalingSettings, read_settings


class Endpoint:
    """Feeds `decide` every 0.1 s; replicas start at once unless `starting` is set."""

    def __init__(self, running: int = 1, **chosen) -> None:
        self.settings = ScalingSettings(**{"max_replicas": 10, **chosen})
        self.running = self.target = running
        self.starting = False
        self.tick_s = 0.1
        self.memory = ScalingMemory()
        self.now = 1000.0
        self.changes: list[tuple[float, int, int]] = []
        self.why = ""

    def tick(self, loads) -> int:
        decision, self.memory = decide(
            loads, running=self.running, target=self.target, settings=self.settings, memory=self.memory, now=self.now
        )
        if decision.replicas != self.target:
            self.changes.append((self.now, self.target, decision.replicas))
        self.target, self.why = decision.replicas, decision.why
        if not self.starting:
            self.running = self.target
        self.now += self.tick_s
        return self.target

    def run(self, seconds: float, loads_of) -> int:
        for _ in range(math.ceil(seconds / self.tick_s - 1e-9)):
            self.tick(loads_of(self.running))
        return self.target


def steady(work: float, offered_per_s: float = 100.0):
    """A load that keeps `work` replicas busy, shared evenly."""
    return lambda running: [ReplicaLoad(min(1.0, work / running), offered_per_s / running)] * running if running else []


def saturated(running: int):
    """Closed loop: as many callers as keep every replica busy."""
    return [ReplicaLoad(1.0, 100.0, num_queued=3, queue_age_s=0.03)] * running


def test_the_count_is_the_work_over_the_target_utilisation():
    for work, expected in ((0.1, 1), (0.69, 1), (0.71, 2), (1.5, 3), (2.8, 4), (4.3, 7)):
        endpoint = Endpoint(running=max(1, math.ceil(work)))
        assert endpoint.run(5, steady(work)) == expected, work


def test_every_decision_says_its_numbers_in_one_line():
    endpoint = Endpoint()
    endpoint.tick([ReplicaLoad(0.97, 200, 40, 0.4, 25)])
    assert endpoint.why.startswith("1 -> 2: work of 1.21 replicas at 70% each asks for 2")
    assert "200/s offered, 40/s shed, 25 waiting, oldest 0.40 s, utilisation 97%" in endpoint.why
    endpoint.tick([ReplicaLoad(0.3, 50)] * 2)
    assert endpoint.why.startswith("2 held: ")
    assert "\n" not in endpoint.why


def test_what_is_shed_counts_as_work():
    endpoint = Endpoint(running=2)
    endpoint.tick([ReplicaLoad(1.0, 200, 100)] * 2)  # half of it is turned away: four replicas' worth
    assert endpoint.target == 4  # at most doubled at once
    endpoint.starting = True
    endpoint.running = 2
    endpoint.run(1.5, lambda running: [ReplicaLoad(1.0, 200, 100)] * running)
    assert endpoint.target == 6  # ceil(4 / 0.7)


def test_a_replica_that_sheds_everything_is_believed_within_reason():
    endpoint = Endpoint(running=1, max_replicas=100)
    endpoint.starting = True
    endpoint.run(30, lambda running: [ReplicaLoad(1.0, 500, 500)])
    assert endpoint.target == math.ceil(10 / 0.7)


def test_requests_that_wait_ask_for_one_more_though_the_replica_looks_idle():
    endpoint = Endpoint()
    assert endpoint.tick([ReplicaLoad(0.2, 3, queue_age_s=0.24, num_queued=1)]) == 1
    assert endpoint.tick([ReplicaLoad(0.2, 3, queue_age_s=0.26, num_queued=1)]) == 2


def test_saturated_replicas_grow_until_the_callers_no_longer_wait():
    callers = 5.0  # five replicas' worth at most
    endpoint = Endpoint()
    load = lambda running: saturated(running) if running < callers else steady(callers * 0.68)(running)  # noqa: E731
    endpoint.run(20, load)
    assert endpoint.target in (5, 6)
    assert all(after <= 2 * before for _, before, after in endpoint.changes)


def test_replicas_on_their_way_are_waited_for():
    endpoint = Endpoint()
    endpoint.starting = True
    endpoint.run(10, saturated)
    assert endpoint.target == 2
    assert "1 starting" in endpoint.why


def test_a_need_beyond_the_replicas_on_their_way_does_not_wait_for_them():
    endpoint = Endpoint()
    endpoint.starting = True
    endpoint.tick(saturated(1))
    assert endpoint.target == 2
    endpoint.run(3, lambda running: [ReplicaLoad(1.0, 400, 300, 0.9, 100)])
    assert endpoint.target == 6  # four times the work of one replica


def test_a_growing_queue_tells_how_much_arrives():
    endpoint = Endpoint(drain_within_s=1000)
    endpoint.starting = True
    for step in range(30):  # 300/s arrive, 100/s are answered
        endpoint.tick([ReplicaLoad(1.0, 300, 0, 0.5, 20 * step)])
    assert endpoint.target == math.ceil(3 / 0.7)


def test_a_backlog_that_drains_in_time_asks_for_nothing_more():
    endpoint = Endpoint(running=3, max_replicas=3)
    for step in range(30):  # 200/s arrive, 300/s are answered
        if step == 10:  # from here on it is known that it drains
            endpoint.settings = ScalingSettings(max_replicas=10)
        endpoint.tick([ReplicaLoad(1.0, 200 / 3, 0, 0.8, (500 - 10 * step) / 3)] * 3)
    assert endpoint.target == 3


def test_a_backlog_that_would_take_too_long_asks_for_more():
    endpoint = Endpoint(running=3)
    for step in range(20):
        endpoint.tick([ReplicaLoad(1.0, 200 / 3, 0, 20, (9000 - 10 * step) / 3)] * 3)
    assert endpoint.target > 3


def test_replicas_go_only_after_the_need_was_lower_for_long_enough():
    endpoint = Endpoint(running=4, scale_down_after_s=10)
    endpoint.run(9, steady(0.3))
    assert endpoint.target == 4
    endpoint.run(2, steady(0.3))
    assert endpoint.target == 1
    assert len(endpoint.changes) == 1
    assert endpoint.changes[0][0] == pytest.approx(1010, abs=0.3)


def test_the_highest_need_of_the_window_counts():
    endpoint = Endpoint(running=6, scale_down_after_s=10)
    endpoint.run(6, steady(0.3))
    endpoint.run(3, steady(1.9))
    endpoint.run(5, steady(0.3))
    assert endpoint.target == 3
    endpoint.run(25, steady(0.3))
    assert endpoint.target == 1


def test_a_boundary_has_two_marks():
    endpoint = Endpoint(running=1, scale_down_after_s=5)
    endpoint.run(20, steady(0.75))
    assert endpoint.target == 2
    endpoint.run(60, steady(0.65))  # would fit one replica, but barely
    assert endpoint.target == 2
    endpoint.run(60, steady(0.5))
    assert endpoint.target == 1


@settings(max_examples=10, deadline=None)
@given(
    work=st.floats(0.0, 12.0),
    running=st.integers(1, 10),
    utilisation=st.sampled_from([0.3, 0.5, 0.7, 0.8]),
    spare=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_a_noisy_but_constant_load_changes_the_count_at_most_once_after_settling(
    work, running, utilisation, spare, seed
):
    noise = random.Random(seed)
    endpoint = Endpoint(running, target_utilisation=utilisation, spare=spare, scale_down_after_s=20)
    endpoint.tick_s = 0.5
    noisy = lambda running: steady(work * noise.uniform(0.9, 1.1))(running)  # noqa: E731
    endpoint.run(60, noisy)
    settling = len(endpoint.changes)
    endpoint.run(600, noisy)
    assert len(endpoint.changes) - settling <= 1


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_no_story_leaves_the_bounds_or_more_than_doubles(data):
    low, high = data.draw(st.integers(0, 3)), data.draw(st.integers(3, 12))
    endpoint = Endpoint(max(1, low), min_replicas=low, max_replicas=high, scale_down_after_s=2, scale_to_zero_after_s=3)
    number = st.floats(0, 1e4)
    load = st.builds(ReplicaLoad, st.floats(0, 2), number, number, st.floats(0, 60), number)
    for _ in range(data.draw(st.integers(1, 6))):
        shown = data.draw(load)
        endpoint.run(data.draw(st.floats(0.1, 5)), lambda running, shown=shown: [shown] * max(1, running))
        assert low <= endpoint.target <= high
    assert all(after <= max(2 * before, 2) for _, before, after in endpoint.changes)


def test_a_count_that_was_too_small_for_a_rate_is_not_tried_again_soon():
    """One long request now and then holds up the short ones, though the utilisation is low."""
    hiccup = [ReplicaLoad(0.4, 20, queue_age_s=0.5, num_queued=8)]
    endpoint = Endpoint(scale_down_after_s=5)
    endpoint.run(1, lambda running: hiccup)
    assert endpoint.target == 2
    endpoint.run(45, steady(0.4, offered_per_s=20))
    assert endpoint.target == 2
    endpoint.run(15, steady(0.4, offered_per_s=20))
    assert endpoint.target == 1


def test_the_lesson_of_a_burst_does_not_outlast_it():
    endpoint = Endpoint(scale_down_after_s=5)
    endpoint.run(3, lambda running: [ReplicaLoad(1.0, 200 / running, 0, 0.5, 10)] * running)
    assert endpoint.target > 1
    endpoint.run(25, steady(0.2, offered_per_s=30))
    assert endpoint.target == 1


def test_spares_are_kept_beyond_the_need():
    endpoint = Endpoint(spare=2, scale_down_after_s=2)
    assert endpoint.run(10, steady(1.5)) == 5
    endpoint.run(20, steady(0.0, 0.0))
    assert endpoint.target == 3


def test_an_idle_endpoint_goes_to_zero_only_where_it_may_and_after_its_time():
    idle = steady(0.0, 0.0)
    kept = Endpoint(running=2, min_replicas=1, scale_down_after_s=2, scale_to_zero_after_s=20)
    assert kept.run(60, idle) == 1
    gone = Endpoint(running=2, min_replicas=0, scale_down_after_s=2, scale_to_zero_after_s=20)
    assert gone.run(19, idle) == 1
    assert gone.run(2, idle) == 0
    assert gone.run(60, lambda running: []) == 0


def test_a_single_request_keeps_the_last_replica():
    endpoint = Endpoint(min_replicas=0, scale_to_zero_after_s=20)
    endpoint.run(19, steady(0.0, 0.0))
    endpoint.tick([ReplicaLoad(0.01, 1)])
    assert endpoint.run(19, steady(0.0, 0.0)) == 1


def test_a_request_wakes_an_endpoint_at_zero():
    endpoint = Endpoint(running=0, min_replicas=0)
    assert endpoint.tick([]) == 0
    assert endpoint.tick([ReplicaLoad(num_queued=1)]) == 1


def test_replicas_that_have_not_reported_hold_the_count():
    endpoint = Endpoint(running=3, scale_down_after_s=2)
    assert endpoint.run(30, lambda running: []) == 3
    assert endpoint.why == "no reports from 3 running replicas, count held at 3"
    assert endpoint.run(30, lambda running: [ReplicaLoad(0.1, 5)] * 2) == 3  # two of three
    assert endpoint.run(5, lambda running: [ReplicaLoad(0.1, 5)] * 3) == 1


def test_new_bounds_count_at_once():
    endpoint = Endpoint(running=8, max_replicas=4)
    assert endpoint.tick(steady(0.5)(8)) == 4
    endpoint = Endpoint(running=1, min_replicas=2)
    assert endpoint.tick(steady(0.1)(1)) == 2


def test_a_clock_that_goes_back_starts_the_memory_anew():
    endpoint = Endpoint(running=4, scale_down_after_s=10)
    endpoint.run(8, steady(0.3))
    endpoint.now -= 3600
    endpoint.run(9, steady(0.3))
    assert endpoint.target == 4
    endpoint.run(3, steady(0.3))
    assert endpoint.target == 1


def test_the_memory_survives_json():
    endpoint = Endpoint(running=2)
    endpoint.run(3, lambda running: [ReplicaLoad(1.0, 200, 100, 0.5, 9)] * running)
    assert endpoint.memory.lesson is not None
    plain = json.loads(json.dumps(endpoint.memory.to_plain(), allow_nan=False))
    assert ScalingMemory.from_plain(plain) == endpoint.memory
    fresh = ScalingMemory()
    assert ScalingMemory.from_plain(json.loads(json.dumps(fresh.to_plain(), allow_nan=False))) == fresh


@pytest.mark.parametrize("junk", [None, 3, {}, {"at": 1.0}, [], {"keeps": 5}])
def test_a_memory_that_is_none_is_empty(junk):
    assert ScalingMemory.from_plain(junk) == ScalingMemory()


def test_the_settings_of_a_serve_file_are_checked():
    read = read_settings({"target_utilisation": 0.5}, min_replicas=0, max_replicas=4, place="serve.yaml")
    assert (read.target_utilisation, read.min_replicas, read.max_replicas) == (0.5, 0, 4)
    with pytest.raises(SpecError) as error:
        read_settings({"target_utilization": 0.5, "spare": -1}, min_replicas=1, max_replicas=4, place="serve.yaml")
    assert len(error.value.faults) == 2
    assert "serve.yaml: target_utilization: unknown key, did you mean 'target_utilisation'?" in error.value.faults


# Serve's adapter, with Serve's own classes


DEPLOYMENT = DeploymentID("Model", "model")


def context(loads, *, running=None, target=None, total=0.0, state=None, now=1000.0, low=1, high=10, metrics=None):
    running = len(loads) if running is None else running
    replicas = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(running)]
    names = (UTILISATION, OFFERED, SHED, QUEUE_AGE, QUEUED)
    fields = ("utilisation", "offered_per_s", "shed_per_s", "queue_age_s", "num_queued")
    series = {
        name: {
            replica: [TimeStampedValue(now - 0.4, 0.0), TimeStampedValue(now - 0.2, getattr(load, field))]
            for replica, load in zip(replicas, loads, strict=False)
        }
        for name, field in zip(names, fields, strict=True)
    }
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Model",
        app_name="model",
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=replicas,
        total_num_requests=lambda: total,
        total_queued_requests=lambda: 0.0,
        aggregated_metrics=dict,
        raw_metrics=(lambda: series) if metrics is None else metrics,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=AutoscalingConfig(min_replicas=low, max_replicas=high, target_ongoing_requests=4),
    )


def test_serve_builds_the_policy_from_its_import_path_and_its_settings():
    policy = AutoscalingPolicy(
        policy_function="bigray.serve.scaling.policy:ArrivalPolicy", policy_kwargs={"target_utilisation": 0.5}
    )
    built = _resolve_policy_callable(policy)
    replicas, state = built(context([ReplicaLoad(0.6, 60)]))
    assert replicas == 2
    assert "at 50% each" in state[WHY_KEY]


def test_behind_serves_own_delays_the_count_rises_at_once_and_the_state_comes_back():
    policy = _apply_autoscaling_config(ArrivalPolicy())
    overload = [ReplicaLoad(1.0, 200, 100, 0.5, 50)]
    first = context(overload)
    first.config = AutoscalingConfig(min_replicas=1, max_replicas=10, upscale_delay_s=0, downscale_delay_s=0)
    replicas, state = policy(first)
    assert replicas == 2
    second = context(overload, target=2, state=state, now=1001.5)
    second.config = first.config
    replicas, state = policy(second)
    assert replicas == 3
    assert ScalingMemory.from_plain(state[STATE_KEY]).running == 1


def test_the_newest_value_of_each_series_counts():
    replicas, state = ArrivalPolicy()(context([ReplicaLoad(0.2, 10, 0, 0, 1), ReplicaLoad(0.4, 30, 0, 0, 2)]))
    assert replicas == 2
    assert "work of 0.60 replicas" in state[WHY_KEY]
    assert "40/s offered, 0/s shed, 3 waiting" in state[WHY_KEY]


def test_the_bounds_are_those_of_serve():
    policy = ArrivalPolicy(min_replicas=5)
    assert policy(context([ReplicaLoad(1.0, 100, 50)] * 4, high=4))[0] == 4
    assert policy(context([ReplicaLoad(0.1, 1)], low=3))[0] == 3


def test_a_replica_that_just_started_counts_as_running_without_load():
    replicas, state = ArrivalPolicy()(context([ReplicaLoad(0.95, 100)], running=2))
    assert replicas == 2
    assert state[WHY_KEY].endswith("1 of 2 replicas have not reported bigray_utilisation")


def test_before_any_report_serves_count_of_requests_may_raise_but_never_lower():
    policy = ArrivalPolicy()
    assert policy(context([], running=3, total=0.0))[0] == 3
    replicas, state = policy(context([], running=3, total=18.0))
    assert replicas == 5
    assert "no reports yet, and 18 requests under way" in state[WHY_KEY]
    assert policy(context([], running=3, total=1e6))[0] == 6
    assert policy(context([], running=3, target=6, total=1e6))[0] == 6


def test_a_request_at_zero_replicas_starts_one():
    policy = ArrivalPolicy()
    assert policy(context([], running=0, low=0))[0] == 0
    assert policy(context([], running=0, low=0, total=1.0))[0] == 1


class Broken:
    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")


def raising():
    raise RuntimeError("the store is away")


@pytest.mark.parametrize(
    "metrics",
    [
        lambda: None,
        dict,
        lambda: {UTILISATION: None},
        lambda: {UTILISATION: {"r0": []}},
        lambda: {UTILISATION: {"r0": None}},
        lambda: {UTILISATION: {"r0": [TimeStampedValue(1.0, math.nan)]}},
        lambda: {UTILISATION: {"r0": [TimeStampedValue(1.0, "full")]}},
        lambda: {UTILISATION: 7},
        lambda: [1, 2],
        raising,
    ],
)
def test_metrics_that_are_missing_or_broken_hold_the_count_and_say_so(metrics):
    replicas, state = ArrivalPolicy()(context([], running=2, target=3, metrics=metrics))
    assert replicas == 3
    assert "held" in state[WHY_KEY]


@pytest.mark.parametrize("state", [{STATE_KEY: "x"}, {STATE_KEY: {"at": "now"}}, {STATE_KEY: None}])
def test_a_broken_state_is_forgotten(state):
    assert ArrivalPolicy()(context([ReplicaLoad(0.3, 10)] * 2, state=state))[0] == 2


def test_a_memory_of_wrong_types_costs_one_decision():
    policy = ArrivalPolicy()
    plain = {**ScalingMemory(at=1.0).to_plain(), "work": "much"}
    replicas, state = policy(context([ReplicaLoad(0.3, 10)] * 2, state={STATE_KEY: plain}))
    assert replicas == 2
    assert "held" in state[WHY_KEY]
    replicas, state = policy(context([ReplicaLoad(1.0, 10, 5)] * 2, state=state))
    assert replicas > 2


def test_a_context_that_is_none_is_survived():
    assert ArrivalPolicy()(object())[0] == 1


def test_settings_that_are_not_valid_hold_the_count():
    policy = ArrivalPolicy(target_utilization=0.5)
    replicas, state = policy(context([ReplicaLoad(1.0, 100, 50)] * 3))
    assert replicas == 3
    assert "policy_kwargs are not valid" in state[WHY_KEY]
    assert "target_utilization" in state[WHY_KEY]


def test_the_state_is_plain():
    _, state = ArrivalPolicy()(context([ReplicaLoad(1.0, 100, 50, 0.5, 3)] * 3))
    assert json.loads(json.dumps(state, allow_nan=False))


def test_a_hundred_replicas_are_decided_on():
    policy, state = ArrivalPolicy(), {}
    loads = [ReplicaLoad(0.5 + number / 1000, 100, 0, 0.01, 1) for number in range(100)]
    for tick in range(20):
        replicas, state = policy(context(loads, state=state, now=time.time() + tick / 10, high=200))
    assert replicas == 100
    assert len(json.dumps(state)) < 2000
