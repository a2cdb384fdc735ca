"""`cluster/slurm/bigray.sbatch` really run by Slurm: a controller and two nodes, each a host of its own."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigray.journal import read_journal
from bigray.loading import load_job
from bigray.paths import RunPaths
from bigray.storage import open_storage
from tests.hosts.hosts import REPOSITORY, Host, Network
from tests.hosts.runs import write_job
from tests.integration.jobs import last_weights, weights_of_one_process
from tests.waiting import wait_until

SCRIPT = REPOSITORY / "cluster" / "slurm" / "bigray.sbatch"
MUNGE_FOLDER = "/run/munge"
"""Where Slurm looks for the socket of munge, which is of one host."""
NODES = ("node1", "node2")
WHOLE_NODE = f"cpus_per_worker = {os.cpu_count()}\n"
"""At the end of a job file: one worker on each node, which has the machine's CPUs."""
missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (slurm-wlm, munge)"),
]


class Slurm:
    """A controller on the host "control" and a node on each of two more."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.control = network.add("control")
        for name in NODES:
            network.add(name, shared_memory_mb=12_000)
        self.settings = network.folder / "slurm" / "slurm.conf"
        self.settings.parent.mkdir()
        self._write_settings()
        self._key = self.settings.parent / "munge.key"
        self._key.touch(mode=0o600)
        self._key.write_bytes(os.urandom(128))
        for host in network.hosts.values():
            self.start_munge(host)
        self.control.start("slurmctld", ["slurmctld", "-D", "-i"], environment=self.environment)
        for name in NODES:
            self.start_node(network.hosts[name])
        wait_until(self._all_are_idle, f"the nodes do not come up: {self.logs()}", 60)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.settings)}

    def _write_settings(self) -> None:
        folder, hosts = self.settings.parent, self.network.hosts
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={hosts[name].address} CPUs={os.cpu_count()} RealMemory=2000 State=UNKNOWN"
            for name in NODES
        )
        self.settings.write_text(f"""
ClusterName=bigray
SlurmctldHost=control({hosts["control"].address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdTimeout=20
KillWait=30
{nodes}
PartitionName=main Nodes={",".join(NODES)} Default=YES MaxTime=INFINITE State=UP
""")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()

    def start_munge(self, host: Host) -> None:
        files = [f"--{kind}-file={host.folder}/munge.{kind}" for kind in ("pid", "seed", "log")]
        socket = f"{MUNGE_FOLDER}/munge.socket.2"
        command = ["munged", "--foreground", "--force", f"--key-file={self._key}", f"--socket={socket}", *files]
        host.start("munged", command)
        wait_until(host.path(socket).exists, f"{host.name}: no munge: {host.log('munged')}")

    def start_node(self, host: Host) -> None:
        host.start("slurmd", ["slurmd", "-D"], environment=self.environment)

    def run(self, *command: str, folder: Path = REPOSITORY) -> str:
        done = self.control.run(command, environment=self.environment, folder=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _all_are_idle(self) -> bool:
        done = self.control.run(["sinfo", "--noheader", "--format=%D %t"], environment=self.environment)
        return done.stdout.split() == ["2", "idle"]

    def logs(self) -> str:
        """What Slurm itself has said; for messages."""
        files = sorted(self.settings.parent.glob("*.log"))
        return "\n".join(f"{file.name}: {file.read_text()[-2000:]}" for file in files)

    def submit(self, folder: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Send the script, from a folder that all hosts see; the job's number."""
        folder.mkdir(exist_ok=True)
        told = self.run("sbatch", "--parsable", *options, str(SCRIPT), *arguments, folder=folder)
        return told.strip().split(";")[0]

    def state(self, job: str) -> str:
        told = self.run("scontrol", "--oneliner", "show", "job", job)
        return str(re.findall(r"JobState=(\S+)", told)[0])

    def exit_code(self, job: str) -> int:
        told = self.run("scontrol", "--oneliner", "show", "job", job)
        return int(re.findall(r"ExitCode=(\d+):", told)[0])

    def wait_for(self, job: str, *states: str, timeout_s: float = 300.0) -> str:
        deadline = time.monotonic() + timeout_s
        while (state := self.state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}: {self.logs()}"
            time.sleep(0.5)
        return state

    def assert_nothing_is_left(self) -> None:
        hosts = [self.network.hosts[name] for name in NODES if name in self.network.hosts]
        left = "Ray goes on after the job"
        wait_until(lambda: not any("raylet" in str(host.processes()) for host in hosts), left, 60)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with Network(tmp_path / "network", own=(MUNGE_FOLDER,)) as network:
        yield Slurm(network)


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    if not list(folder.glob("runs/*-*/journal")):
        return []
    (run,) = folder.glob("runs/*-*")
    return [event for event in read_journal(RunPaths(open_storage(str(run)), run.name)) if event["kind"] == kind]


def assert_weights_are_those_of_one_process(folder: Path) -> None:
    (run,) = folder.glob("runs/*-*")
    alone = weights_of_one_process(load_job(folder / "job.toml"))
    together = last_weights(RunPaths(open_storage(str(run)), run.name), "paced")
    assert all((alone[name].numpy() == together[name]).all() for name in alone)


def output(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.rglob("*.out")) + sorted(folder.rglob("*.log")))


def test_the_script_trains_on_two_nodes_and_leaves_nothing(slurm: Slurm, tmp_path: Path) -> None:
    job_file = write_job(tmp_path, workers="2", epochs=5)
    job_file.write_text(job_file.read_text() + WHOLE_NODE)
    submitted = tmp_path / "submitted"
    job = slurm.submit(submitted, "train", str(job_file))
    state = slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert state == "COMPLETED", output(submitted)
    assert_weights_are_those_of_one_process(tmp_path)
    slurm.assert_nothing_is_left()


def test_bigrays_exit_code_is_the_jobs(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path / "submitted", "train", str(tmp_path / "no_such_job.toml"))
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "FAILED"
    assert slurm.exit_code(job) == 2, output(tmp_path / "submitted")
    slurm.assert_nothing_is_left()


def test_a_job_whose_time_is_up_is_queued_again_and_goes_on_from_storage(slurm: Slurm, tmp_path: Path) -> None:
    """Two minutes before the end of four it is told."""
    job_file = write_job(tmp_path, workers="2", epochs=160)
    job_file.write_text(job_file.read_text() + WHOLE_NODE)
    submitted = tmp_path / "submitted"
    job = slurm.submit(submitted, "train", str(job_file), options=("--time=4",))
    wait_until(lambda: bool(events(tmp_path, "epoch")), f"nothing is trained: {output(submitted)}", 120)
    wait_until(lambda: "queued again" in output(submitted), "it is not queued again", 240)
    (tmp_path / "pace").write_text("0")
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", output(submitted)
    assert events(tmp_path, "resumed"), "it has started anew"
    assert_weights_are_those_of_one_process(tmp_path)
    slurm.assert_nothing_is_left()


def test_a_node_that_is_lost_costs_no_more_than_the_steps_since_its_last_checkpoint(
    slurm: Slurm, tmp_path: Path
) -> None:
    job_file = write_job(tmp_path, workers="[1, 2]", epochs=400)
    job_file.write_text(job_file.read_text() + WHOLE_NODE)
    submitted = tmp_path / "submitted"
    job = slurm.submit(submitted, "train", str(job_file))
    wait_until(lambda: len(events(tmp_path, "epoch")) > 5, f"nothing is trained: {output(submitted)}", 120)
    lost = slurm.network.hosts["node2"]
    slurm.network.kill(lost, in_silence=True)
    slurm.wait_for(job, "PENDING")
    again = slurm.network.boot(lost)
    slurm.start_munge(again)
    slurm.start_node(again)
    (tmp_path / "pace").write_text("0")
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", output(submitted)
    assert_weights_are_those_of_one_process(tmp_path)
    slurm.assert_nothing_is_left()
