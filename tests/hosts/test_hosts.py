"""The harness itself: what hosts have of their own, what can be done to them, and that nothing is left. No Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import links, processes
from tests.hosts.hosts import REPOSITORY, Host, Network, remove_leftovers
from tests.waiting import wait_until

PORT = 8000
FETCH = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3])) as asked:
    asked.sendall(b"GET /file HTTP/1.0\\r\\n\\r\\n")
    print(len(asked.makefile("rb").read().partition(b"\\r\\n\\r\\n")[2]))
"""
PYTHON = (sys.executable, "-I", "-S", "-c")
"""A start of milliseconds."""
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, Host, Host]]:
    """Two hosts for tests that leave them as they are; the second serves a folder with 250 kB in `file`."""
    with Network(tmp_path_factory.mktemp("pair")) as network:
        first, second = network.add("first"), network.add("second")
        serve_a_file(second)
        yield network, first, second


def serve_a_file(host: Host) -> None:
    (host.folder / "file").write_bytes(bytes(250_000))
    host.start("server", [sys.executable, "-m", "http.server", str(PORT), "--bind", host.address], folder=host.folder)
    wait_until(lambda: reaches(host, host), host.log("server"))


def reaches(host: Host, other: Host, timeout_s: float = 1.0) -> bool:
    """True where the whole file of the other host arrives, with no pause of `timeout_s`."""
    return host.run([*PYTHON, FETCH, other.name, str(PORT), str(timeout_s)]).stdout.strip() == "250000"


def test_each_host_has_its_own_name_address_and_processes(pair: tuple[Network, Host, Host]) -> None:
    _, *hosts = pair
    for host in hosts:
        assert host.run(["hostname"]).stdout.strip() == host.name
        assert f"inet {host.address}/24" in host.run(["ip", "-4", "-o", "address", "show", "eth0"]).stdout
        assert "first_process.py" in host.run(["cat", "/proc/1/cmdline"]).stdout
        assert host.run(["ls", "/sys/class/net"]).stdout.split() == ["eth0", "lo"]
    assert len({host.address for host in hosts}) == 2
    pids = [{int(name) for name in host.run(["ls", "/proc"]).stdout.split() if name.isdigit()} for host in hosts]
    assert all(1 in seen and os.getpid() not in seen for seen in pids)


def test_hosts_have_their_own_shared_memory_tmp_and_home_and_share_all_other_files(
    pair: tuple[Network, Host, Host], tmp_path: Path
) -> None:
    _, first, second = pair
    for own in ("/dev/shm", "/tmp", str(first.home)):
        assert first.run(["touch", f"{own}/mark"]).returncode == 0
        assert first.path(f"{own}/mark").exists()
    for own in ("/dev/shm", "/tmp", str(second.home)):
        assert second.run(["ls", f"{own}/mark"]).returncode != 0
        assert not Path(own, "mark").exists()
    (tmp_path / "shared").write_text("seen by all")
    assert first.run(["cat", str(tmp_path / "shared")]).stdout == "seen by all"


def test_every_host_has_the_token_in_a_file_of_its_own_that_nobody_else_may_read(
    pair: tuple[Network, Host, Host],
) -> None:
    network, *hosts = pair
    for host in hosts:
        assert host.run(["sh", "-c", "stat -c %a ~/.ray/auth_token; cat ~/.ray/auth_token"]).stdout.split() == [
            "600",
            network.token,
        ]
        assert not [name for name in host.environment if name.startswith("RAY_")]


def test_a_command_that_takes_too_long_is_ended_and_what_it_said_is_told(pair: tuple[Network, Host, Host]) -> None:
    _, host, _ = pair
    with pytest.raises(subprocess.TimeoutExpired) as late:
        host.run(["sh", "-c", "echo so far; sleep 1234"], timeout_s=0.5)
    assert late.value.output == "so far\n"
    wait_until(lambda: "sleep 1234" not in str(host.processes()), "it sleeps on")


def test_a_signal_reaches_what_was_started_and_its_exit_code_comes_back(pair: tuple[Network, Host, Host]) -> None:
    _, host, _ = pair
    script = "trap 'echo told; exit 7' TERM; echo waiting; while :; do sleep 0.05; done"
    started = host.start("trapping", ["sh", "-c", script])
    wait_until(lambda: host.log("trapping") == "waiting\n", "it has not started")
    host.signal(started, signal.SIGTERM)
    assert started.wait(10) == 7
    assert host.log("trapping") == "waiting\ntold\n"


@pytest.mark.parametrize("way", ["cut", "drop"])
def test_over_a_link_that_is_gone_nothing_arrives_until_it_is_mended(
    pair: tuple[Network, Host, Host], way: str
) -> None:
    _, first, second = pair
    assert reaches(first, second)
    getattr(second.link, way)()
    try:
        assert not reaches(first, second)
        carrier = second.run(["cat", "/sys/class/net/eth0/carrier"]).stdout.strip()
        assert carrier == {"cut": "0", "drop": "1"}[way]
        assert reaches(second, second), "the host itself goes on"
    finally:
        second.link.mend()
    assert reaches(first, second)


def test_what_one_host_sends_to_another_can_be_lost_while_a_third_hears_it(network: Network) -> None:
    first, second, third = (network.add(name) for name in ("first", "second", "third"))
    serve_a_file(first)
    assert reaches(second, first) and reaches(third, first)
    first.link.lose_towards(second.address)
    assert not reaches(second, first)
    assert reaches(third, first)
    first.link.find_again(second.address)
    assert reaches(second, first)


def test_a_slowed_link_takes_the_time_that_its_rate_says(pair: tuple[Network, Host, Host]) -> None:
    _, first, second = pair
    second.link.slow(1.0)
    try:
        started = time.monotonic()
        assert reaches(first, second, timeout_s=10)
        assert time.monotonic() - started > 1.5, "250 kB at 1 Mbit/s are two seconds"
    finally:
        second.link.unslow()
    assert "tbf" not in second.run(["tc", "qdisc", "show"]).stdout


def test_a_killed_host_leaves_no_process_and_comes_up_again_with_its_address_and_its_files(network: Network) -> None:
    host, other = network.add("host"), network.add("other")
    serve_a_file(host)
    assert host.run(["sh", "-c", "setsid sleep 1234 & touch /dev/shm/mark /tmp/mark"]).returncode == 0
    assert len(host.processes()) >= 3, host.processes()
    network.kill(host)
    assert host.processes() == {}
    assert not links.process_ids(host.link.namespace)
    assert not reaches(other, host)
    assert other.processes()

    again = network.boot(host)
    assert (again.name, again.address) == (host.name, host.address)
    assert again.init_pid != host.init_pid
    assert again.run(["ls", "/dev/shm/mark"]).returncode != 0
    assert again.run(["ls", "/tmp/mark"]).returncode == 0
    serve_a_file(again)
    assert reaches(other, again)


def test_a_host_that_loses_power_tells_nobody(network: Network) -> None:
    """Its peer's connection is not closed: it waits."""
    host, other = network.add("host"), network.add("other")
    answer_never = f"import socket; s = socket.create_server(({host.address!r}, {PORT})); s.accept()[0].recv(100)"
    host.start("listening", [*PYTHON, answer_never])
    ask = f"""
import socket, time
while True:
    try:
        asked = socket.create_connection(({host.address!r}, {PORT}))
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
print("connected", flush=True)
print("closed:", asked.recv(1))
"""
    waiting = other.start("waiting", [*PYTHON, ask])
    wait_until(lambda: "connected" in other.log("waiting"), "no connection")
    network.kill(host, in_silence=True)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1.0)
    assert other.log("waiting") == "connected\n"


def test_a_paused_host_does_nothing_until_it_goes_on(network: Network) -> None:
    host = network.add("host")
    host.start("counting", ["sh", "-c", "while :; do echo more; sleep 0.02; done"])
    wait_until(lambda: bool(host.log("counting")), "it does not count")
    host.pause()
    counted = host.log("counting")
    time.sleep(0.3)
    assert host.log("counting") == counted
    host.go_on()
    wait_until(lambda: host.log("counting") != counted, "it does not go on")


def test_a_disk_of_a_hosts_own_is_full_when_it_is_filled_and_unknown_to_the_others(
    network: Network, tmp_path: Path
) -> None:
    host, other = network.add("host"), network.add("other")
    disk = tmp_path / "disk"
    host.add_disk(disk, size_mb=2)
    write = ["dd", "if=/dev/zero", f"of={disk}/data", "bs=64k", "count=8", "status=none"]
    assert host.run(write).returncode == 0
    filling = host.fill_disk(disk, leave_bytes=4096)
    full = host.run([*write[:2], f"of={disk}/more", *write[3:]])
    assert full.returncode != 0 and "No space left on device" in full.stderr
    assert host.run(["rm", str(filling)]).returncode == 0
    assert host.run(write).returncode == 0
    assert list(disk.iterdir()) == []
    assert other.run(["ls", str(disk)]).stdout == ""


def test_two_networks_at_once_know_nothing_of_one_another(network: Network, tmp_path: Path) -> None:
    host = network.add("host")
    serve_a_file(host)
    with Network(tmp_path / "second") as second:
        stranger = second.add("host")
        assert stranger.address != host.address
        assert stranger.run([*PYTHON, FETCH, host.address, str(PORT), "1"]).stdout == ""
    assert reaches(host, host), "and the end of one is not the end of the other"


def test_a_host_that_is_removed_takes_its_link_along(network: Network) -> None:
    host = network.add("host")
    network.remove(host)
    assert host.link.namespace not in links.namespaces()
    assert host.link.port not in links.ip("link", "show", namespace=host.link.switch)
    with pytest.raises(ValueError, match="still free"):
        network.add("host")


def machine() -> tuple[str, list[str]]:
    """Its own interfaces and mounts; another test may have hosts at the same time."""
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return links.ip("-o", "link", "show"), [line for line in mounts if "/netns" not in line]


def test_nothing_is_left_of_a_network_also_when_the_test_fails(tmp_path: Path) -> None:
    before = machine()
    hosts: list[Host] = []

    def fail_with_two_hosts_up() -> None:
        with Network(tmp_path) as network:
            hosts.extend(network.add(name) for name in ("busy", "paused"))
            hosts[0].start("sleeping", ["sleep", "1234"])
            hosts[1].pause()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_two_hosts_up()
    assert len(hosts) == 2 and not any(host.processes() for host in hosts)
    assert machine() == before
    assert not {name for host in hosts for name in (host.link.namespace, host.link.switch)} & set(links.namespaces())


def test_what_a_killed_test_leaves_ends_with_it_and_its_names_go_with_the_next(tmp_path: Path) -> None:
    script = f"""
import pathlib, time
from tests.hosts.hosts import Network
with Network(pathlib.Path({str(tmp_path)!r})) as network:
    host = network.add("left")
    host.start("sleeping", ["sleep", "1234"])
    print(host.link.namespace, host.pid_namespace, flush=True)
    time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    test = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert test.stdout is not None
        namespace, pid_namespace = test.stdout.readline().split()
        remove_leftovers()
        assert namespace in links.namespaces(), "the living are left alone"
    finally:
        test.kill()
        test.wait()
    wait_until(lambda: not processes.alive_in(pid_namespace), "its host goes on")
    remove_leftovers()
    assert namespace not in links.namespaces()
