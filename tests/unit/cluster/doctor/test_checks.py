"""What is said of measured facts: no node, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from bigray.cluster.doctor import checks
from bigray.cluster.doctor.facts import (
    ClockFacts,
    DoorFacts,
    Node,
    NodeFacts,
    NodeInRay,
    RingFacts,
    RingPlace,
    StorageFacts,
    TokenFacts,
)
from bigray.cluster.doctor.findings import Finding

GIB = 1 << 30
VERSIONS = {"python": "3.11.2", "ray": "2.60.0", "torch": "2.13.0+cpu", "bigray": "0.1.0 (sources 0a1b2c3d)"}
TOKEN = TokenFacts("token", "/home/ann/.ray/auth_token", 0o600)
FACTS = NodeFacts(
    machine="one",
    versions=VERSIONS,
    token=TOKEN,
    plasma_folder="/dev/shm",
    shm_bytes=8 * GIB,
    session_folder="/tmp/ray/session",
    disk_total_bytes=100 * GIB,
    disk_free_bytes=60 * GIB,
    interface="eth0",
    gloo_interface="eth0",
)


def node(number: int, **changes: object) -> Node:
    in_ray = NodeInRay(f"{number}" * 56, f"10.0.0.{number}", object_store_bytes=2 * GIB)
    facts = replace(FACTS, machine=f"machine {number}")
    return Node(in_ray.ip, in_ray, replace(facts, **changes))  # type: ignore[arg-type]


def only(found: Iterable[Finding]) -> Finding:
    (finding,) = found
    return finding


def test_a_healthy_cluster_gets_one_line_a_check_and_no_fix() -> None:
    nodes = [node(1), node(2), node(3)]
    rings = [RingFacts(f"10.0.0.{a}", f"10.0.0.{b}", "gloo", 0.004) for a, b in ((1, 2), (1, 3), (2, 3))]
    found = [
        *checks.check_answers(nodes),
        *checks.check_versions(VERSIONS, nodes),
        *checks.check_tokens(TOKEN, nodes),
        *checks.check_doors([DoorFacts("dashboard", "127.0.0.1:8265", False, {"POST /api/jobs/": 401})]),
        *checks.check_clocks({"10.0.0.1": ClockFacts(0.002, 0.001)}),
        *checks.check_memory(nodes),
        *checks.check_disk(nodes),
        *checks.check_gpus(nodes, {n.name: RingPlace(1, 0) for n in nodes}),
        *checks.check_torch({}),
        *checks.check_rings(nodes, rings),
        *checks.check_storage(StorageFacts("/shared", "10.0.0.1", "ab", {n.name: "ab" for n in nodes})),
    ]
    names = [finding.name for finding in found]

    assert {(finding.status, finding.fix) for finding in found} == {("pass", "")}
    assert names == ["node", *VERSIONS, "token", "ports", "clock", "memory", "disk", "gpus", "gloo", "storage"]


@pytest.mark.parametrize(
    ("package", "theirs", "status", "fix"),
    [
        ("ray", "2.59.1", "fail", "pip install 'ray[default]==2.60.0'"),
        ("torch", "2.12.0+cpu", "fail", "pip install 'torch==2.13.0'"),
        ("torch", "2.13.0+cu126", "warn", "the same build"),
        ("torch", "", "fail", "pip install 'torch==2.13.0'"),
        ("python", "3.11.9", "fail", "Python 3.11.2"),
        ("bigray", "0.1.0 (sources ffffffff)", "fail", "the driver's bigray"),
    ],
)
def test_a_version_that_differs_is_told_with_the_node(package: str, theirs: str, status: str, fix: str) -> None:
    nodes = [node(1), node(2, versions=VERSIONS | {package: theirs})]
    wrong = only(found for found in checks.check_versions(VERSIONS, nodes) if found.status != "pass")

    assert (wrong.name, wrong.status, wrong.node) == (package, status, "10.0.0.2")
    assert (theirs or "not installed") in wrong.what
    assert fix in wrong.fix


def test_a_fault_of_many_nodes_is_told_for_ten_of_them() -> None:
    nodes = [node(number, versions=VERSIONS | {"ray": "2.59.0"}) for number in range(1, 31)]
    found = [finding for finding in checks.check_versions(VERSIONS, nodes) if finding.name == "ray"]

    assert len(found) == checks.MOST_LISTED + 1
    assert found[-1].what == "the same on 20 more nodes"


def test_a_node_that_does_not_answer_fails_and_is_judged_no_further() -> None:
    silent = Node("10.0.0.9", NodeInRay("9" * 56, "10.0.0.9"), None, "no answer within 10 s")
    nodes = [node(1), silent]

    assert only(checks.check_answers(nodes)).status == "fail"
    assert [finding.status for finding in checks.check_versions(VERSIONS, nodes)] == ["pass"] * 4
    assert only(checks.check_disk(nodes)).status == "pass"


def test_a_node_without_bigray_is_told_to_install_it() -> None:
    bare = Node("10.0.0.9", NodeInRay("9" * 56, "10.0.0.9"), None, "ModuleNotFoundError: No module named 'bigray'")

    assert "pip install" in only(checks.check_answers([bare])).fix


@pytest.mark.parametrize(
    ("token", "status", "what"),
    [
        (replace(TOKEN, file_mode=0o644), "fail", "(mode 0644)"),
        (replace(TOKEN, file_mode=0o606), "fail", "(mode 0606)"),
        (replace(TOKEN, file_mode=0o640), "fail", "(mode 0640)"),
        (TokenFacts("token", "RAY_AUTH_TOKEN"), "pass", "no other user can read it"),
    ],
)
def test_who_may_read_the_token(token: TokenFacts, status: str, what: str) -> None:
    found = only(checks.check_tokens(TOKEN, [node(1, token=token)]))

    assert found.status == status
    assert what in found.what
    assert found.fix == ("" if status == "pass" else "chmod 600 /home/ann/.ray/auth_token")


def test_a_cluster_without_a_token_fails_where_others_reach_it() -> None:
    open_node = node(1, token=TokenFacts("disabled"))
    local = replace(open_node, in_ray=replace(open_node.in_ray, ip="127.0.0.1"))

    assert only(checks.check_tokens(TokenFacts("disabled"), [open_node])).status == "fail"
    assert only(checks.check_tokens(TokenFacts("disabled"), [local])).status == "warn"


@pytest.mark.parametrize(
    ("is_public", "answer", "status"),
    [
        (True, 400, "fail"),
        (True, 200, "fail"),
        (True, 500, "fail"),
        (False, 400, "warn"),
        (True, 401, "pass"),
        (True, 403, "pass"),
        (True, 404, "pass"),
        (True, None, "pass"),
    ],
)
def test_a_port_that_takes_a_request_without_a_token(is_public: bool, answer: int | None, status: str) -> None:
    door = DoorFacts("dashboard", "10.0.0.1:8265", is_public, {"POST /api/jobs/": answer, "GET /api/jobs/": 401})
    found = only(checks.check_doors([door]))

    assert found.status == status
    assert ("RAY_AUTH_MODE=token" in found.fix) is (status != "pass")


def test_ports_that_could_not_be_asked_are_told_and_do_not_pass() -> None:
    silent = DoorFacts("dashboard", "10.0.0.1:8265", True, {"POST /api/jobs/": None}, "head")
    found = list(checks.check_doors([silent], {"other": "no answer within 9 s"}))

    assert [(finding.status, finding.node) for finding in found] == [("warn", "other"), ("warn", "head")]


def test_of_many_doors_that_take_changes_the_worst_are_listed() -> None:
    open_ones = [DoorFacts("agent", f"10.0.0.{n}:52365", n >= 25, {"POST /api/jobs/": 200}) for n in range(30)]
    found = list(checks.check_doors(open_ones))

    assert len(found) == checks.MOST_LISTED + 1
    assert [finding.status for finding in found[:5]] == ["fail"] * 5
    assert found[-1].what == "the same on 20 more ports"


def test_of_many_nodes_that_do_not_answer_some_are_listed() -> None:
    silent = [replace(node(number), facts=None, error="no answer") for number in range(30)]
    found = list(checks.check_answers(silent))

    assert len(found) == checks.MOST_LISTED + 1
    assert found[-1].what == "the same on 20 more nodes"


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"plasma_folder": "/tmp", "shm_bytes": 64 << 20}, "in /tmp, on disk: /dev/shm has 0.1 GiB", "--shm-size=2g"),
        ({"shm_bytes": GIB}, "/dev/shm has 1.0 GiB, less than the object store of 2.0 GiB", "remount,size=2g"),
        ({"shm_bytes": None}, "/dev/shm has 0.0 GiB", "remount"),
    ],
)
def test_an_object_store_without_shared_memory_warns(changes: dict[str, object], what: str, fix: str) -> None:
    found = only(checks.check_memory([node(1), node(2, **changes)]))

    assert (found.status, found.node) == ("warn", "10.0.0.2")
    assert what in found.what
    assert fix in found.fix


@pytest.mark.parametrize(("free", "status"), [(4 * GIB, "fail"), (5 * GIB, "fail"), (6 * GIB, "pass")])
def test_a_disk_that_ray_takes_for_full_fails(free: int, status: str) -> None:
    assert only(checks.check_disk([node(1, disk_free_bytes=free)])).status == status


def test_a_small_disk_warns() -> None:
    assert only(checks.check_disk([node(1, disk_total_bytes=8 * GIB, disk_free_bytes=3 * GIB)])).status == "warn"


@pytest.mark.parametrize(
    ("clock", "status"),
    [
        (ClockFacts(0.3, 0.01), "pass"),
        (ClockFacts(-2.0, 0.01), "warn"),
        (ClockFacts(2.0, 3.0), "pass"),  # may be no more than half a second
        (ClockFacts(-4000.0, 0.01), "fail"),
    ],
)
def test_a_clock_is_off_only_where_the_round_trip_does_not_explain_it(clock: ClockFacts, status: str) -> None:
    assert only(checks.check_clocks({"10.0.0.1": clock})).status == status


@pytest.mark.parametrize(
    ("in_ray", "in_torch", "fake", "status"),
    [(2, 2, False, "pass"), (2, 0, False, "fail"), (2, 0, True, "warn"), (1, 4, False, "warn"), (0, 0, False, "pass")],
)
def test_gpus_of_ray_against_those_of_torch(in_ray: int, in_torch: int, fake: bool, status: str) -> None:
    here = node(1)
    here = replace(here, in_ray=replace(here.in_ray, gpus=float(in_ray), has_fake_gpus=fake))

    assert only(checks.check_gpus([here], {here.name: RingPlace(1, in_torch)})).status == status


def test_a_pair_that_gloo_sends_to_loopback_is_told_the_interface_that_works() -> None:
    nodes = [node(1, gloo_interface="lo"), node(2, gloo_interface="lo", interface="ens5")]
    ring = RingFacts("10.0.0.1", "10.0.0.2", "gloo", None, "timed out", seconds_with_interface=0.005)
    found = only(checks.check_rings(nodes, [ring]))

    assert (found.name, found.status, found.node) == ("gloo", "fail", "10.0.0.1 - 10.0.0.2")
    assert "lo on 10.0.0.1 and lo on 10.0.0.2" in found.what
    assert found.fix == "start Ray with GLOO_SOCKET_IFNAME=eth0 on 10.0.0.1 and GLOO_SOCKET_IFNAME=ens5 on 10.0.0.2"


def test_a_pair_that_no_interface_connects_is_told_to_open_the_ports() -> None:
    found = only(checks.check_rings([node(1), node(2)], [RingFacts("10.0.0.1", "10.0.0.2", "gloo", None, "timed out")]))

    assert found.status == "fail"
    assert "timed out" in found.what
    assert found.fix.startswith("open all TCP ports between them")


def test_a_pair_that_was_set_to_another_interface_is_told_to_set_it_also_where_there_was_no_time_to_try_that() -> None:
    nodes = [node(1), node(2, gloo_interface="nosuch0", gloo_setting="nosuch0")]
    ring = RingFacts("10.0.0.1", "10.0.0.2", "gloo", None, "unable to find address for: nosuch0")
    found = only(checks.check_rings(nodes, [ring]))

    assert "nosuch0" in found.what
    assert found.fix == "start Ray with GLOO_SOCKET_IFNAME=eth0 on both"


def test_a_pair_much_slower_than_the_others_is_told() -> None:
    times = {(1, 2): 0.004, (1, 3): 0.004, (2, 3): 0.09}
    rings = [RingFacts(f"10.0.0.{a}", f"10.0.0.{b}", "gloo", seconds) for (a, b), seconds in times.items()]
    found = only(checks.check_rings([node(1), node(2), node(3)], rings))

    assert (found.status, found.node) == ("warn", "10.0.0.2 - 10.0.0.3")
    assert found.what == "an all-reduce of 4 MB takes 90 ms, that of the median pair 4 ms"


def test_pairs_that_there_was_no_time_for_are_counted() -> None:
    assert only(checks.check_rings([node(1)], [], unmeasured=7)).what.startswith("7 pairs")


def test_another_network_than_rays_is_told_where_nodes_are_on_several_machines() -> None:
    nodes = [node(1, gloo_interface="mgmt0"), node(2)]
    rings = [RingFacts("10.0.0.1", "10.0.0.2", "gloo", 0.004)]
    by_name = {finding.name: finding for finding in checks.check_rings(nodes, rings)}
    together = [replace(n, facts=replace(n.facts, machine="one")) for n in nodes if n.facts is not None]

    assert by_name["interface"].status == "warn"
    assert "GLOO_SOCKET_IFNAME=eth0" in by_name["interface"].fix
    assert [finding.name for finding in checks.check_rings(together, rings)] == ["gloo"]


@pytest.mark.parametrize(
    ("facts", "what", "fix"),
    [
        (StorageFacts("/runs", "a", "ab", {"a": "ab"}, {"b": ""}), "from here not there", "s3://bucket"),
        (StorageFacts("/runs", "a", "ab", {"a": "ab", "b": "cd"}), "from here other content", "s3://bucket"),
        (
            StorageFacts("s3://x/y", "a", "ab", {"a": "ab"}, {"b": "no credentials"}, is_local=False),
            "from here no credentials",
            "credentials and endpoint",
        ),
    ],
)
def test_storage_that_a_node_does_not_see_fails_there(facts: StorageFacts, what: str, fix: str) -> None:
    found = only(checks.check_storage(facts))

    assert (found.status, found.node) == ("fail", "b")
    assert what in found.what
    assert fix in found.fix


def test_storage_that_cannot_be_written_fails_with_the_reason() -> None:
    found = only(checks.check_storage(StorageFacts("/runs", "a", errors={"a": "/runs: cannot write: read-only"})))

    assert (found.status, found.node) == ("fail", "a")
    assert "read-only" in found.what


def test_a_file_that_stayed_is_told() -> None:
    facts = StorageFacts("/runs", "a", "ab", {"a": "ab"}, left_behind="/runs/.bigray-doctor-1")

    assert [finding.status for finding in checks.check_storage(facts)] == ["warn", "pass"]


def test_storage_that_was_not_named_is_not_passed_over_in_silence() -> None:
    found = only(checks.check_storage(None))

    assert (found.status, found.fix) == ("warn", "bigray doctor --job JOB, or --storage URI")
