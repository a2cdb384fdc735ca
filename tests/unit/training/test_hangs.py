"""Which worker of a group hangs, by heartbeats alone; and the means to end one."""

from __future__ import annotations

import subprocess
import sys

from bigray.training.hangs import Hang, find_hangs, kill_process
from bigray.training.heartbeat import Beat
from bigray.training.membership import Member

NOW, LIMIT_S = 1000.0, 600.0
GROUP = tuple(Member("a", "10.0.0.1", 100 + rank, rank, 3) for rank in range(3))


def beat(
    steps: int = 5, ticks: int = 1, phase: str = "forward", waited_s: float = 0.0, at: str = "loop.py:1 _pass"
) -> Beat:
    return Beat(steps, ticks, phase, waited_s, f"worker.py:9 run > {at}")


def hangs(
    *beats: Beat | None,
    heard_s_ago: tuple[float, ...] = (0.5, 0.5, 0.5),
    limit_s: float = LIMIT_S,
    unheard: tuple[int, ...] = (),
    seated_s_ago: float = 100.0,
) -> list[Hang]:
    """Of a group whose ranks last told this; None where a rank is not there any more, or `unheard` yet."""
    told = {m: (NOW - ago, b) for m, b, ago in zip(GROUP, beats, heard_s_ago, strict=True) if b is not None}
    return list(find_hangs(GROUP, told, [GROUP[rank] for rank in unheard], seated_s_ago, NOW, limit_s))


def test_a_group_that_makes_progress_has_none() -> None:
    assert hangs(beat(waited_s=1), beat(waited_s=100), beat(waited_s=100)) == []


def test_a_group_that_nobody_has_heard_yet_has_none() -> None:
    assert hangs(None, None, None) == []


def test_one_that_was_stopped_before_its_first_beat_is_named_and_not_the_one_that_waits_for_it() -> None:
    waiting = beat(5, 1, waited_s=30, at="distributed_c10d.py:99 all_reduce")
    assert hangs(waiting, None, waiting, unheard=(1,), seated_s_ago=30) == [], "it may still be forming its group"

    (hang,) = hangs(waiting, None, waiting, unheard=(1,), seated_s_ago=40)
    assert (hang.rank, hang.is_silent, hang.must_end) == (1, True, True)
    assert "rank 1 (pid 101 on 10.0.0.1) has not been heard for 40 s" in hang.describe()


def test_an_idle_group_has_none() -> None:
    idle = beat(phase="idle")
    assert hangs(idle, idle, idle) == []


def test_the_rank_that_has_come_least_far_is_named_and_left_alive_for_now() -> None:
    (hang,) = hangs(beat(5, 2, waited_s=30), beat(5, 1, waited_s=31), beat(5, 2, waited_s=30))
    assert (hang.rank, hang.member, hang.must_end) == (1, GROUP[1], False)
    text = hang.describe()
    assert "rank 1 (pid 101 on 10.0.0.1) makes no progress for 31 s, in forward" in text
    assert "loop.py:1 _pass" in text


def test_a_rank_that_is_a_step_behind_is_named_however_many_marks_it_has_made_within_it() -> None:
    (hang,) = hangs(beat(5, 1, waited_s=30), beat(4, 9, waited_s=30), beat(5, 0, waited_s=30))
    assert hang.rank == 1


def test_a_rank_inside_a_collective_waits_for_the_one_that_is_not() -> None:
    waiting = beat(5, 1, waited_s=30, at="distributed_c10d.py:99 all_gather")
    (hang,) = hangs(waiting, beat(5, 3, waited_s=30), waiting)
    assert hang.rank == 1


def test_where_all_are_inside_a_collective_it_is_the_one_that_has_come_least_far() -> None:
    at = "distributed_c10d.py:99 all_gather"
    (hang,) = hangs(*[beat(5, ticks, waited_s=30, at=at) for ticks in (2, 2, 1)])
    assert hang.rank == 2


def test_a_rank_that_has_finished_does_not_hide_one_that_hangs() -> None:
    (hang,) = hangs(beat(waited_s=30), beat(phase="idle"), beat(phase="idle"))
    assert hang.rank == 0


def test_a_rank_that_makes_no_progress_for_too_long_must_end() -> None:
    (hang,) = hangs(beat(5, 2, waited_s=601), beat(5, 1, waited_s=602), beat(5, 2, waited_s=601))
    assert hang.must_end


def test_a_rank_that_loads_has_two_minutes_however_short_a_step_may_be() -> None:
    for waited_s, must_end in ((119, False), (121, True)):
        (hang,) = hangs(*[beat(0, ticks, "loading", waited_s) for ticks in (2, 2, 1)], limit_s=1)
        assert (hang.rank, hang.must_end) == (2, must_end)


def test_a_rank_that_is_silent_must_end_and_those_that_wait_for_it_are_not_named() -> None:
    (hang,) = hangs(*[beat(waited_s=700)] * 3, heard_s_ago=(0.5, 16, 0.5))
    assert (hang.rank, hang.is_silent, hang.must_end) == (1, True, True)
    assert "has not been heard for 16 s" in hang.describe()


def test_of_a_broken_generation_only_those_still_in_it_are_looked_at() -> None:
    (hang,) = hangs(None, beat(5, 3, waited_s=30), None)
    assert hang.rank == 1


def test_a_process_on_this_node_is_ended_and_one_that_has_ended_is_left_alone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    member = Member("here", "127.0.0.1", process.pid)
    kill_process(member, "here")
    assert process.wait(timeout=20) == -9
    kill_process(member, "here")
