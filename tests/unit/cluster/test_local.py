"""A cluster on one machine without Ray: its file, its commands, its record, and whose processes are ended."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bigray.cluster import local
from bigray.cluster.dry_run import raylets
from bigray.cluster.dry_run.processes import (
    MARK,
    Process,
    Row,
    ancestors_of,
    family,
    is_alive,
    process_of,
    reap,
    send,
    snapshot,
    spawn,
    wait_until_gone,
)
from bigray.cluster.dry_run.spec import (
    FAKE_GPU_LABEL,
    LocalClusterSpec,
    NodeGroup,
    check_shared_memory,
    load_local_spec,
    shapes_of,
)
from bigray.cluster.dry_run.state import LocalCluster, LocalNode, StateFolder, boot_id
from bigray.cluster.dry_run.tables import describe_state, export_lines, node_table
from bigray.errors import CapacityError, ClusterError, SpecError

GUIDE = Path(__file__).parents[3] / "docs/failures.md"
PATIENCE_S = 10.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StateFolder]:
    """A state folder of this test alone; whatever a test has started in its name is ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = StateFolder.of_user()
    folder.make()
    yield folder
    mine = [row.process for row in snapshot() if (row.mark or "").startswith(raylets.mark_of(folder.path))]
    for process in mine:
        send(process, signal.SIGKILL)
    reap()


def start(folder: StateFolder, name: str, script: str) -> Process:
    """A stand-in for `ray start`: a shell script with the mark of a node."""
    environment = {**os.environ, MARK: raylets.mark_of(folder.path, name)}
    return spawn(["/bin/sh", "-c", script], environment, folder.logs / f"{name}.log")


def node(name: str, root: Process | None = None, raylet: Process | None = None) -> LocalNode:
    return LocalNode(name, 1, 0, 200, 1000, {}, f"{name}.log", root, raylet)


def cluster_of(folder: StateFolder, *nodes: LocalNode) -> LocalCluster:
    return LocalCluster("dry", boot_id(), 1.0, "/nowhere", str(folder.token), address="10.0.0.1:20001", nodes=nodes)


def pids_of(folder: StateFolder, name: str) -> list[int]:
    return sorted(row.process.pid for row in snapshot() if row.mark == raylets.mark_of(folder.path, name))


def wait_for_processes(folder: StateFolder, name: str, count: int) -> list[int]:
    deadline = time.monotonic() + PATIENCE_S
    while len(found := pids_of(folder, name)) != count:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def two_nodes(folder: StateFolder) -> str:
    """A head and a node: a shell each, which stays when its raylet's stand-in has ended. Returns a command that ends
    the node's."""
    nodes = []
    for name in ("head", "node-1"):
        pipe = folder.path / f"{name}.pipe"
        os.mkfifo(pipe)
        root = start(folder, name, f"(read line < {pipe}) & wait; sleep 60")
        (raylet,) = (pid for pid in wait_for_processes(folder, name, 2) if pid != root.pid)
        nodes.append(node(name, root, process_of(raylet)))
    folder.write(cluster_of(folder, *nodes))
    return f"echo leave > {folder.path / 'node-1.pipe'}"


class TestTheFile:
    def test_nodes_share_the_machine_and_the_head_is_one_of_them(self) -> None:
        shapes = shapes_of(LocalClusterSpec(nodes=3, gpus_per_node=2), cores=16, memory_mib=9000)

        assert [(shape.name, shape.cpus, shape.gpus, shape.memory_mib) for shape in shapes] == [
            ("head", 5, 2, 3000),
            ("node-1", 5, 2, 3000),
            ("node-2", 5, 2, 3000),
        ]
        assert all(shape.all_labels == {FAKE_GPU_LABEL: "true"} for shape in shapes)

    def test_a_node_has_a_core_on_the_smallest_machine_and_no_label_without_gpus(self) -> None:
        shapes = shapes_of(LocalClusterSpec(nodes=3, head_cpus=0), cores=2, memory_mib=9000)

        assert [shape.cpus for shape in shapes] == [0, 1, 1]
        assert not any(shape.all_labels for shape in shapes)

    def test_groups_are_nodes_of_another_kind(self, tmp_path: Path) -> None:
        file = tmp_path / "local.toml"
        file.write_text(
            'nodes = 2\n[[groups]]\nname = "a100"\ncount = 2\ngpus = 4\nlabels = { "team.io/gpu" = "A100" }\n'
        )
        shapes = shapes_of(load_local_spec(file, cpus_per_node=3), cores=2, memory_mib=9000)

        assert [shape.name for shape in shapes] == ["head", "node-1", "a100-1", "a100-2"]
        assert [shape.cpus for shape in shapes] == [3, 3, 1, 1]
        assert shapes[3].all_labels == {"team.io/gpu": "A100", FAKE_GPU_LABEL: "true"}

    def test_options_stand_over_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "local.toml"
        file.write_text("nodes = 5\ngpus_per_node = 1\n")

        spec = load_local_spec(file, nodes=2)

        assert (spec.nodes, spec.gpus_per_node) == (2, 1)

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ("nodez = 3", "local.toml: nodez: unknown key, did you mean 'nodes'?"),
            ("nodes = 0", "local.toml: nodes: "),
            ('nodes = "3"', "local.toml: nodes: "),
            ("cpus_per_node = 0", "local.toml: cpus_per_node: "),
            ("object_store_mib = 10", "local.toml: object_store_mib: "),
            ("nodes = 30\ngroups = [{ name = 'x', count = 9 }]", "make 39 nodes, one machine takes 32"),
            ("groups = [{ name = 'x' }, { name = 'x' }]", "'x' is there twice"),
            ("groups = [{ name = 'head' }]", "is what plain nodes are called"),
            ('labels = { "a=b" = "c" }', "'a=b' is no key of a label"),
            ('labels = { zone = "a,b" }', "has the value 'a,b'"),
            ('labels = { "bigray.io/fake-gpu" = "false" }', "is set by bigray itself"),
            ("nodes = ", "not valid TOML"),
        ],
    )
    def test_a_fault_is_one_line_with_its_place(self, tmp_path: Path, text: str, fault: str) -> None:
        file = tmp_path / "local.toml"
        file.write_text(text)

        with pytest.raises(SpecError) as raised:
            load_local_spec(file)

        assert len(raised.value.faults) == 1
        assert fault in raised.value.faults[0]

    def test_a_fault_of_an_option_has_the_options_name(self) -> None:
        with pytest.raises(SpecError) as raised:
            load_local_spec(nodes=0, cpus_per_node=-1)

        assert [fault.partition(":")[0] for fault in raised.value.faults] == ["--nodes", "--cpus-per-node"]

    def test_a_file_that_is_not_there_is_a_fault(self, tmp_path: Path) -> None:
        with pytest.raises(SpecError, match=r"gone.toml: cannot be read: No such file"):
            load_local_spec(tmp_path / "gone.toml")

    def test_the_guides_file_can_be_used_and_tells_of_every_setting(self, tmp_path: Path) -> None:
        (snippet,) = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
        file = tmp_path / "local.toml"
        file.write_text(snippet)
        spec = load_local_spec(file)

        assert spec.model_fields_set == LocalClusterSpec.model_fields.keys()
        assert spec.groups[0].model_fields_set == NodeGroup.model_fields.keys()

    def test_object_stores_that_do_not_fit_are_refused_with_what_would(self) -> None:
        shapes = shapes_of(LocalClusterSpec(nodes=3), cores=2, memory_mib=9000)
        check_shared_memory(shapes, 600 * 2**20)

        with pytest.raises(CapacityError, match=r"need 600 MiB of /dev/shm, and 300 MiB are free; .* = 100"):
            check_shared_memory(shapes, 300 * 2**20)
        with pytest.raises(CapacityError, match="start fewer nodes"):
            check_shared_memory(shapes, 64 * 2**20)


class TestTheCommands:
    def test_a_node_is_a_plain_ray_start_that_stays(self) -> None:
        head, other = shapes_of(LocalClusterSpec(nodes=2, gpus_per_node=2), cores=2, memory_mib=4000)
        first = raylets.head_command(head, raylets.Ports(20001, 20002, 20003), "/tmp/bigray-x")
        second = raylets.node_command(other, "10.0.0.1:20001")

        start = len(raylets.RAY)
        assert first[start : start + 3] == ["start", "--head", "--block"]
        assert {"--port=20001", "--dashboard-host=127.0.0.1", "--temp-dir=/tmp/bigray-x"} <= set(first)
        assert second[start : start + 3] == ["start", "--block", "--address=10.0.0.1:20001"]
        for command in (first, second):
            assert {"--num-gpus=2", "--labels=bigray.io/fake-gpu=true", "--min-worker-port=0"} <= set(command)

    def test_every_option_of_a_command_is_one_of_rays(self) -> None:
        head, other = shapes_of(LocalClusterSpec(nodes=2, gpus_per_node=1), cores=2, memory_mib=4000)
        ports = raylets.Ports(20001, 20002, 20003)
        commands = [
            raylets.head_command(head, ports, "/tmp/bigray-x"),
            raylets.node_command(other, "10.0.0.1:20001"),
            raylets.drain_command("10.0.0.1:20001", "ab" * 28, 30),
        ]

        spec = importlib.util.find_spec("ray")  # importing its commands takes seconds
        assert spec is not None
        assert spec.origin is not None
        source = (Path(spec.origin).parent / "scripts/scripts.py").read_text()
        options = {word.partition("=")[0] for command in commands for word in command[len(raylets.RAY) + 1 :]}
        assert len(options) > 15
        assert [option for option in sorted(options) if f'"{option}"' not in source] == []

    def test_a_node_inherits_no_other_cluster_no_token_and_no_real_gpu(self) -> None:
        outer = {
            "PATH": "/bin",
            "RAY_ADDRESS": "other:6379",
            "RAY_AUTH_TOKEN": "secret",
            "CUDA_VISIBLE_DEVICES": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_ENABLE_HA_PROXY": "0",
        }
        made = raylets.environment_of(outer, token="/t", temp_dir="/tmp/bigray-x", mark="here#node-1")

        assert not {"RAY_ADDRESS", "RAY_AUTH_TOKEN", "CUDA_VISIBLE_DEVICES"} & made.keys()
        assert (made["RAY_AUTH_MODE"], made["RAY_AUTH_TOKEN_PATH"], made[MARK]) == ("token", "/t", "here#node-1")
        assert (made["PATH"], made["RAY_SERVE_ENABLE_HA_PROXY"]) == ("/bin", "0")
        haproxy = {name: value for name, value in made.items() if name.startswith("RAY_SERVE_HAPROXY")}
        assert len(haproxy) == 5
        assert all(value.startswith("/tmp/bigray-x/") for value in haproxy.values())

    def test_the_heads_ports_differ_and_nobody_listens_on_them(self) -> None:
        ports = raylets.free_ports()

        assert len({ports.control, ports.client, ports.dashboard}) == 3

    def test_a_node_that_ends_at_once_is_told_with_its_cause(self, folder: StateFolder) -> None:
        root = start(folder, "node-1", "echo started; echo 'ValueError: no such thing' >&2; exit 1")
        waiting = replace(node("node-1", root), log=str(folder.logs / "node-1.log"))

        with pytest.raises(ClusterError, match="node-1: Ray did not start: ValueError: no such thing"):
            raylets.wait_until_up([waiting], PATIENCE_S)

    def test_a_node_is_up_when_ray_says_so(self, folder: StateFolder) -> None:
        root = start(folder, "node-1", f"sleep 0.2; echo '{raylets.UP}'; sleep 60")

        raylets.wait_until_up([replace(node("node-1", root), log=str(folder.logs / "node-1.log"))], PATIENCE_S)

    def test_a_node_that_never_is_up_is_given_up(self, folder: StateFolder) -> None:
        root = start(folder, "node-1", "sleep 60")

        with pytest.raises(ClusterError, match=r"node-1: not up after 0.3 s"):
            raylets.wait_until_up([replace(node("node-1", root), log=str(folder.logs / "node-1.log"))], 0.3)

    def test_the_id_in_ray_is_read_off_the_raylet(self) -> None:
        agent = Row(Process(5, 1), 1, 1, None, ("python", "agent.py", "--node_id=wrong"))
        raylet = Row(Process(6, 1), 1, 1, None, ("/site/ray/core/src/ray/raylet/raylet", "--x=1", "--node_id=ab12"))

        assert raylets.raylet_of([agent, raylet]) == (Process(6, 1), "ab12")
        assert raylets.raylet_of([agent]) is None


class TestWhoseProcesses:
    def test_those_known_or_marked_their_sessions_and_children_and_no_others(self) -> None:
        rows = [
            Row(Process(10, 1), parent=1, session=10, mark=None),  # known
            Row(Process(11, 2), parent=10, session=10, mark=None),  # its child
            Row(Process(12, 3), parent=1, session=10, mark=None),  # an orphan of its session
            Row(Process(13, 4), parent=11, session=13, mark=None),  # went into a session of its own
            Row(Process(14, 5), parent=1, session=14, mark="f#node-1"),  # so did this, and its parent is gone
            Row(Process(15, 6), parent=1, session=15, mark="f#node-2"),
            Row(Process(16, 7), parent=1, session=16, mark=None),
        ]
        found = family(rows, [Process(10, 1)], lambda mark: mark == "f#node-1")

        assert [row.process.pid for row in found] == [10, 11, 12, 13, 14]

    def test_a_pid_that_another_process_has_got_is_nobody_of_ours(self) -> None:
        rows = [
            Row(Process(10, 99), parent=1, session=10, mark=None),
            Row(Process(11, 100), parent=10, session=10, mark=None),
        ]

        assert family(rows, [Process(10, 1)], lambda mark: True) == []

    def test_a_process_that_began_at_another_moment_gets_no_signal(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        process = process_of(child.pid)
        assert process is not None

        assert not send(replace(process, start_ticks=process.start_ticks - 1), signal.SIGKILL)
        assert child.poll() is None
        assert send(process, signal.SIGKILL)
        child.wait(PATIENCE_S)
        assert not send(process, signal.SIGKILL)

    def test_this_process_and_those_above_it_are_known(self) -> None:
        above = ancestors_of(os.getpid(), snapshot())

        assert {os.getpid(), os.getppid()} <= above

    def test_what_is_started_has_a_session_of_its_own_and_no_input(self, folder: StateFolder) -> None:
        process = start(folder, "head", "cat; echo done; sleep 60")
        row = next(row for row in snapshot() if row.process == process)

        assert row.session == process.pid
        assert row.mark == raylets.mark_of(folder.path, "head")
        wait_for_processes(folder, "head", 2)  # the shell and `sleep`: `cat` got no input
        assert (folder.logs / "head.log").read_text() == "done\n"
        assert (folder.logs / "head.log").stat().st_mode & 0o777 == 0o600


class TestTheRecord:
    def test_what_is_written_is_read_by_the_next_command_and_by_this_user_only(self, folder: StateFolder) -> None:
        known = replace(node("node-1", Process(7, 8), Process(9, 10)), labels={"a": "b"}, leaves_at=2.5)
        cluster = cluster_of(folder, node("head"), known)
        folder.write(cluster)
        folder.new_token()

        assert folder.read() == cluster
        assert [path.stat().st_mode & 0o777 for path in (folder.record, folder.token)] == [0o600, 0o600]
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert len(folder.token.read_text()) == 64

    def test_no_record_is_no_cluster(self, folder: StateFolder) -> None:
        assert folder.read() is None
        for command in (local.local_status, local.add_node, lambda: local.kill_node("node-1")):
            with pytest.raises(ClusterError, match="no local cluster is there: start one with"):
                command()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "nodes": []}', '{"format": 1, "nodes": [{}]}'])
    def test_a_record_that_cannot_be_read_says_what_to_do(self, folder: StateFolder, text: str) -> None:
        folder.record.write_text(text)

        with pytest.raises(ClusterError, match=r"cannot be read .*bigray cluster down"):
            folder.read()
        assert local.take_down() == local.TakenDown((), 0)
        assert not folder.record.exists()

    def test_one_command_at_a_time_changes_the_cluster(self, folder: StateFolder) -> None:
        with folder.locked(), pytest.raises(ClusterError, match="another `bigray cluster` command"), folder.locked(0.0):
            pass
        with folder.locked(0.0):
            pass

    def test_an_unknown_node_is_refused_with_the_near_one(self, folder: StateFolder) -> None:
        folder.write(cluster_of(folder, node("head"), node("node-1")))

        with pytest.raises(SpecError, match="nod-1: no such node, did you mean 'node-1'"):
            local.kill_node("nod-1")

    def test_the_exports_name_the_token_and_do_not_tell_it(self, folder: StateFolder) -> None:
        token = folder.new_token().read_text()
        lines = export_lines(cluster_of(folder).exports)

        assert "export RAY_ADDRESS=10.0.0.1:20001" in lines
        assert f"export RAY_AUTH_TOKEN_PATH={folder.token}" in lines
        assert "export RAY_AUTH_MODE=token" in lines
        assert token not in json.dumps(lines)


class TestNodes:
    def test_a_node_is_as_its_raylet_is(self) -> None:
        root, raylet = Process(1, 1), Process(2, 2)
        up = node("node-1", root, raylet)

        assert local.state_of(up, [root, raylet]) == "up"
        assert local.state_of(up, [root]) == "lost", "`ray start` stays when the raylet has left"
        assert local.state_of(up, []) == "lost"
        assert local.state_of(replace(up, leaves_at=5.0), [root, raylet]) == "draining"
        assert local.state_of(replace(up, ended_by="kill-node"), []) == "ended"
        assert local.state_of(node("node-1", root), [root]) == "starting"
        assert local.state_of(node("node-1", root), []) == "lost"

    def test_a_new_node_is_like_the_plain_ones_and_no_name_is_used_twice(self, folder: StateFolder) -> None:
        dead = replace(node("node-2"), ended_by="kill-node")
        plain = replace(node("node-1"), cpus=4, gpus=2, labels={"zone": "a", FAKE_GPU_LABEL: "true"})

        shape = local.next_shape(
            cluster_of(folder, replace(node("head"), cpus=0), plain, dead, node("spot-7"), node("node-gpu-1"))
        )

        assert (shape.name, shape.cpus, shape.gpus) == ("node-3", 4, 2)
        assert replace(shape, gpus=0).all_labels == {"zone": "a"}
        assert local.next_shape(cluster_of(folder, replace(node("head"), cpus=0))).cpus == 1

    @pytest.mark.parametrize(("numbers", "option"), [({"cpus": -1}, "--cpus"), ({"gpus": 99}, "--gpus")])
    def test_a_new_node_of_an_impossible_size_is_refused(
        self, folder: StateFolder, numbers: dict[str, int], option: str
    ) -> None:
        with pytest.raises(SpecError, match=f"{option}: "):
            local.add_node(**numbers)

    def test_killing_a_node_ends_all_it_started_and_no_other_node(self, folder: StateFolder) -> None:
        one = start(folder, "node-1", "sleep 60 & setsid sleep 60 & (setsid sleep 60 &) ; wait")
        other = start(folder, "node-2", "sleep 60 & wait")
        wait_for_processes(folder, "node-1", 4)
        wait_for_processes(folder, "node-2", 2)
        folder.write(cluster_of(folder, node("node-1", one), node("node-2", other)))

        ended = local.kill_node("node-1")

        assert ended == local.Ended("node-1", "killed", 4)
        assert pids_of(folder, "node-1") == []
        assert is_alive(other)
        assert [status.state for status in local.local_status().nodes] == ["ended", "starting"]
        with pytest.raises(SpecError, match="node-1: has ended already, by kill-node"):
            local.kill_node("node-1")

    def test_the_head_is_not_preempted_and_a_notice_is_a_time(self, folder: StateFolder) -> None:
        head = start(folder, "head", "sleep 60 & wait")
        (raylet,) = (pid for pid in wait_for_processes(folder, "head", 2) if pid != head.pid)
        folder.write(cluster_of(folder, node("head", head, process_of(raylet))))

        with pytest.raises(SpecError, match="head: the cluster ends with its head"):
            local.preempt_node("head")
        with pytest.raises(SpecError, match="--notice: 0 is no notice"):
            local.preempt_node("head", 0)

    @pytest.mark.parametrize(
        ("leaves", "notice_s", "how"),
        [(False, 1, "killed when its time was up"), (True, 60, "left before its time was up")],
    )
    def test_a_node_with_a_notice_has_its_time_and_no_more(
        self, folder: StateFolder, monkeypatch: pytest.MonkeyPatch, leaves: bool, notice_s: int, how: str
    ) -> None:
        leave = two_nodes(folder)
        monkeypatch.setattr(raylets, "RAY", ("/bin/sh", "-c", leave if leaves else "exit 0", "ray"))

        assert local.preempt_node("node-1", notice_s).how == how

        assert pids_of(folder, "node-1") == []
        record = folder.read()
        assert record is not None
        assert record.node("node-1").ended_by == "preempt-node"
        assert local.state_of(record.node("head"), record.node("head").known) == "up"

    def test_a_notice_that_is_refused_ends_nobody(self, folder: StateFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        two_nodes(folder)
        monkeypatch.setattr(raylets, "RAY", ("/bin/sh", "-c", "echo Error: not accepted >&2; exit 1", "ray"))

        with pytest.raises(ClusterError, match=r"10.0.0.1:20001: the head refuses the notice: Error: not accepted"):
            local.preempt_node("node-1", 1)

        assert [status.state for status in local.local_status().nodes] == ["up", "up"]

    def test_without_its_head_a_cluster_takes_no_node(self, folder: StateFolder) -> None:
        folder.write(cluster_of(folder, node("head", Process(2**22 + 1, 1), Process(2**22 + 2, 1))))

        with pytest.raises(ClusterError, match=r"the head of the local cluster is gone: .*bigray cluster down"):
            local.add_node()

    def test_the_table_names_fake_gpus_as_such_and_says_how_a_node_is(self, folder: StateFolder) -> None:
        from rich.console import Console

        leaving = replace(node("node-1"), gpus=2, leaves_at=time.time() + 20)
        rows = (
            local.NodeStatus(replace(node("head"), gpus=1), "up", 9),
            local.NodeStatus(leaving, "draining", 5),
            local.NodeStatus(replace(node("node-2"), ended_by="kill-node"), "ended", 0),
            local.NodeStatus(node("node-3"), "lost", 0),
        )
        console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115  # closed with the test
        console.print(node_table(local.LocalStatus(cluster_of(folder), rows)))
        text = console.export_text()

        assert "dry: 2 of 4 nodes up on this machine, 10.0.0.1:20001" in text
        assert "2 fake GPUs" in text
        assert "1 fake GPU " in text
        assert describe_state(rows[1]).startswith("draining, ")
        assert "ended by kill-node" in text
        assert "lost (died by itself)" in text


class TestDown:
    def test_all_is_ended_whoever_its_parent_is_and_nothing_is_left(self, folder: StateFolder) -> None:
        head = start(folder, "head", "sleep 60 & (setsid sleep 60 &) ; wait")
        other = start(folder, "node-1", "trap '' TERM; sleep 60 & sleep 60 & wait; wait")
        wait_for_processes(folder, "head", 3)
        wait_for_processes(folder, "node-1", 3)
        folder.write(cluster_of(folder, node("head", head), node("node-1", other)))
        folder.new_token()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local, "GRACE_S", 0.3)
            down = local.take_down()

        assert down == local.TakenDown(("head", "node-1"), 6)
        assert pids_of(folder, "head") + pids_of(folder, "node-1") == []
        assert not folder.record.exists()
        assert not folder.token.exists()
        assert not list(folder.logs.iterdir())

    def test_where_nothing_is_there_nothing_happens(self, folder: StateFolder) -> None:
        assert local.take_down() == local.TakenDown((), 0)
        assert local.take_down() == local.TakenDown((), 0)

    def test_what_a_crash_left_without_a_record_is_found_by_its_mark(self, folder: StateFolder) -> None:
        start(folder, "node-1", "sleep 60 & wait")
        wait_for_processes(folder, "node-1", 2)

        assert local.take_down() == local.TakenDown((), 2)
        assert pids_of(folder, "node-1") == []

    def test_a_record_of_before_a_reboot_ends_nobody(self, folder: StateFolder) -> None:
        bystander = subprocess.Popen(["sleep", "60"])
        stale = cluster_of(folder, node("head", process_of(bystander.pid)))
        folder.write(replace(stale, boot_id="another"))

        assert local.take_down() == local.TakenDown((), 0)
        assert bystander.poll() is None
        bystander.kill()
        bystander.wait(PATIENCE_S)

    def test_a_second_cluster_is_refused_while_one_runs(self, folder: StateFolder) -> None:
        head = start(folder, "head", "sleep 60 & wait")
        wait_for_processes(folder, "head", 2)
        folder.write(cluster_of(folder, node("head", head)))

        with pytest.raises(ClusterError, match=r"is there already, with 2 processes: .*bigray cluster down"):
            local.start_local(LocalClusterSpec(nodes=1))
        assert is_alive(head)

    def test_a_start_that_fails_leaves_nothing_but_its_log(
        self, folder: StateFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            raylets, "RAY", ("/bin/sh", "-c", "(setsid sleep 60 &); echo 'OSError: full'; exit 1", "ray")
        )

        with pytest.raises(ClusterError, match="head: Ray did not start: OSError: full; its log is "):
            local.start_local(LocalClusterSpec(nodes=2))

        assert pids_of(folder, "head") == []
        assert sorted(path.name for path in folder.path.iterdir()) == ["lock", "logs"]
        assert (folder.logs / "head.log").exists()

    def test_a_temporary_folder_that_is_not_ours_is_left(self, folder: StateFolder, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        mine.mkdir()
        folder.write(replace(cluster_of(folder), temp_dir=str(mine)))
        local.take_down()

        assert mine.is_dir()


def test_waiting_ends_when_nobody_is_there(folder: StateFolder) -> None:
    process = start(folder, "head", "sleep 0.2")

    assert wait_until_gone(lambda: [process] if is_alive(process) else [], PATIENCE_S)
    assert not wait_until_gone(lambda: [process], 0.0)
