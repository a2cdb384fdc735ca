"""Who sits where, as a pure state machine."""

from __future__ import annotations

import random

import pytest

from bigray.training.membership import Member, Place, Roster


def worker(slot: int, pid: int | None = None, size: int = 2, node: str = "a") -> Member:
    return Member(node, "10.0.0.1", slot + 100 if pid is None else pid, slot, size)


def spare(pid: int = 900, node: str = "a") -> Member:
    return Member(node, "10.0.0.1", pid)


def seated_pair() -> tuple[Roster, Member, Member]:
    roster, first, second = Roster(), worker(0), worker(1)
    roster.arrive(first)
    roster.arrive(second)
    assert roster.seat() == (first, second)
    return roster, first, second


def test_the_first_generation_begins_when_every_slot_is_filled_in_the_order_of_slots() -> None:
    roster = Roster()
    roster.arrive(worker(1))
    assert roster.seat() is None
    roster.arrive(worker(0))
    assert roster.seat() == (worker(0), worker(1))
    assert roster.generation == 1
    assert not roster.is_broken


def test_a_spare_takes_no_seat_of_the_first_generation() -> None:
    roster = Roster()
    roster.arrive(spare())
    roster.arrive(worker(0))
    assert roster.seat() is None


def test_a_generation_that_holds_is_not_followed_by_another() -> None:
    roster, *_ = seated_pair()
    roster.arrive(spare())
    assert roster.seat() is None
    assert roster.generation == 1


def test_one_that_comes_back_breaks_the_generation_and_waits_for_the_others() -> None:
    roster, first, second = seated_pair()
    roster.arrive(first)
    assert roster.is_broken
    assert roster.missing == (second,)
    assert not roster.is_seated(first)
    assert roster.seat() is None
    roster.arrive(second)
    assert roster.seat() == (first, second)
    assert roster.generation == 2


def test_a_lost_member_is_replaced_in_its_slot() -> None:
    roster, first, second = seated_pair()
    roster.lose(second)
    roster.arrive(first)
    assert roster.seat() is None
    replacement = worker(1, pid=201)
    roster.arrive(replacement)
    assert roster.seat() == (first, replacement)


def test_a_new_process_in_a_slot_means_that_its_holder_is_gone() -> None:
    roster, first, second = seated_pair()
    replacement = worker(1, pid=201)
    assert roster.superseded_by(replacement) == (second,)
    roster.arrive(replacement)
    roster.arrive(first)
    assert roster.seat() == (first, replacement)


def test_a_spare_takes_a_dead_members_seat_and_the_replacement_waits_as_the_next_spare() -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    roster.lose(second)
    roster.arrive(first)
    assert roster.seat() == (first, spare())

    replacement = worker(1, pid=201)
    roster.arrive(replacement)
    assert not roster.is_broken
    assert roster.seat() is None

    roster.lose(spare())
    roster.arrive(first)
    assert roster.seat() == (first, replacement)


def test_a_spare_that_holds_a_seat_moves_to_the_seat_that_nobody_else_can_take() -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    roster.lose(second)
    roster.arrive(first)
    roster.seat()
    replacement = worker(1, pid=201)
    roster.arrive(replacement)
    roster.lose(first)
    roster.arrive(spare())
    assert roster.seat() == (spare(), replacement)


def test_a_spare_that_is_not_needed_any_more_is_left_waiting() -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    roster.lose(second)
    roster.arrive(first)
    roster.seat()
    replacement = worker(1, pid=201)
    for member in (replacement, first, spare()):
        roster.arrive(member)
    assert roster.seat() == (first, replacement)
    assert roster.spares == [spare()]


def test_one_that_was_given_up_on_and_comes_all_the_same_waits_and_has_a_seat_later() -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    roster.arrive(first)
    for member in roster.missing:
        roster.lose(member)
    assert roster.seat() == (first, spare())

    roster.arrive(second)
    assert not roster.is_broken
    roster.lose(spare())
    roster.arrive(first)
    assert roster.seat() == (first, second)
    assert not roster.is_broken


def test_a_late_one_does_not_drive_out_who_has_its_slot_by_now() -> None:
    roster, first, second = seated_pair()
    replacement = worker(1, pid=201)
    roster.arrive(replacement)
    roster.arrive(first)
    assert roster.seat() == (first, replacement)
    roster.arrive(second)
    assert roster.is_seated(replacement)
    assert not roster.is_broken


def test_a_spare_goes_on_alone_where_the_only_worker_is_lost() -> None:
    roster, only = Roster(), worker(0, size=1)
    roster.arrive(only)
    roster.seat()
    roster.arrive(spare())
    roster.lose(only)
    assert roster.seat() == (spare(),)


def test_nobody_is_waited_for_in_an_empty_slot_and_the_generation_is_smaller() -> None:
    roster, first, second = seated_pair()
    roster.lose(first)
    roster.arrive(second)
    assert roster.seat() is None
    roster.empty_slots.add(0)
    assert roster.seat() == (second,)
    roster.arrive(second)
    assert roster.seat() == (second,), "and so is the next"


def test_a_spare_sits_in_an_empty_slot() -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    roster.lose(second)
    roster.empty_slots.add(1)
    roster.arrive(first)
    assert roster.seat() == (first, spare())


def test_one_that_was_taken_for_lost_has_its_slot_again_with_the_next_generation() -> None:
    roster, first, second = seated_pair()
    roster.lose(second)
    roster.empty_slots.add(1)
    roster.arrive(first)
    assert roster.seat() == (first,)
    roster.arrive(second)
    assert roster.seat() is None
    roster.arrive(first)
    assert roster.seat() == (first, second)


def test_a_slot_can_be_empty_before_anybody_has_come() -> None:
    roster, first = Roster(), worker(0)
    roster.empty_slots.add(1)
    roster.arrive(first)
    assert roster.seat() == (first,)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_group_that_starts_again_at_any_size_supersedes_the_one_before(size: int) -> None:
    roster, first, second = seated_pair()
    roster.arrive(spare())
    restarted = [worker(slot, pid=300 + slot, size=size) for slot in range(size)]
    for member in restarted:
        assert roster.seat() is None
        roster.arrive(member)
    if size == 1:
        assert roster.gone == {first.key, second.key}
    assert roster.seat() == tuple(restarted)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_no_process_has_two_seats_and_only_waiting_ones_sit_down(seed: int) -> None:
    draw = random.Random(seed)
    size, pids = draw.randint(1, 4), iter(range(1000, 9000))
    roster = Roster()
    processes = {slot: worker(slot, next(pids), size) for slot in range(size)}
    spares = [spare(next(pids), node="b") for _ in range(draw.randint(0, 2))]
    dead: set[Member] = set()
    num_seatings = 0
    for _ in range(300):
        alive = [*processes.values(), *spares]
        match draw.choice(["arrive", "arrive", "arrive", "die", "give up", "empty", "restart"]):
            case "arrive":
                roster.arrive(draw.choice(alive))
            case "die":
                victim = draw.choice(alive)
                dead.add(victim)
                if draw.random() < 0.7:  # else only its replacement tells
                    roster.lose(victim)
                if victim.slot is None:
                    spares[spares.index(victim)] = spare(next(pids), node="b")
                    roster.lose(victim)
                else:
                    processes[victim.slot] = worker(victim.slot, next(pids), size)
                    roster.arrive(processes[victim.slot])
            case "give up":
                lose_the_missing(roster)
            case "empty":
                roster.empty_slots.add(draw.randrange(size))
            case "restart" if draw.random() < 0.1:
                size = draw.randint(1, 4)
                dead |= set(processes.values())
                processes = {slot: worker(slot, next(pids), size) for slot in range(size)}
                for member in processes.values():
                    roster.arrive(member)
        seated = seat_and_check(roster)
        assert not dead & set(seated)
        num_seatings += bool(seated)
    assert num_seatings > 1


def lose_the_missing(roster: Roster) -> None:
    for member in roster.missing if roster.is_broken else ():
        roster.lose(member)


def seat_and_check(roster: Roster) -> tuple[Member, ...]:
    """Begin the next generation if it can, and look at what must hold before and after."""
    generation, before, waiting = roster.generation, roster.seated, dict(roster.waiting)
    seated = roster.seat()
    if seated is None:
        assert (roster.generation, roster.seated, roster.waiting) == (generation, before, waiting)
        return ()
    assert roster.generation == generation + 1
    assert len({member.key for member in seated}) == len(seated)
    assert all(waiting.get(member.key) == member for member in seated)
    assert not {member.key for member in seated} & set(roster.waiting)
    assert all(roster.is_seated(member) for member in seated)
    assert not roster.is_broken
    return seated


def test_a_place_knows_its_neighbours_and_its_node() -> None:
    members = (worker(0), worker(1, node="b"), worker(2), worker(3, node="b"))
    places = [Place(1, rank, members) for rank in range(4)]
    assert [place.local_rank for place in places] == [0, 0, 1, 1]
    assert [place.node_rank for place in places] == [0, 1, 0, 1]
    assert places[3].neighbours == (members[1], members[3])
    assert places[0].world_size == 4
