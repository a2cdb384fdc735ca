"""Training and a sweep on an object store, through faults and on after an outage: real Ray, a real S3 server.

With BIGRAY_FULL=1 only: an outage has to last longer than a run is patient.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from bigray.bundle import ModelBundle
from bigray.errors import StorageError
from bigray.journal import read_journal
from bigray.paths import RunPaths
from bigray.report import find_run
from bigray.results import Leaderboard
from bigray.serve import runner
from bigray.serve.config import load_serve
from bigray.specs import JobSpec
from bigray.storage import open_storage
from bigray.storage_retry import PATIENCE
from bigray.training.commands import Event
from bigray.training.runner import train
from bigray.tuning.runner import tune
from bigray.workflow import Asked, check_holdout, request_of
from tests.full_size import full_size
from tests.integration.jobs import last_weights, make_job
from tests.integration.s3_faults import FaultyProxy, moto_server
from tests.integration.test_tuning import make_search

KEY, SECRET = "PLANTEDKEY0123456789", "planted/Secret+Key0123456789abcdefghij"
OUTAGE_S = 60.0
"""Shorter than a run is patient."""
EPOCHS = 40
pytestmark = [
    full_size,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    """Before Ray, whose workers have the credentials from this process's environment."""
    with pytest.MonkeyPatch.context() as patch, moto_server() as upstream, FaultyProxy(upstream) as proxy:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield proxy


@pytest.fixture(autouse=True)
def _healthy(proxy: FaultyProxy, four_cpu_ray: None) -> Iterator[None]:
    proxy.heal()
    yield
    proxy.heal()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s3")


def _job(folder: Path, proxy: FaultyProxy | None, prefix: str) -> JobSpec:
    job = make_job(folder, epochs=EPOCHS, checkpoint_every_s=0.2)
    storage = str(folder / prefix) if proxy is None else f"s3://bucket/{prefix}{proxy.options}"
    return job.model_copy(update={"storage": storage})


@pytest.fixture(scope="module")
def undisturbed(folder: Path, proxy: FaultyProxy, four_cpu_ray: None) -> str:
    """Version of the model that the job gives on a local disk: a hash of its weights."""
    return ModelBundle.load(train(_job(folder, None, "local")).bundle).version


class At:
    """Does something once, when the job has come to an epoch."""

    def __init__(self, epoch: int, act: object) -> None:
        self.epoch, self.act, self.is_done = epoch, act, False

    def __call__(self, event: Event) -> None:
        if event.kind == "epoch" and event.values["epoch"] >= self.epoch and not self.is_done:
            self.is_done = True
            assert callable(self.act)
            threading.Thread(target=self.act, daemon=True).start()


def _version(board: Leaderboard) -> str:
    return ModelBundle.load(board.bundle.uri).version


def test_a_busy_store_changes_nothing(proxy: FaultyProxy, folder: Path, undisturbed: str) -> None:
    proxy.faults.busy_share, proxy.faults.lost_share = 0.2, 0.02

    board = train(_job(folder, proxy, "busy"))

    proxy.heal()
    assert _version(board) == undisturbed
    assert proxy.num_struck > 0
    paths, document = find_run(board.run_uri)
    assert document["run"] == paths.run_id
    assert last_weights(RunPaths(open_storage(board.run_uri), board.run_id), board.winner.trial_id)


@pytest.mark.parametrize("fault", ["stall", "outage"])
def test_a_minute_without_the_store_is_waited_for(
    proxy: FaultyProxy, folder: Path, undisturbed: str, fault: str
) -> None:
    act = proxy.faults.stall if fault == "stall" else proxy.outage

    board = train(_job(folder, proxy, fault), listener=At(3, lambda: act(OUTAGE_S)))

    assert _version(board) == undisturbed


def test_a_long_outage_ends_the_run_and_the_same_command_goes_on(
    proxy: FaultyProxy, folder: Path, undisturbed: str
) -> None:
    job = _job(folder, proxy, "long")
    with pytest.raises(StorageError) as caught:
        train(job, listener=At(3, lambda: proxy.outage(PATIENCE.total_s * 3)))
    assert caught.value.exit_code == 4
    assert len(str(caught.value).splitlines()) == 1

    proxy.heal()
    board = train(job)

    assert _version(board) == undisturbed
    paths = RunPaths(open_storage(board.run_uri), board.run_id)
    assert {event["attempt"] for event in read_journal(paths)} == {1, 2}


def test_a_sweep_on_a_busy_store_ranks_as_on_a_disk(proxy: FaultyProxy, folder: Path) -> None:
    search = make_search(trials=6)
    local = tune(_job(folder, None, "local-sweep"), search)
    proxy.faults.busy_share = 0.2

    board = tune(_job(folder, proxy, "sweep"), search)

    assert {trial.trial_id for trial in board.trials} == {trial.trial_id for trial in local.trials}
    assert ModelBundle.load(board.bundle.uri).manifest.origin.trial


def test_the_winner_is_served_from_a_busy_store_and_answers_as_offline(proxy: FaultyProxy, folder: Path) -> None:
    job, spec = _job(folder, proxy, "served"), load_serve("serve/local.yaml").with_port(0)
    board = train(job)
    proxy.faults.busy_share = 0.2
    try:
        deployment = runner.deploy(board.bundle.uri, spec)
        check = check_holdout(board.bundle.uri, request_of(Asked(job, None, None)).dataset, deployment.url, spec)
    finally:
        runner.shutdown()
    assert check is not None
    assert check.num_equal == check.num_rows


def test_no_key_is_in_what_was_stored_logged_or_told_of_a_job(proxy: FaultyProxy, folder: Path) -> None:
    """After the runs above; Ray's own folder of this session included."""
    import ray
    from ray._private.worker import global_worker

    train(_job(folder, proxy, "keys"))
    store = open_storage(f"s3://bucket/{proxy.options}").filesystem
    found = store.get_file_info(fs.FileSelector("bucket", recursive=True))
    stored = [info.path for info in found if info.type == fs.FileType.File]
    logs = [path for path in Path(global_worker.node.get_session_dir_path()).rglob("*") if path.is_file()]

    assert len(stored) > 5
    for secret in (KEY.encode(), SECRET.encode()):
        assert not [path for path in stored if secret in store.open_input_file(path).read()]
        assert not [path for path in logs if secret in path.read_bytes()]
        assert secret.decode() not in str(ray._private.state.state.job_table())
