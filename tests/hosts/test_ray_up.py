"""`cluster/onprem.yaml` really brought up by `ray up` over ssh on three hosts: it trains, loses one, and comes down."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts.hosts import REPOSITORY, Host, Network
from tests.hosts.ray_hosts import RayHosts
from tests.hosts.runs import Run, wait_for_no_workers, workers_on, write_job
from tests.waiting import wait_until

SSHD = "/usr/sbin/sshd"
SHARED_MEMORY_MB = 12_000
"""Ray takes a third of the machine's memory for its object store where it is not told, and wants it to be there."""
missing = [tool for tool in (SSHD, "ssh", "ssh-keygen", "rsync") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)} (openssh-server, rsync)"),
]


@pytest.fixture
def desk(network: Network) -> Host:
    """Three hosts that take ssh, and a fourth on which `ray up` is run."""
    desk = network.add("desk")
    for name in ("head", "one", "two"):
        network.add(name, shared_memory_mb=SHARED_MEMORY_MB)
    _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key_of(desk))])
    for name in ("head", "one", "two"):
        be_at_home(network.hosts[name])
        take_ssh(network.hosts[name], key_of(desk).with_suffix(".pub"))
    return desk


def key_of(desk: Host) -> Path:
    return desk.home / "key"


def be_at_home(host: Host) -> None:
    """The home of the host's own also for those who look into the list of users, as ssh does for the `~` of a key."""
    name = pwd.getpwuid(os.geteuid()).pw_name
    users = host.home / "passwd"
    lines = Path("/etc/passwd").read_text().splitlines()
    fields = {line.split(":")[0]: line.split(":") for line in lines}
    fields[name][5] = str(host.home)
    users.write_text("".join(":".join(line) + "\n" for line in fields.values()))
    done = host.run(["mount", "--bind", str(users), "/etc/passwd"])
    assert done.returncode == 0, done.stderr


def take_ssh(host: Host, public_key: Path) -> None:
    """A server for ssh that lets the owner of a key in, to a home of this host's with bigray's environment in it."""
    Path("/run/sshd").mkdir(exist_ok=True)  # where it locks itself in
    environment = host.home / ".bigray"
    if not environment.exists():
        environment.symlink_to(sys.prefix)
        _checked(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.home / "host_key")])
    settings = host.home / "sshd_config"
    settings.write_text(f"""
ListenAddress {host.address}
HostKey {host.home}/host_key
PidFile none
AuthorizedKeysFile {public_key}
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
MaxSessions 100
SetEnv HOME={host.home} PYTHONPATH={REPOSITORY} RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=1
""")
    host.start("sshd", [SSHD, "-D", "-e", "-f", str(settings)])
    wait_until(lambda: "Server listening" in host.log("sshd"), host.log("sshd") or "sshd says nothing")


@pytest.fixture
def config(network: Network, desk: Host, tmp_path: Path) -> Path:
    """The shipped file with these hosts, this user and this key in it; what it says otherwise is what is tested."""
    settings: dict[str, Any] = yaml.safe_load((REPOSITORY / "cluster" / "onprem.yaml").read_text())
    addresses = {name: network.hosts[name].address for name in ("head", "one", "two")}
    settings["provider"] |= {"head_ip": addresses["head"], "worker_ips": [addresses["one"], addresses["two"]]}
    settings["auth"] |= {"ssh_user": pwd.getpwuid(os.geteuid()).pw_name, "ssh_private_key": str(key_of(desk))}
    (tmp_path / "dist").mkdir()  # the hosts have bigray's environment, so that nothing is installed from a wheel
    settings["file_mounts"]["~/bigray/dist"] = str(tmp_path / "dist")
    settings["metadata"] = {"storage": str(tmp_path / "runs")}
    file = tmp_path / "onprem.yaml"
    file.write_text(yaml.safe_dump(settings))
    ray_on(desk, "up", "--yes", "--no-config-cache", str(file))
    return file


def ray_on(desk: Host, *arguments: str) -> str:
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    done = desk.run(["ray", *arguments], timeout_s=300, environment=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def _checked(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def test_the_onprem_file_brings_up_three_hosts_that_train_lose_one_and_come_down(
    network: Network, desk: Host, config: Path, tmp_path: Path
) -> None:
    ray = RayHosts(network)
    try:
        ray.wait_for_nodes(3, timeout_s=200)
    except TimeoutError as late:
        raise TimeoutError(f"{late}\n{ray.autoscaler_log()[-8000:]}") from None
    assert "bigray" in ray_on(desk, "exec", str(config), "~/.bigray/bin/python -m bigray --help")

    job = write_job(tmp_path)
    job.write_text(job.read_text() + f"cpus_per_worker = {os.cpu_count()}\n")  # a whole host
    run = Run.start(ray, tmp_path, "train", str(job))
    run.wait_for("epoch", count=5)
    busy = [host for name in ("one", "two") if workers_on(host := network.hosts[name])]
    step = run.last_step()
    network.kill(busy[0], in_silence=True)
    print(f"\nfrom the loss of the host to training past step {step}: {run.seconds_until_past(step):.1f} s")
    run.let_run()
    run.board()
    run.assert_weights_are_those_of_one_process()
    wait_for_no_workers(list(network.hosts.values()))

    ray_on(desk, "down", "--yes", str(config))
    up = {name: host for name, host in network.hosts.items() if name != "desk"}
    still = "Ray goes on after ray down"
    wait_until(lambda: not any("raylet" in str(host.processes()) for host in up.values()), still, 60)
