"""Who sits where in a worker group: a pure record of a group's processes, and the decision when they can start.

Ray Train gives each of its workers a slot (its world rank there) and replaces one that dies. A spare process has no
slot and takes a dead worker's, so that nobody waits for Ray Train's replacement, which then waits as the next spare. A
*generation* is one set of processes that share a process group; when one of them is lost, the others come back here,
and the next generation begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Member:
    """One worker process."""

    node_id: str
    node_ip: str
    pid: int
    slot: int | None = None
    """World rank that Ray Train gave it; None for a spare."""
    num_slots: int = 0
    """World size that Ray Train started it with; 0 for a spare."""
    gpu: str = ""
    """The GPU it computes on, as Ray numbers those of a node; empty without one."""

    @property
    def key(self) -> tuple[str, int]:
        return self.node_id, self.pid


@dataclass(frozen=True)
class Place:
    """A process's seat in one generation."""

    generation: int
    rank: int
    members: tuple[Member, ...]
    """By rank."""

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def neighbours(self) -> tuple[Member, ...]:
        """The members on this member's node, itself among them, by rank."""
        here = self.members[self.rank].node_id
        return tuple(member for member in self.members if member.node_id == here)

    @property
    def local_rank(self) -> int:
        return self.neighbours.index(self.members[self.rank])

    @property
    def node_rank(self) -> int:
        nodes = list(dict.fromkeys(member.node_id for member in self.members))
        return nodes.index(self.members[self.rank].node_id)


@dataclass
class Roster:
    """The processes of one group. Its owner tells it who came and who is gone; it says when a generation can begin."""

    generation: int = 0
    seated: tuple[Member, ...] = ()
    """The current generation, by rank; some may be gone, or waiting for the next."""
    waiting: dict[tuple[str, int], Member] = field(default_factory=dict)
    gone: set[tuple[str, int]] = field(default_factory=set)
    empty_slots: set[int] = field(default_factory=set)
    """Nobody is waited for in these: Ray Train fills them again with the whole group only, and says so."""

    @property
    def is_broken(self) -> bool:
        """Whether the current generation has lost a member, or one has come back from it."""
        return any(member.key in self.gone or member.key in self.waiting for member in self.seated)

    def is_seated(self, member: Member) -> bool:
        """Whether it has a seat in the current generation and has not come back from it."""
        return member in self.seated and member.key not in self.waiting and member.key not in self.gone

    @property
    def missing(self) -> tuple[Member, ...]:
        """The seated members that have not come back, and are not known to be gone."""
        return tuple(m for m in self.seated if m.key not in self.waiting and m.key not in self.gone)

    @property
    def spares(self) -> list[Member]:
        """The waiting processes that have no slot, in the order they came."""
        return [member for member in self.waiting.values() if member.slot is None]

    @property
    def holders(self) -> tuple[Member, ...]:
        """The seated and waiting processes that have a slot and are not known to be gone."""
        known = dict.fromkeys((*self.seated, *self.waiting.values()))
        return tuple(member for member in known if member.slot is not None and member.key not in self.gone)

    def superseded_by(self, member: Member) -> tuple[Member, ...]:
        """Whom a process's arrival shows to be gone: a new one in a slot of Ray Train's had someone there before it.

        One that comes back from a generation, or was given up on and comes all the same, supersedes nobody.
        """
        if member.slot is None or member in self.seated or member.key in self.gone:
            return ()
        others = [holder for holder in self.holders if holder.key != member.key]
        return tuple(m for m in others if m.slot == member.slot or m.num_slots != member.num_slots)

    def arrive(self, member: Member) -> None:
        """A process waits for a seat."""
        for other in self.superseded_by(member):
            self.lose(other)
        self.gone.discard(member.key)
        self.waiting[member.key] = member

    def lose(self, member: Member) -> None:
        """A process has ended, or is not waited for any longer. Should it come all the same, it waits for a seat."""
        self.gone.add(member.key)
        self.waiting.pop(member.key, None)

    def seat(self) -> tuple[Member, ...] | None:
        """Begin the next generation where every seat can be filled; returns its members by rank.

        None while the current one holds, or while someone has to be waited for. A spare helps survivors to go on, or
        goes on alone; where Ray Train starts the whole group, its workers are waited for. Without a spare an empty slot
        stays empty, and the generation is smaller.
        """
        if self.missing:
            return None
        size = max((member.num_slots for member in self.waiting.values()), default=0) or len(self.seated)
        holders = {member.slot: member for member in self.waiting.values() if member.slot is not None}
        has_survivors = any(member.key in self.waiting for member in self.seated)
        spares = self.spares if self.generation > 0 and (has_survivors or not holders) else []
        chosen: list[Member] = []
        for slot in range(size):
            if slot in holders:
                chosen.append(holders[slot])
            elif spares:
                chosen.append(spares.pop(0))
            elif slot not in self.empty_slots:
                return None
        if not chosen:
            return None
        for member in chosen:
            del self.waiting[member.key]
        self.generation += 1
        self.seated = tuple(chosen)
        return self.seated
