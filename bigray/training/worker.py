"""What a worker process does: take a seat in a generation of its group, carry out commands, and come back for the next.

The loop of commands never leaves the process: modules stay imported, the data stays mapped, and a lost peer costs the
milliseconds of another process group.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError

from bigray.data.dataset import TrainingArrays
from bigray.errors import BigrayError, OutOfMemory, StorageError, TrainingFailed
from bigray.host_memory import host_memory
from bigray.results import Ledger
from bigray.specs import TrialSpec
from bigray.training.allocator import keep_freed_memory
from bigray.training.answers import Address
from bigray.training.batch_finder import resolve_batch_size
from bigray.training.checkpoint import Checkpoint, Snapshot, SnapshotBuffers
from bigray.training.commands import (
    Command,
    Event,
    ExportBundle,
    Lane,
    Probe,
    ProbeStack,
    Stop,
    TakeOver,
    TrainStack,
    TrainTo,
    TrialState,
)
from bigray.training.context import LoopTraining, make_training
from bigray.training.devices import backend_of
from bigray.training.export import export_bundle
from bigray.training.heartbeat import Heartbeat
from bigray.training.isolation import CleanState, seed_everything
from bigray.training.lanes import beginnings_of, next_to_train, read_trial, save_as_own, states_at, states_of
from bigray.training.local_rows import let_go, local_arrays
from bigray.training.loop import TrialTraining, Worker
from bigray.training.membership import Member, Place
from bigray.training.metrics_import import import_torchmetrics
from bigray.training.process_group import broadcast_object, process_group
from bigray.training.recycling import must_be_fresh, rss_limit_bytes, subjects
from bigray.training.reporting import Reporter
from bigray.training.setup import GroupSetup
from bigray.training.stopwatch import Stopwatch
from bigray.training.switchboard import ask
from bigray.training.tensor_files import pack_tensors
from bigray.training.trial_hooks import LiveTrial, StackHooks, TrialHooks, source_of, taken_over
from bigray.training.usage import Meter, Usage, private_rss_bytes

if TYPE_CHECKING:
    from bigray.training.stack_checkpoint import StackedLane

_ABOUT_A_PEER = ("gloo/transport", "NCCL", "Default process group has not been initialized")
REJOIN_PAUSE_S = 0.1
"""After a process group that could not be formed."""


class GenerationBroken(Exception):
    """This generation of the group cannot go on; the process is fine."""


def run_worker(config: dict[str, Any]) -> None:
    """Entry point of one worker process (`train_loop_per_worker`): serve its group until the run is over."""
    import ray.train
    import ray.train.torch

    setup: GroupSetup = config["setup"]
    context = ray.train.get_context()
    slot, num_slots = context.get_world_rank(), context.get_world_size()
    _serve(setup, setup.group, _this_process(slot, num_slots), ray.train.torch.get_device())


class SpareWorker:
    """Ray actor: an idle process with everything imported, which takes the seat of a worker that died (CPU only)."""

    def serve(self, setup: GroupSetup) -> None:
        """Wait for a seat in any group, and serve there; returns when the run is over."""
        _serve(setup, None, _this_process(None, 0), torch.device("cpu"))


def _import_what_is_imported_late() -> None:
    """Metrics, and what the first step of an optimizer imports: more than a second that a replacement must not cost."""
    import_torchmetrics()
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter], fused=True).step()


def _this_process(slot: int | None, num_slots: int) -> Member:
    node_id = ray.get_runtime_context().get_node_id()
    gpu = next(map(str, ray.get_gpu_ids()), "")
    return Member(node_id, ray.util.get_node_ip_address(), os.getpid(), slot, num_slots, gpu)


def _serve(setup: GroupSetup, group: int | None, member: Member, device: torch.device) -> None:
    """Sit in one generation after another until the run is over.

    Raises:
        Preempted: this process's node is about to go away; Ray Train then starts another.
    """
    keep_freed_memory()
    torch.set_num_threads(setup.threads_per_worker)
    seed_everything()
    # DDP warns once for every process about matters of ours that are deliberate; errors still raise
    logging.getLogger("torch").setLevel(logging.ERROR)
    _import_what_is_imported_late()
    process = _Process(setup, member, device)
    try:
        while (seat := process.take_seat(group)) is not None:
            process.sit(*seat)
    except RayActorError:  # the switchboard is gone: the run is over
        return
    finally:
        process.close()


class _Process:
    """What outlives a generation: the mapped data, the live trial, and what runs beside the training thread."""

    def __init__(self, setup: GroupSetup, member: Member, device: torch.device) -> None:
        self.setup, self.member, self.device = setup, member, device
        self.board = setup.switchboard
        self._data: TrainingArrays = local_arrays(ray.get(setup.data), setup.driver_node)
        self._fold: tuple[int, TrainingArrays] | None = None
        """The fold that was trained last, and its rows."""
        self.reporter = Reporter(lambda events: ray.get(self.board.push_all.remote(events)))
        self.live: LiveTrial | None = None
        self.has_trained: frozenset[str] = frozenset()
        """The trials that this process had a part in."""
        self.clean = CleanState()
        self.unclean: str | None = None
        """Why no other trial should be trained here."""
        # what is here now stays: a collection between two trials looks at what they left, and takes a millisecond
        gc.collect()
        gc.freeze()
        self.fresh_rss_bytes = private_rss_bytes()

    def data_of(self, trial: TrialSpec) -> TrainingArrays:
        """The rows of a trial. Of the folds one is mapped at a time, so that a node may spill the others."""
        if trial.fold is None:
            return self._data
        if self._fold is None or self._fold[0] != trial.fold:
            self._fold = (trial.fold, ray.get(self.setup.folds[trial.fold]))
        return self._fold[1]

    def take_seat(self, group: int | None) -> tuple[int, Place] | None:
        """Wait for a seat; None where the run is over."""
        seat: tuple[int, Place] | None = ask(self.board.join.remote(group, self.member))
        return seat

    def sit(self, group: int, place: Place) -> None:
        """Form the process group of a generation and carry out commands until the generation or the run ends."""
        setup = replace(self.setup, group=group)
        worker = Worker(place.rank, place.world_size, self.device)
        backend = backend_of(place.members, self.device.type)
        try:
            with process_group(place, backend, self._publisher(group, place), self._looker(group, place)) as hang_up:
                self.clean.note_group()
                self._carry_out_commands(setup, worker, place, hang_up)
        except GenerationBroken:
            pass
        except (dist.DistError, RuntimeError, ValueError) as error:
            if not is_about_a_peer(error):
                raise
            time.sleep(REJOIN_PAUSE_S)
        if self.live is None:  # the failed trial's frames are gone only now
            free_memory(self.device)
            self.clean.restore()  # a default device, for one, would be in the way of the next process group

    def _carry_out_commands(self, setup: GroupSetup, worker: Worker, place: Place, hang_up: Callable[[], None]) -> None:
        heartbeat = Heartbeat(self.board, setup.group, self.member, hang_up)
        try:
            _CommandLoop(self, setup, worker, place, heartbeat).run()
        finally:
            if self.live is not None:
                self.live.settle()
            heartbeat.end()  # not before the checkpoint is written: a rank that is not heard is given up

    def forget(self) -> None:
        """Let go of the trial in memory."""
        if self.live is not None:
            self.live.end()
        self.live = None

    def clean_up(self) -> list[str]:
        """Let go of the trial in memory and put back what it may have changed; returns the threads it left running.

        What cannot be put back is noted in `unclean`.
        """
        self.forget()
        free_memory(self.device)
        left = self.clean.threads_left()
        self.unclean = self.clean.restore()
        self.clean.note_threads()
        return left

    def close(self) -> None:
        """End the threads."""
        self.forget()
        with contextlib.suppress(ray.exceptions.RayError):
            self.reporter.close()
        let_go(self._data)

    def _publisher(self, group: int, place: Place) -> Callable[[Address], None]:
        return lambda address: ray.get(self.board.publish.remote(group, place.generation, address))

    def _looker(self, group: int, place: Place) -> Callable[[], Address]:
        def look_up() -> Address:
            address: Address | None = ray.get(self.board.look_up.remote(group, place.generation))
            if address is None:
                raise GenerationBroken
            return address

        return look_up


class _CommandLoop:
    """The commands of one generation, on one rank."""

    def __init__(
        self, process: _Process, setup: GroupSetup, worker: Worker, place: Place, heartbeat: Heartbeat
    ) -> None:
        self.setup, self.worker = setup, worker
        self.is_first = worker.rank == 0
        # control messages are on the CPU: the default group sends them over gloo, also where gradients go over NCCL
        self.control: dist.ProcessGroup | None = None
        self.heartbeat = heartbeat
        self.stopwatch = Stopwatch()
        self._meter = Meter(worker.device)
        self._process, self._place, self._board = process, place, setup.switchboard
        self._rss_limit: int | None = None
        self._is_used = False
        """Whether this process had trained anything before the command under way."""
        self._is_new = True
        """No trial was trained in this generation yet: what is in memory is of the one before."""

    def run(self) -> None:
        """Carry out commands until the run is over.

        Raises:
            GenerationBroken: a command failed on this rank or a peer, or the group was asked to leave its seats.
        """
        while True:
            assigned = self.from_rank_0(self._next_command)
            if assigned is None:
                continue
            serial, command = assigned
            if isinstance(command, Stop):
                return
            self._leave_if_used(command)
            self._carry_out(serial, command)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """Call `make` on rank 0 and give its result to every rank."""
        return broadcast_object(make() if self.is_first else None, 0, self.worker.world_size, self.control)

    def of_all_ranks(self, value: Any) -> list[Any]:
        """`value` of each rank, on every rank."""
        values = [value] * self.worker.world_size
        if self.worker.world_size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def push(self, kind: str, trial: TrialSpec, values: dict[str, Any]) -> None:
        """Report from rank 0; never waits."""
        if self.is_first:
            self.push_own(Event(kind, trial.trial_id, values))

    def push_own(self, event: Event) -> None:
        """Report from whichever rank this is."""
        self._process.reporter.push(event)

    def _next_command(self) -> tuple[int, Command] | None:
        """Wait for the next command (rank 0). Without a switchboard the run is over, and nobody will send one."""
        try:
            generation = self._place.generation
            command: tuple[int, Command] | None = ray.get(self._board.next_command.remote(self.setup.group, generation))
        except RayActorError:
            return (0, Stop())
        return command

    def _carry_out(self, serial: int, command: Command) -> None:
        self.heartbeat.begin(serial)
        self.stopwatch.restart("start")
        self._meter.reset()
        self._is_used = bool(self._process.has_trained)
        self._process.has_trained |= subjects(command)
        try:
            result = self._do(command)
            self.stopwatch.mark("report")
            self._process.reporter.flush()
            ranks: list[tuple[Usage, int]] = self.of_all_ranks((self._meter.read(), self._limit()))
            if isinstance(result, TrialState):
                result = replace(result, ledger=self._ledger(Usage.of_group([used for used, _ in ranks]), len(ranks)))
            self.heartbeat.tick("idle")
        except GenerationBroken:
            raise
        except Exception as error:
            if not is_about_a_peer(error):  # a peer's own story is the one to tell
                self._process.forget()
                ray.get(self._board.fail.remote(self.setup.group, serial, _as_failure(error)))
            raise GenerationBroken from None
        if self.is_first:
            ray.get(self._board.complete.remote(self.setup.group, serial, result))
        if any(used.rss_bytes > limit for used, limit in ranks):
            self._leave_if_large([limit for _, limit in ranks])

    def _do(self, command: Command) -> Any:
        if isinstance(command, TrainTo):
            return self._train(command)
        if isinstance(command, TrainStack):
            return self._train_stack(command)
        if isinstance(command, ProbeStack):
            return self._probe(command)
        assert isinstance(command, ExportBundle)
        return self._export(command)

    def _ledger(self, used: Usage, num_gpus: int, num_lanes: int = 1, num_ranks: int = 1) -> Ledger:
        """Of the command up to now, by this rank's clock.

        In a stack, a lane's share: of the group's time over the lanes of all ranks, which train at once; and of this
        rank's processor and GPU over its own.
        """
        read = self.stopwatch.read()
        num_gpus = num_gpus if self.worker.device.type == "cuda" else 0
        shares = {name: value / (num_lanes * num_ranks) for name, value in asdict(read).items() if name.endswith("_s")}
        shares |= {"cpu_s": used.cpu_s / num_lanes, "gpu_s": num_gpus * read.wall_s / num_lanes}
        return Ledger(**shares, peak_rss_bytes=used.peak_rss_bytes, peak_gpu_bytes=used.peak_gpu_bytes)

    # processes that make room for fresh ones

    def _leave_if_used(self, command: Command) -> None:
        """With `isolate`: processes that have trained another trial end before this command, which waits for others."""
        if not self.setup.isolate:
            return
        is_used = must_be_fresh(True, command, self._process.has_trained)
        self._leave([rank for rank, used in enumerate(self.of_all_ranks(is_used)) if used], "scaling.isolate")

    def _leave_if_large(self, limits: Sequence[int]) -> None:
        """After a command: a process that keeps too much memory, also without its trial, makes room for another."""
        self._process.clean_up()
        kept: list[int] = self.of_all_ranks(private_rss_bytes())
        large = [rank for rank, rss in enumerate(kept) if rss > limits[rank]]
        self._leave(large, f"its memory is {kept[self.worker.rank] / 1e9:.2f} GB after a command")

    def _limit(self) -> int:
        """Resident memory that this rank may have; worked out once."""
        if self._rss_limit is None:
            on_node = 1
            if self.setup.max_rss_gb is None:
                on_node = ray.get(self._board.workers_on.remote(self._process.member.node_id))
            fresh, node = self._process.fresh_rss_bytes, host_memory().limit_bytes
            self._rss_limit = rss_limit_bytes(self.setup.max_rss_gb, node, on_node, fresh)
        return self._rss_limit

    def _leave(self, ranks: Sequence[int], why: str) -> None:
        """These ranks' processes end, and fresh ones take their seats; the others come back for the next generation.

        Raises:
            GenerationBroken: on the others, where there are such ranks.
        """
        if not ranks:
            return
        if self.worker.rank in ranks:
            self._process.forget()
            self._process.reporter.flush()
            ray.get(self._board.recycle.remote(self.setup.group, self._process.member, why))
            os._exit(0)  # a thread cannot end its process otherwise; nothing is left that anybody needs
        raise GenerationBroken

    # one trial

    def _train(self, command: TrainTo) -> Any:
        live = self._live_trial(command)
        training, hooks = live.training, live.hooks
        begins_at = training.progress
        can_be_taken_over = begins_at.step > 0 and begins_at.batch == 0 and begins_at == hooks.saved
        hooks.saver.keep(begins_at.step if command.keep_begin and can_be_taken_over else None)
        training.train_to(command.epoch)
        self.stopwatch.mark("save")
        if training.progress != hooks.saved and (self.is_first or command.trial.training.strategy == "fsdp"):
            hooks.on_checkpoint(training.snapshot)
        hooks.saver.wait()
        if hooks.was_stopped:
            self._yield()
        if command.time_a_row and isinstance(training, TrialTraining):
            self.push("latency", command.trial, {"latency_ms": 1000 * training.seconds_a_row()})
        state = training.progress.to_state()
        return replace(state, num_parameters=training.num_parameters) if self.is_first else state

    def _yield(self) -> None:
        """The group was asked to leave its seats; whoever sits there next is handed this command again."""
        if self.is_first:
            self._process.reporter.flush()
            ray.get(self._board.yielded.remote(self.setup.group))
        raise GenerationBroken

    def _live_trial(self, command: TrainTo) -> LiveTrial:
        """This trial in memory: still there from the command before, gone on with after a loss, or loaded."""
        trial = command.trial
        is_new, self._is_new = self._is_new, False
        live = self._process.live
        if live is not None and live.asked == trial and not is_new:
            return live
        self.heartbeat.tick("loading")
        survivor = live.training if live is not None and live.asked == trial else None
        if survivor is None:
            self._begin_clean(trial)
        else:
            self._process.forget()
        hooks = TrialHooks(self, trial)
        live = LiveTrial(trial, self._recovered(command, survivor, hooks), hooks)
        self._process.live = live
        return live

    def _begin_clean(self, trial: TrialSpec | None) -> None:
        """Let the previous trial's memory and traces go before the next one begins.

        Where a trace stays, this process ends and a fresh one takes its seat; the others find their peer gone.
        """
        for name in self._process.clean_up():
            text = f"pid {os.getpid()}: a trial before left thread '{name}' running; see scaling.isolate"
            self.push_own(Event("warning", "" if trial is None else trial.trial_id, {"text": text}))
        if self._process.unclean is not None and self._is_used:
            self._leave([self.worker.rank], self._process.unclean)

    def _recovered(
        self, command: TrainTo, survivor: TrialTraining | LoopTraining | None, hooks: TrialHooks
    ) -> TrialTraining | LoopTraining:
        """The trial brought to where it was: from a survivor's memory where that is sound, else from storage."""
        trial = command.trial
        source = self._source(survivor)
        resolved = self._with_batch_size(trial)  # every rank takes part
        if source is None or survivor is None:
            training = make_training(resolved, self._process.data_of(trial), self.setup.num_outputs, self.worker, hooks)
        else:
            training = survivor
            training.hooks = hooks
            training.rebuild(self.worker)
        checkpoint = self._from_storage(command, hooks) if source is None else self._state_of(source, training)
        if checkpoint is None and command.take_over is not None:
            self._take_over(command.take_over, trial, training)
        elif checkpoint is not None:
            training.restore(checkpoint)
            if source is None and checkpoint.progress != hooks.saved:  # out of a stack
                self._save_beginning(training)
            progress = training.progress
            values = {"epoch": progress.epoch, "step": progress.step, "ended": progress.ended}
            self.push("resumed", trial, {**values, "from": "storage" if source is None else "memory"})
        return training

    def _from_storage(self, command: TrainTo, hooks: TrialHooks) -> Checkpoint | None:
        """The newest state of the trial: its own checkpoint, or its lane of a stack where that is further."""
        own = hooks.restore_last()
        if command.take_over is not None and own is not None and own.progress.epoch < command.take_over.epoch:
            return None
        if command.stack is None:
            return own
        stack, trial = command.stack, command.trial
        lane: Checkpoint = self.from_rank_0(lambda: read_trial(self.setup, stack, trial))
        return lane if own is None or own.progress.step < lane.progress.step else own

    def _take_over(self, take_over: TakeOver, trial: TrialSpec, training: TrialTraining | LoopTraining) -> None:
        """Begin with another trial's weights, optimizer state and past, and this trial's own settings."""
        found = source_of(self, take_over)
        if isinstance(training, LoopTraining) and not _share_a_batch_size(trial, take_over.source):
            raise TrainingFailed(f"{training.name}: cannot take over a trial of another global_batch_size")
        # a loop of one's own counts its steps itself
        steps_per_epoch = None if isinstance(training, LoopTraining) else training.steps_per_epoch
        progress = taken_over(found.progress, training.trial, steps_per_epoch)
        training.restore(replace(found, progress=progress))
        sha256 = training.weights_sha256()  # of what is in the module now, not of the file
        values = {"source": take_over.source.trial_id, "epoch": take_over.epoch, "sha256": sha256}
        self.push("exploited", trial, values)
        self._save_beginning(training)

    def _save_beginning(self, training: TrialTraining | LoopTraining) -> None:
        """Commit as its own what the trial was given: from here on it needs nobody else's."""
        if isinstance(training, TrialTraining):
            training.save()
        elif self.is_first:
            training.hooks.on_checkpoint(training.snapshot)

    def _with_batch_size(self, trial: TrialSpec) -> TrialSpec:
        return resolve_batch_size(
            trial, self._process.data_of(trial), self.setup.num_outputs, self.worker, self.setup.paths, self.from_rank_0
        )

    def _source(self, survivor: TrialTraining | LoopTraining | None) -> int | None:
        """The rank whose memory the others copy: the furthest; None where nobody's is both sound and complete."""
        mine = None if survivor is None else recoverable_step(survivor)
        steps: list[int | None] = self.of_all_ranks(mine)
        known = [step for step in steps if step is not None]
        return steps.index(max(known)) if known else None

    def _state_of(self, source: int, training: TrialTraining | LoopTraining) -> Checkpoint:
        mine = to_checkpoint(training.snapshot(SnapshotBuffers())) if self.worker.rank == source else None
        state: Checkpoint = broadcast_object(mine, source, self.worker.world_size, self.control)
        return state

    # stacks

    def _train_stack(self, command: TrainStack) -> list[TrialState] | None:
        """This rank's lanes; on rank 0 the states of all, in the command's order."""
        self._begin_clean(None)
        rank, size = self.worker.rank, self.worker.world_size
        done: list[TrialState] | None = self.from_rank_0(lambda: states_of(self.setup, command))
        if done is not None:
            return done
        own = command.lanes[rank::size]
        states, was_stopped = self._train_lanes(command, own) if own else ([], False)
        self._process.reporter.flush()
        of_ranks: list[tuple[list[TrialState], bool]] = self.of_all_ranks((states, was_stopped))
        if any(stopped for _, stopped in of_ranks):
            self._yield()
        return [of_ranks[number % size][0][number // size] for number in range(len(command.lanes))]

    def _train_lanes(self, command: TrainStack, lanes: Sequence[Lane]) -> tuple[list[TrialState], bool]:
        """Where the lanes stand in the end, committed, and whether this rank was asked to stop on the way."""
        from bigray.training.stack_checkpoint import save_lanes, state_of

        self.heartbeat.tick("loading")
        trials = [lane.trial for lane in lanes]
        hooks = StackHooks(self, trials)
        at = beginnings_of(self.setup, command.name, lanes, hooks.warn)

        def save(trained: Mapping[int, StackedLane]) -> None:
            """Commit all lanes of this rank, of which some are in a training."""
            self.stopwatch.mark("save")
            others = {n: (trials[n], each.progress, state_of(each)) for n, each in enumerate(at) if each is not None}
            ordered = [lane for _, lane in sorted({**others, **trained}.items())]
            rank_of = (self.worker.rank, self.worker.world_size)
            save_lanes(self.setup.paths, command.name, rank_of, self.setup.attempt, ordered)
            hooks.note_saved()

        turn, num_parameters = next_to_train(at, command.epoch), 0
        if not turn[0]:
            save({})
        while turn[0] and not hooks.must_end:
            num_parameters = self._train_some(trials, at, turn, hooks, save)
            turn = next_to_train(at, command.epoch)
        ledger = self._ledger(self._meter.read(), 1, len(lanes), self.worker.world_size)
        return [replace(state, ledger=ledger) for state in states_at(at, num_parameters)], hooks.was_stopped

    def _train_some(
        self,
        trials: Sequence[TrialSpec],
        at: list[Checkpoint | None],
        turn: tuple[list[int], int],
        hooks: StackHooks,
        save: Callable[[Mapping[int, StackedLane]], None],
    ) -> int:
        """Bring lanes that stand at one place further, and note in `at` where they stand then.

        Returns the number of parameters of a lane.
        """
        from bigray.training.stack import StackedTraining
        from bigray.training.stack_checkpoint import as_checkpoint, lanes_of

        numbers, epoch = turn
        hooks.lanes = tuple(trials[number] for number in numbers)
        data = self._process.data_of(hooks.lanes[0])  # of one fold: see `stack_key`
        training = StackedTraining(hooks.lanes, data, self.setup.num_outputs, self.worker, hooks)
        training.restore([at[number] for number in numbers])
        for number in numbers:
            at[number] = None  # what the training holds
        while True:
            training.train_to(epoch)
            trained = dict(zip(numbers, lanes_of(training), strict=True))
            save(trained)
            if hooks.must_end or training.is_done(epoch):
                break
        is_last = len(numbers) == len(at)  # nobody goes on with the tensors
        for number, lane in trained.items():
            at[number] = Checkpoint(lane[1], {}, is_record=True) if is_last else as_checkpoint(lane)
        return training.num_parameters

    def _probe(self, command: ProbeStack) -> Probe:
        """Every rank measures at the same time; rank 0's answer counts."""
        from bigray.training.stack import why_not_stacked
        from bigray.training.stack_probe import MOST_ALONE_S, time_steps_alone, time_steps_stacked

        self._begin_clean(command.trial)
        self.heartbeat.tick("loading")
        trial, data, outputs = command.trial, self._process.data_of(command.trial), self.setup.num_outputs
        why_not: str | None = self.from_rank_0(
            lambda: why_not_stacked(trial, data, outputs, self.worker.device, command.num_lanes)
        )
        if why_not is not None:
            return Probe(0.0, None, why_not)
        measured_s = time_steps_alone(trial, data, outputs, self.worker)
        alone_s: float = self.from_rank_0(lambda: measured_s)
        if alone_s > MOST_ALONE_S:
            return Probe(alone_s, None, f"a step alone takes {alone_s:.2g} s: too large a model to gain by it")
        return Probe(alone_s, time_steps_stacked(trial, data, outputs, self.worker, command.num_lanes))

    def _export(self, command: ExportBundle) -> Any:
        self._begin_clean(command.trial)
        if not self.is_first:
            return None
        self.heartbeat.tick("export")
        if command.stack is not None:
            save_as_own(self.setup, command.stack, command.trial)
        data = self._process.data_of(command.trial)
        exported = export_bundle(
            self.setup.paths,
            command.trial,
            command.manifest,
            data.x_val,
            golden_rows=command.golden_rows,
            targets=data.y_val,
            holdout=command.holdout,
            on_progress=lambda: self.heartbeat.tick("export"),
        )
        if exported.why_no_onnx:
            text = f"no model.onnx, the endpoint will load the factory: {exported.why_no_onnx}"
            self.push("warning", command.trial, {"text": text})
        return exported


def _share_a_batch_size(one: TrialSpec, other: TrialSpec) -> bool:
    return one.training.global_batch_size == other.training.global_batch_size


def free_memory(device: torch.device) -> None:
    """Give back what a trial held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def recoverable_step(training: TrialTraining | LoopTraining) -> int | None:
    """The step up to which this process's memory of a trial is whole after a loss; None where it may not be.

    A step cut short leaves parameters and optimizer as they were, but not buffers such as batch norm's. The weights of
    the best epoch are with rank 0 alone. On a GPU nothing raises inside a step: a collective that is broken off leaves
    whatever is in its memory, and the step is taken with it.
    """
    if isinstance(training, LoopTraining) or training.has_buffers or training.worker.device.type != "cpu":
        return None
    if training.progress.best_metrics and training.best_weights is None:
        return None
    return training.progress.step


def to_checkpoint(snapshot: Snapshot) -> Checkpoint:
    """A snapshot as it would be read back from storage, for a peer."""
    files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in snapshot.tensors.items()}
    return Checkpoint(snapshot.progress, files)


def is_about_a_peer(error: Exception) -> bool:
    """Whether a collective broke because another rank went away: that rank's own story is the one to tell, if any.

    Gloo raises a plain RuntimeError for it, which only its text gives away; and where NCCL was broken off there is no
    process group any more.
    """
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _ABOUT_A_PEER)


def _as_failure(error: Exception) -> BigrayError:
    """The error as the driver is to raise it: bigray's own as they are, others in one line with the user's place."""
    if isinstance(error, StorageError | OutOfMemory):
        return error
    return TrainingFailed(_describe(error))


def _describe(error: Exception) -> str:
    """The error in one line, with the place in the user's code where there is one."""
    if isinstance(error, BigrayError):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    first_line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first_line}{place}"
