from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bigray.data.dataset import TrainingArrays
from bigray.errors import SpecError, TrainingFailed
from bigray.models import build_model
from bigray.specs import TrialSpec
from bigray.training import context as context_module
from bigray.training.checkpoint import Checkpoint, Snapshot, SnapshotBuffers
from bigray.training.context import LoopContext, LoopTraining, make_training
from bigray.training.loop import TrialTraining, Wish, Worker
from bigray.training.tensor_files import pack_tensors

MakeTrial = Callable[..., TrialSpec]
Loop = Callable[[LoopContext], object]
ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
METRIC = {"metric": "val_f1", "metric_mode": "max"}


@dataclass
class _Hooks:
    """What a worker does for a loop, with checkpoints in memory."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    wishes: dict[int, Wish] = field(default_factory=dict)
    """Number of the call of `exchange` -> what it answers."""
    phases: list[str] = field(default_factory=list)

    def tick(self, phase: str) -> None:
        self.phases.append(phase)

    def exchange(self, step: int) -> Wish:
        return self.wishes.get(step, Wish())

    def on_epoch(self, report: dict[str, Any]) -> None:
        self.reports.append(report)

    def on_checkpoint(self, take: Callable[[SnapshotBuffers], Snapshot]) -> None:
        snapshot = take(SnapshotBuffers())
        files = {f"{stem}.safetensors": pack_tensors(tensors) for stem, tensors in snapshot.tensors.items()}
        self.checkpoints.append(Checkpoint(snapshot.progress, files))

    def restore_last(self) -> Checkpoint | None:
        by_step = {checkpoint.progress.step: checkpoint for checkpoint in self.checkpoints}  # a step's newest counts
        return by_step[max(by_step)] if by_step else None

    def warn(self, text: str) -> None:
        raise AssertionError(text)


@dataclass
class _Job:
    """A trial with a loop of its own, trained as a worker does it."""

    make_trial: MakeTrial
    data: TrainingArrays
    hooks: _Hooks = field(default_factory=_Hooks)

    def begin(self, **settings: Any) -> LoopTraining:
        trial = self.make_trial(**{"loop": "my.mod:train", **METRIC, **settings})
        training = make_training(trial, self.data, 3, ALONE, self.hooks)
        assert isinstance(training, LoopTraining)
        return training

    def train(self, training: LoopTraining, epoch: int = 4) -> LoopTraining:
        before = training.progress
        training.train_to(epoch)
        if training.progress != before:
            self.hooks.on_checkpoint(training.snapshot)
        return training

    def resume(self, **settings: Any) -> LoopTraining:
        """In a new process, from what is on storage."""
        training = self.begin(**settings)
        if (checkpoint := self.hooks.restore_last()) is not None:
            training.restore(checkpoint)
        return training


@pytest.fixture
def job(make_trial: MakeTrial, blobs: TrainingArrays) -> _Job:
    return _Job(make_trial, blobs)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Loop], None]:
    """Make a function the job's loop."""

    def use(loop: Loop) -> None:
        monkeypatch.setattr(context_module, "_load_loop", lambda path: loop)

    return use


def _step(context: LoopContext, module: torch.nn.Module, optimizer: Any, x: Any, y: Any) -> None:
    optimizer.zero_grad()
    context.mean(functional.cross_entropy(module(x), y, reduction="none")).backward()
    optimizer.step()


def _whole_loop(context: LoopContext, stop_after: int | None = None) -> None:
    """A plain loop that resumes: SGD with momentum, and a value to remember."""
    module = context.prepare(context.build_model())
    optimizer = torch.optim.SGD(module.parameters(), lr=context.spec.lr, momentum=0.9)
    seen = 0
    saved = context.restore()
    if saved is not None:
        module.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.extra["optimizer"])
        seen = saved.extra["seen"]
    for epoch in context.remaining_epochs:
        for x, y in context.batches(epoch):
            _step(context, module, optimizer, x, y)
            seen += len(x)
        with torch.inference_mode():
            outputs = module(torch.from_numpy(context.data.x_val))
        accuracy = (outputs.argmax(1).numpy() == context.data.y_val).mean()
        context.report({"val_f1": accuracy, "seen": seen}, epoch=epoch, model=module)
        context.save(epoch=epoch, model=module, optimizer=optimizer, seen=seen)
        if context.should_stop() or epoch == stop_after:
            return


def test_a_loop_gets_what_the_job_file_says(job: _Job, use: Callable[[Loop], None], blobs: TrainingArrays) -> None:
    seen: list[LoopContext] = []

    def loop(context: LoopContext) -> None:
        seen.append(context)
        context.report({"val_f1": 0.5}, epoch=1, model=context.build_model())

    use(loop)
    job.train(job.begin(loop_params={"depth": 3}, lr=0.25, seed=7))
    (context,) = seen

    assert (context.rank, context.world_size, context.device.type) == (0, 1, "cpu")
    assert (context.params, context.spec.lr, context.spec.batch_size, context.seed) == ({"depth": 3}, 0.25, 16, 7)
    assert context.data is blobs
    assert (context.num_outputs, context.epochs) == (3, 4)


def test_make_training_takes_bigrays_loop_where_the_job_names_none(
    make_trial: MakeTrial, blobs: TrainingArrays
) -> None:
    assert isinstance(make_training(make_trial(), blobs, 3, ALONE, _Hooks()), TrialTraining)


def test_batches_are_those_of_bigrays_own_loop(job: _Job, use: Callable[[Loop], None], blobs: TrainingArrays) -> None:
    """Trained by its own few lines, a model ends with the bits that bigray's loop gives it."""
    hooks = _Hooks()
    plain = make_training(job.make_trial(optimizer="sgd", lr=0.05), blobs, 3, ALONE, hooks)
    assert isinstance(plain, TrialTraining)
    plain.train_to(4)

    def loop(context: LoopContext) -> None:
        module = context.prepare(context.build_model())
        optimizer = torch.optim.SGD(module.parameters(), lr=context.spec.lr)
        for epoch in context.remaining_epochs:
            for x, y in context.batches(epoch):
                _step(context, module, optimizer, x, y)
            context.report({"val_f1": epoch}, epoch=epoch, model=module)

    use(loop)
    training = job.train(job.begin(lr=0.05))

    assert training.best_weights is not None
    expected = plain.module.state_dict()
    for name, tensor in training.best_weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    assert training.progress.step == plain.progress.step


def test_an_epoch_holds_every_row_once_and_skip_leaves_out_its_first_batches(
    job: _Job, use: Callable[[Loop], None], blobs: TrainingArrays
) -> None:
    found: dict[str, Any] = {}

    def loop(context: LoopContext) -> None:
        found["all"] = [x.numpy() for x, _ in context.batches(2)]
        found["step"] = context.step
        found["rest"] = [x.numpy() for x, _ in context.batches(2, skip=3)]
        context.report({"val_f1": 0.5}, epoch=2, model=context.build_model())

    use(loop)
    job.train(job.begin())

    rows = np.concatenate(found["all"])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, blobs.x_train))
    assert [len(x) for x in found["all"]] == [16, 16, 16, 16, 6]
    assert found["step"] == 10, "five steps of the first epoch and five of this one"
    assert [x.tobytes() for x in found["rest"]] == [x.tobytes() for x in found["all"][3:]]


def test_progress_holds_the_best_report_and_the_trial_is_finished(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        module = context.build_model()
        for epoch, value in zip(context.remaining_epochs, [0.2, 0.8, 0.5, 0.6], strict=True):
            for _ in context.batches(epoch):
                pass
            with torch.no_grad():
                next(module.parameters()).fill_(epoch)
            context.report({"val_f1": value, "train_loss": 1.0}, epoch=epoch, model=module)

    use(loop)
    training = job.train(job.begin())
    progress, checkpoint = training.progress, job.hooks.checkpoints[-1]

    assert (progress.epoch, progress.step, progress.ended) == (4, 20, "finished")
    assert (progress.best_epoch, progress.best_step, progress.best_metrics["val_f1"]) == (2, 10, 0.8)
    assert progress.improvements == ((1, 0.2), (2, 0.8))
    assert checkpoint.progress == progress
    best = checkpoint.tensors(checkpoint.best_file())
    assert best is not None
    assert best["1.weight"].unique().tolist() == [2.0], "the weights of the best report, not of the last"


def test_a_report_tells_what_the_live_table_shows(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        for epoch in context.remaining_epochs:
            for _ in context.batches(epoch):
                pass
            context.report({"val_f1": 0.5, "train_loss": 2.0}, epoch=epoch, model=context.build_model())

    use(loop)
    job.train(job.begin(), 2)
    report = job.hooks.reports[-1]

    assert (report["epoch"], report["step"], report["train_loss"], report["best_epoch"]) == (2, 10, 2.0, 1)
    assert report["metrics"] == {"val_f1": 0.5, "train_loss": 2.0}
    assert report["samples_per_s"] > 0
    assert report["epoch_s"] > 0


def test_the_reports_of_other_ranks_do_not_count(job: _Job) -> None:
    training = job.begin()
    training.worker = Worker(rank=1, world_size=2, device=torch.device("cpu"))
    context = LoopContext(training, 4)
    context.report({"anything": 1.0}, epoch=1)
    context.save(epoch=1, model=context.build_model())

    assert job.hooks.reports == []
    assert job.hooks.checkpoints == []


def test_a_loop_resumes_from_what_it_saved_as_if_it_had_not_been_broken_off(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    use(_whole_loop)
    whole = job.train(job.begin())
    job.hooks = _Hooks()

    def broken_off(context: LoopContext) -> None:
        _whole_loop(context, stop_after=2)
        raise RuntimeError("connection closed by peer")

    use(broken_off)
    with pytest.raises(RuntimeError, match="closed by peer"):
        job.train(job.begin())
    use(_whole_loop)
    resumed = job.train(job.resume())

    assert resumed.progress == whole.progress
    assert resumed.best_weights is not None
    assert whole.best_weights is not None
    assert all(torch.equal(tensor, whole.best_weights[name]) for name, tensor in resumed.best_weights.items())
    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 3, 4]
    assert job.hooks.reports[-1]["metrics"]["seen"] == 4 * 70


def test_at_each_rung_of_a_sweep_the_loop_is_called_again_and_goes_on(job: _Job, use: Callable[[Loop], None]) -> None:
    use(_whole_loop)
    training = job.begin()
    states = []
    for rung in (1, 2, 4):
        states.append(job.train(training, rung).progress)

    assert [(state.epoch, state.ended) for state in states] == [(1, None), (2, None), (4, "finished")]
    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 3, 4]


def test_a_loop_that_never_saves_starts_again_at_the_next_rung(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        assert context.restore() is None
        for epoch in context.remaining_epochs:
            context.report({"val_f1": epoch / 10}, epoch=epoch, model=context.build_model())

    use(loop)
    training = job.train(job.begin(), 2)
    assert training.progress.ended is None
    job.train(training, 4)

    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 1, 2, 3, 4]
    assert training.progress.improvements == ((1, 0.1), (2, 0.2), (3, pytest.approx(0.3)), (4, 0.4))


def test_what_was_reported_after_the_last_save_is_kept_with_the_state_that_was_saved(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    """At a rung's end the checkpoint has the best weights of epoch 3, and the loop's own state of epoch 1."""
    found: list[Any] = []

    def loop(context: LoopContext) -> None:
        found.append(context.restore())
        module = context.build_model()
        for epoch in context.remaining_epochs:
            with torch.no_grad():
                next(module.parameters()).fill_(epoch)
            context.report({"val_f1": epoch / 10}, epoch=epoch, model=module)
            if epoch == 1:
                context.save(epoch=epoch, model=module, note="of epoch 1")

    use(loop)
    job.train(job.begin(), 3)
    checkpoint = job.hooks.checkpoints[-1]
    best = checkpoint.tensors(checkpoint.best_file())
    assert (checkpoint.progress.best_epoch, checkpoint.progress.epoch) == (3, 3)
    assert best is not None
    assert best["1.weight"].unique().tolist() == [3.0]
    training = job.train(job.resume(), 4)

    assert found[0] is None
    assert (found[1].epoch, found[1].extra) == (1, {"note": "of epoch 1"})
    assert found[1].model["1.weight"].unique().tolist() == [1.0]
    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 3, 2, 3, 4]
    assert training.progress.ended == "finished"


def test_a_wish_to_stop_ends_the_call_but_not_the_trial(job: _Job, use: Callable[[Loop], None]) -> None:
    use(_whole_loop)
    job.hooks.wishes = {2: Wish(save=True, stop=True)}
    training = job.train(job.begin())
    assert (training.progress.epoch, training.progress.ended) == (2, None)
    job.hooks.wishes = {}
    resumed = job.train(job.resume())

    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 3, 4]
    assert resumed.progress.ended == "finished"


def test_a_loop_that_is_stopped_before_its_first_report_has_done_nothing_wrong(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    use(lambda context: context.should_stop())
    job.hooks.wishes = {1: Wish(stop=True)}
    training = job.train(job.begin())

    assert training.progress.ended is None
    assert job.hooks.checkpoints == []


def test_a_due_checkpoint_stays_due_until_it_is_saved(job: _Job) -> None:
    job.hooks.wishes = {2: Wish(save=True)}
    context = LoopContext(job.begin(), 4)
    due = []
    for _ in range(3):
        assert not context.should_stop()
        due.append(context.save_is_due)
    context.save(epoch=1, model=context.build_model())
    context.should_stop()

    assert [*due, context.save_is_due] == [False, True, True, False]


def test_a_wish_to_rest_is_followed_after_the_next_report(job: _Job, use: Callable[[Loop], None]) -> None:
    """Not in the middle of the epoch, where the loop asks after each batch; and the trial is not over."""
    asked: list[tuple[int, bool]] = []

    def loop(context: LoopContext) -> None:
        context.restore()
        for epoch in context.remaining_epochs:
            for _ in context.batches(epoch):
                asked.append((epoch, context.should_stop()))
                assert not asked[-1][1]
            context.report({"val_f1": 0.1 * epoch}, epoch=epoch, model=context.build_model())
            context.save(epoch=epoch, model=context.build_model())
            if context.should_stop():
                return

    use(loop)
    job.hooks.wishes = {number: Wish(rest=True) for number in range(8, 20)}  # within the second epoch's batches
    training = job.train(job.begin(epochs=4))

    assert (training.progress.epoch, training.progress.ended) == (2, None)
    assert len(asked) == 10
    job.hooks.wishes = {}
    assert job.train(training).progress.ended == "finished"


def test_the_rate_of_a_loop_of_ones_own_follows_the_batch_too(job: _Job, use: Callable[[Loop], None]) -> None:
    seen: list[float] = []

    def loop(context: LoopContext) -> None:
        seen.append(context.lr)
        context.report({"val_f1": 0.5}, epoch=1, model=context.build_model())

    use(loop)
    job.train(job.begin(epochs=1, lr=0.01, lr_scaling="sqrt", lr_batch_size=4))
    assert seen == [0.01 * 2.0]


def test_patience_is_told_by_should_stop_and_ends_the_trial_early(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        for epoch in context.remaining_epochs:
            context.report({"val_f1": -epoch}, epoch=epoch, model=context.build_model())
            if context.should_stop():
                return

    use(loop)
    training = job.train(job.begin(epochs=10, patience=3), 10)

    assert (training.progress.epoch, training.progress.ended) == (4, "stopped early")


def test_a_loop_that_ends_at_nan_has_diverged(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        context.report({"val_f1": math.nan}, epoch=1, model=context.build_model())

    use(loop)
    training = job.train(job.begin())

    assert (training.progress.ended, training.progress.metrics) == ("diverged", {})
    assert job.hooks.checkpoints[-1].tensors("model"), "a checkpoint has weights"


def test_a_save_gives_back_tensors_scalars_and_state_dicts(job: _Job, use: Callable[[Loop], None]) -> None:
    found: list[Any] = []

    def loop(context: LoopContext) -> None:
        if found:
            found.append(context.restore())
            return
        module = context.build_model()
        averaged = {name: tensor + 1 for name, tensor in module.state_dict().items()}
        context.report({"val_f1": 0.5}, epoch=1, model=module)
        context.save(epoch=1, step=77, model=module, averaged=averaged, best=0.25, rng=torch.get_rng_state())
        found.append((averaged, torch.get_rng_state(), module.state_dict()))

    use(loop)
    training = job.train(job.begin(), 1)
    job.train(training, 4)
    (averaged, rng, weights), saved = found

    assert (saved.epoch, saved.step, saved.extra["best"]) == (1, 77, 0.25)
    assert torch.equal(saved.extra["rng"], rng)
    assert all(torch.equal(saved.extra["averaged"][name], tensor) for name, tensor in averaged.items())
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in weights.items())


def test_the_last_checkpoint_is_the_one_of_the_highest_step(job: _Job, use: Callable[[Loop], None]) -> None:
    """A loop may save at a later step than it reports: what ended the trial has to be found first all the same."""

    def loop(context: LoopContext) -> None:
        module = context.build_model()
        context.report({"val_f1": 0.5}, epoch=4, step=40, model=module)
        context.save(epoch=4, step=50, model=module)

    use(loop)
    job.train(job.begin())

    assert job.hooks.checkpoints[-1].progress.step == 50
    assert job.hooks.checkpoints[-1].progress.ended == "finished"
    assert job.hooks.checkpoints[-1].progress.best_step == 40


def test_a_save_after_the_best_report_gives_its_weights_too(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        for epoch in context.remaining_epochs:
            context.report({"val_f1": 1 / epoch}, epoch=epoch)
            context.save(epoch=epoch, model=context.build_model())

    use(loop)
    training = job.train(job.begin())

    assert training.progress.best_epoch == 1
    assert training.best_weights


def test_the_best_weights_are_not_written_twice_where_they_are_the_saved_ones(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    use(_whole_loop)
    job.train(job.begin())
    best_epochs = [epoch for epoch, _ in job.hooks.checkpoints[-1].progress.improvements]

    for checkpoint in job.hooks.checkpoints[:-1]:
        is_best = checkpoint.progress.epoch in best_epochs
        assert ("best.safetensors" in checkpoint.files) == (not is_best)


def test_training_that_ended_does_not_call_the_loop_again(job: _Job, use: Callable[[Loop], None]) -> None:
    use(_whole_loop)
    job.train(job.begin())
    use(lambda context: pytest.fail("called"))
    training = job.train(job.resume())

    assert training.progress.ended == "finished"


def test_after_a_lost_peer_the_loop_is_called_again_from_its_last_checkpoint(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    use(lambda context: _whole_loop(context, stop_after=2))
    training = job.begin()
    training.train_to(3)
    training.rebuild(ALONE)
    assert training.progress.epoch == 0, "what was not saved is forgotten, on every rank alike"
    last = job.hooks.restore_last()
    assert last is not None
    training.restore(last)
    use(_whole_loop)
    job.train(training)

    assert [report["epoch"] for report in job.hooks.reports] == [1, 2, 3, 4]


def test_the_random_numbers_of_a_loop_are_those_of_its_seed(job: _Job, use: Callable[[Loop], None]) -> None:
    drawn: list[tuple[float, float]] = []

    def loop(context: LoopContext) -> None:
        drawn.append((np.random.random(), torch.rand(()).item()))
        context.report({"val_f1": 0.5}, epoch=1, model=context.build_model())

    use(loop)
    for seed in (1, 1, 2):
        job.hooks = _Hooks()
        job.train(job.begin(seed=seed))

    assert drawn[0] == drawn[1] != drawn[2]


def test_a_loop_leaves_the_number_of_threads_as_it_was(job: _Job, use: Callable[[Loop], None]) -> None:
    def loop(context: LoopContext) -> None:
        torch.set_num_threads(2)
        context.report({"val_f1": 0.5}, epoch=1, model=context.build_model())

    use(loop)
    job.train(job.begin())

    assert torch.get_num_threads() == 1


def test_weights_are_taken_from_inside_what_is_wrapped_around_the_module(
    job: _Job, use: Callable[[Loop], None]
) -> None:
    def loop(context: LoopContext) -> None:
        context.report({"val_f1": 0.5}, epoch=1, model=torch.compile(context.build_model(), backend="eager"))

    use(loop)
    training = job.train(job.begin())

    assert training.best_weights is not None
    module = build_model("bigray.models:mlp", {"hidden": [8]}, (4,), 3)
    module.load_state_dict(training.best_weights)


def _no_report(context: LoopContext) -> None:
    pass


def _no_metric(context: LoopContext) -> None:
    context.report({"val_loss": 0.1, "lr": 0.5}, epoch=1)


def _no_number(context: LoopContext) -> None:
    context.report({"val_f1": "high"}, epoch=1)  # type: ignore[dict-item]


def _no_weights(context: LoopContext) -> None:
    context.report({"val_f1": 0.5}, epoch=1)


def _late_save(context: LoopContext) -> None:
    context.report({"val_f1": 0.5}, epoch=1)
    context.report({"val_f1": 0.4}, epoch=2)
    context.save(epoch=2, model=context.build_model())  # not those of epoch 1: a resumed trial would export them


def _other_model(context: LoopContext) -> None:
    context.report({"val_f1": 0.5}, epoch=1, model=torch.nn.Linear(4, 3))


def _epoch_zero(context: LoopContext) -> None:
    list(context.batches(0))


def _pickle(context: LoopContext) -> None:
    context.save(epoch=1, model=context.build_model(), callback=len)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (_no_report, r"loop 'my\.mod:train' returned without a report; call context\.report\(\.\.\.\) with 'val_f1'$"),
        (_no_metric, r"loop 'my\.mod:train': the report of epoch 1 has no 'val_f1', .*; it has val_loss, lr\. "),
        (_no_number, r"the report of epoch 1 holds a value that is not a number: .*'high'"),
        (_no_weights, r"without the weights of its best report \(epoch 1\); call context\.report\(\.\.\., model="),
        (_late_save, r"loop 'my\.mod:train' saves without the weights of its best report \(epoch 1\); call"),
        (_other_model, r"model: '1\.bias' is absent, expected \(8,\) as 'bigray\.models:mlp' makes it"),
        (_epoch_zero, r"context\.batches got epoch 0; epochs count from 1"),
        (_pickle, r"context\.save: extra\['callback'\] is a builtin_function_or_method; only tensors"),
    ],
)
def test_a_fault_of_the_loop_is_one_line(job: _Job, use: Callable[[Loop], None], loop: Loop, message: str) -> None:
    use(loop)
    with pytest.raises(TrainingFailed, match=message) as caught:
        job.train(job.begin())

    assert "\n" not in str(caught.value)


def test_a_loop_is_found_by_its_path(job: _Job, user_module: Callable[[str], str]) -> None:
    name = user_module(
        """
        def train(context):
            context.report({"val_f1": 0.75}, epoch=4, model=context.build_model())
        """
    )
    training = job.train(job.begin(loop=f"{name}:train"))
    assert training.progress.best_metrics == {"val_f1": 0.75}

    with pytest.raises(SpecError, match=rf"training\.loop: '{name}:trian': .*did you mean 'train'"):
        job.train(job.begin(loop=f"{name}:trian"))
