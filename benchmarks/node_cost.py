"""What a node more costs: launch, driver, control plane and memory on 2, 4 and 8 raylets; plans for up to 10,000 nodes.

    python benchmarks/node_cost.py [--size full|small] [--rounds 3] [--simulated-only]

The raylets are real ones of one machine, each of one CPU, the head among them. The job is the same whatever the number
of nodes: an MLP on the digits for three epochs, two workers on two nodes; so what grows is the cost of the nodes. The
first job of a process, for which modules are imported and workers started, is not in the figures. Beside it, on such a
cluster of its own and with Ray's own settings, `TorchTrainer.fit()` of two workers whose loop does nothing. "Started"
is when bigray's driver is told of the trial's start, and when rank 0 of the peer enters its loop. The last column is
the line through the figures: what each node adds. All raylets share the machine's cores.

SIMULATED: nodes are made up, as plain values, and Ray is not there: what is timed is bigray's own reckoning, which a
driver does once for each command. The slope is that of the logarithm of the time over that of the nodes, of the two
largest numbers: 0 is flat, 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from measuring import print_table, run_in_own_process, tell

LABELS = {"bigray": "bigray train", "trainer": "TorchTrainer.fit(), empty loop"}
NODES = {"full": (2, 4, 8), "small": (2, 4)}
SIMULATED = {"full": (10, 100, 1_000, 10_000), "small": (10, 100, 1_000)}
ROWS = {
    "capacity_ms": "connected_capacity(), ms",
    "plan_ms": "make_plan(), ms",
    "started_s": "until started, s",
    "whole_s": "the whole job, s",
    "driver_cpu_s": "driver's CPU time in it, s",
    "gcs_cpu_s": "GCS's CPU time in it, s",
    "nodes_cpu_s": "raylets' and agents' CPU time in it, s",
    "gcs_mb": "memory of the GCS, MB",
    "raylet_mb": "memory of an added raylet, MB",
    "node_mb": "the same with its agents, MB",
}
OF_ONE_NODE = ("raylet_mb", "node_mb")
EPOCHS = 3
LOOKS = 20
"""At the capacity, and at the plan; the median counts."""
OBJECT_STORE_BYTES = 100 * 2**20
RINGS_TIMED = 10
"""Rounds of pairs that `bigray doctor` has time for, about."""
PATIENCE_S = 60.0
"""What would take longer, by the figures of fewer nodes, is not run."""
ENOUGH_S, MOST_REPEATS = 0.5, 20

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=NODES, default="full")
    parser.add_argument("--rounds", type=int, help="default: 3, with --size small 1")
    parser.add_argument("--simulated-only", action="store_true", help="start no Ray")
    parser.add_argument("--peers", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--peer", choices=LABELS, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(MEASURES[arguments.peer](arguments.nodes, Path(folder))))
        return
    if not arguments.simulated_only:
        rounds = arguments.rounds or (1 if arguments.size == "small" else 3)
        show_real(measure_real(arguments.peers, NODES[arguments.size], rounds), NODES[arguments.size])
    show_simulated(SIMULATED[arguments.size])


def measure_real(peers: Sequence[str], sizes: Sequence[int], rounds: int) -> dict[str, dict[int, list[Figures]]]:
    """Taking turns, a process and a cluster for each; by peer and number of nodes, the figures of each round."""
    found: dict[str, dict[int, list[Figures]]] = {peer: {nodes: [] for nodes in sizes} for peer in peers}
    for number in range(rounds):
        for nodes in sizes:
            for peer in peers:
                figures = run_in_own_process(__file__, "--peer", peer, "--nodes", str(nodes))
                found[peer][nodes].append(figures)
                tell(f"round {number + 1}: {LABELS[peer]} on {nodes} nodes: {figures['whole_s']:.2f} s")
    return found


# ---- real raylets; from here on in a process of its own


@contextlib.contextmanager
def raylets(count: int) -> Iterator[Any]:
    """A cluster of so many on this machine, the head among them, that this process is connected to."""
    import ray
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)
    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node})
    for _ in range(count - 1):
        cluster.add_node(**node)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="bigray", log_to_driver=False, logging_level="ERROR")
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure_bigray(nodes: int, folder: Path) -> Figures:
    os.chdir(Path(__file__).resolve().parents[1])  # where the example's data are found, by the workers too
    sys.path.insert(0, str(Path.cwd()))
    from bigray.cluster.connect import prepare_environment

    prepare_environment(joining=False)
    with raylets(nodes) as cluster:
        from bigray import train
        from bigray.cluster.capacity import connected_capacity
        from bigray.training.request import make_request
        from bigray.training.runner import training_trials
        from bigray.training.session import plan_for

        train(make_job(folder / "first"))
        figures: Figures = {}
        with watched(cluster, figures):
            began_s = time.monotonic()

            def listen(event: Any) -> None:
                if event.kind == "started":
                    figures.setdefault("started_s", time.monotonic() - began_s)

            train(make_job(folder / "second"), listener=listen)
        job = make_job(folder / "planned")
        request = make_request(job, training_trials(job))
        capacity = connected_capacity()
        assert len(capacity.nodes) == nodes, f"{nodes} nodes are expected, Ray has {len(capacity.nodes)}"
        figures["capacity_ms"] = middle_ms(connected_capacity)
        figures["plan_ms"] = middle_ms(lambda: plan_for(request, capacity))
    return figures


def make_job(storage: Path) -> Any:
    """The digits' MLP alone, which is one group of two workers on a cluster of any size."""
    from bigray.loading import load_job

    job = load_job("examples/digits/job.toml", [f"storage='{storage}'", f"training.epochs={EPOCHS}"])
    return job.model_copy(update={"models": {"mlp": job.models["mlp"]}})


def measure_trainer(nodes: int, folder: Path) -> Figures:
    import ray.train
    from ray.train.torch import TorchTrainer

    def do_nothing(config: dict[str, str]) -> None:
        import time
        from pathlib import Path

        import ray.train

        if ray.train.get_context().get_world_rank() == 0:
            Path(config["stamp"]).write_text(str(time.monotonic()))  # a clock that all processes of a machine share

    def fit(name: str) -> Path:
        stamp = folder / f"{name}.stamp"
        TorchTrainer(
            do_nothing,
            train_loop_config={"stamp": str(stamp)},
            scaling_config=ray.train.ScalingConfig(num_workers=2),
            run_config=ray.train.RunConfig(name=name, storage_path=str(folder / "runs")),
        ).fit()
        return stamp

    with raylets(nodes) as cluster:
        fit("first")
        figures: Figures = {}
        with watched(cluster, figures):
            began_s = time.monotonic()
            stamp = fit("second")
        figures["started_s"] = float(stamp.read_text()) - began_s
    return figures


MEASURES: dict[str, Callable[[int, Path], Figures]] = {"bigray": measure_bigray, "trainer": measure_trainer}


@contextlib.contextmanager
def watched(cluster: Any, figures: Figures) -> Iterator[None]:
    """Adds what the block takes of the driver, of the GCS and of the nodes, and the memory that they have before it."""
    gcs, nodes = processes_of(cluster)
    figures["gcs_mb"] = gcs.memory_info().rss / 2**20
    figures["raylet_mb"] = statistics.mean(node[0].memory_info().rss for node in nodes[1:]) / 2**20
    # agents and raylet of all nodes map the same libraries: each page counts once
    figures["node_mb"] = statistics.mean(sum(map(pss_bytes, node)) for node in nodes[1:]) / 2**20
    flat = [process for node in nodes for process in node]
    began_s, driver_s, gcs_s, nodes_s = time.monotonic(), time.process_time(), cpu_s(gcs), sum(map(cpu_s, flat))
    yield
    figures["whole_s"] = time.monotonic() - began_s
    figures["driver_cpu_s"] = time.process_time() - driver_s
    figures["gcs_cpu_s"] = cpu_s(gcs) - gcs_s
    figures["nodes_cpu_s"] = sum(map(cpu_s, flat)) - nodes_s


def processes_of(cluster: Any) -> tuple[Any, list[list[Any]]]:
    """The GCS; of each node, the head first, its raylet and behind it its agents, without the workers."""
    import psutil

    def find(node: Any, kind: str) -> Any:
        return psutil.Process(node.all_processes[kind][0].process.pid)

    raylets = [find(node, "raylet") for node in cluster.list_all_nodes()]
    nodes = [[raylet, *(child for child in raylet.children() if is_agent(child))] for raylet in raylets]
    return find(cluster.head_node, "gcs_server"), nodes


def is_agent(process: Any) -> bool:
    import psutil

    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a worker that has just ended
        return False
    return "agent" in command and "ray::" not in command and "default_worker" not in command


def pss_bytes(process: Any) -> float:
    """Resident memory, a page that several processes have divided among them."""
    return float(process.memory_full_info().pss)


def cpu_s(process: Any) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def middle_ms(call: Callable[[], Any]) -> float:
    found = []
    for _ in range(LOOKS):
        began_s = time.perf_counter()
        call()
        found.append((time.perf_counter() - began_s) * 1e3)
    return statistics.median(found)


def show_real(found: dict[str, dict[int, list[Figures]]], sizes: Sequence[int]) -> None:
    rows: list[tuple[str, ...]] = []
    for peer, by_nodes in found.items():
        for name, label in ROWS.items():
            if name not in by_nodes[sizes[0]][0]:
                continue  # the peer has no plan
            values = [statistics.median(figures[name] for figures in by_nodes[nodes]) for nodes in sizes]
            cells = [f"{value:,.3f}" if value < 100 else f"{value:,.0f}" for value in values]
            slope = "" if name in OF_ONE_NODE else f"{statistics.linear_regression(sizes, values).slope:+.4f}"
            rows.append((f"{LABELS[peer]}: {label}", *cells, slope))
    title = f"one job of two workers, by the number of raylets on this machine; median of {rounds_of(found)} rounds"
    print_table(title, ("", *(f"{nodes} nodes" for nodes in sizes), "each node adds"), rows)


def rounds_of(found: dict[str, dict[int, list[Figures]]]) -> int:
    return len(next(iter(next(iter(found.values())).values())))


# ---- simulated nodes


@dataclass(frozen=True)
class Simulated:
    """What bigray reckons for a cluster of so many nodes; made once, called again and again."""

    label: str
    prepare: Callable[[int], Callable[[], Any]]


def simulated() -> tuple[Simulated, ...]:
    return (
        Simulated("plan: one group of 2 workers", lambda nodes: planning(nodes, workers=2)),
        Simulated("plan: one group, a worker on every GPU", lambda nodes: planning(nodes, workers=4 * nodes)),
        Simulated("plan: a sweep, a group of 4 for each node", lambda nodes: planning(nodes, workers=4, trials=nodes)),
        Simulated("plan: 2 workers, 10 replicas", lambda nodes: planning(nodes, workers=2, replicas=10)),
        Simulated("plan: 2 workers, a replica for each node", lambda nodes: planning(nodes, workers=2, replicas=nodes)),
        Simulated("the plan's tables", tabling),
        Simulated("the plan as JSON", writing),
        Simulated("doctor: nodes named", naming),
        Simulated("doctor: all checks, all is well", lambda nodes: examining(nodes, is_well=True)),
        Simulated("doctor: all checks, a fault on every node", lambda nodes: examining(nodes, is_well=False)),
        Simulated("doctor: the report's table", reporting),
        Simulated(f"doctor: the first {RINGS_TIMED} rounds of pairs", pairing),
    )


def make_capacity(nodes: int) -> Any:
    """Of four GPUs and 32 CPUs each, of two types, some of them in use."""
    from bigray.cluster.capacity import Capacity, Node

    return Capacity(
        tuple(
            Node(
                cpus=32.0,
                gpus=4.0,
                free_cpus=float(32 - number % 5),
                free_gpus=4.0,
                free_memory_bytes=64 * 2.0**30,
                object_store_bytes=32 * 2.0**30,
                has_driver=number == 0,
                name=f"node-{number} ({number:06x})",
                accelerator="A100" if number % 2 else "H100",
            )
            for number in range(nodes)
        )
    )


def planning(nodes: int, workers: int, trials: int = 1, replicas: int = 0) -> Callable[[], Any]:
    from bigray.cluster.plan import LEG_ACTOR_BYTES, ServeNeeds, make_plan
    from bigray.specs import JobSpec

    job = JobSpec.model_validate(
        {
            "name": "simulated",
            "data": {"source": "rows.npz", "target": "label"},
            "models": {"mlp": {"factory": "bigray.models:mlp"}},
            "training": {"task": "classification", "epochs": 1, "global_batch_size": 4 * workers},
            "scaling": {"num_workers": workers, "gpus_per_worker": 1},
        }
    )
    capacity = make_capacity(nodes)
    serve = ServeNeeds(replicas, replicas, 1.0, 0.0) if replicas else None
    rows = {"train": 10**6, "validation": 10**5, "holdout": 10**5}
    actor_bytes = LEG_ACTOR_BYTES if trials > 1 else 0
    return lambda: make_plan(job, trials, rows, capacity, serve, data_bytes=2**30, trial_actor_bytes=actor_bytes)


def tabling(nodes: int) -> Callable[[], Any]:
    from rich.console import Console

    from bigray.plan_view import facts, nodes_table

    plan = planning(nodes, 4 * nodes)()
    console = Console(width=120, file=open(os.devnull, "w"))  # noqa: SIM115  # as long as the process

    def draw() -> None:
        console.print(nodes_table(plan))
        facts(plan)

    return draw


def writing(nodes: int) -> Callable[[], Any]:
    plan = planning(nodes, 4 * nodes)()
    return lambda: json.dumps(plan.to_json())


def make_facts(nodes: int, *, is_well: bool = True) -> Any:
    """What the doctor's probes would bring; where not all is well, an old torch and a full disk on every node."""
    from bigray.cluster.doctor.facts import Node, NodeFacts, NodeInRay, TokenFacts

    facts = NodeFacts(
        machine="",
        versions=VERSIONS if is_well else {**VERSIONS, "torch": "2.0.0"},
        token=TokenFacts("token", "/home/ray/.ray/auth_token", 0o600 if is_well else 0o644),
        plasma_folder="/dev/shm",
        shm_bytes=64 * 2**30 if is_well else 2**30,
        session_folder="/tmp/ray/session",
        disk_total_bytes=2**40,
        disk_free_bytes=2**39 if is_well else 2**30,
        interface="eth0",
        gloo_interface="eth0" if is_well else "eth1",
    )
    in_ray = (
        NodeInRay(f"{number:056x}", f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", 4.0, 32 * 2.0**30)
        for number in range(nodes)
    )
    return [Node(node.ip, node, replace(facts, machine=node.ip)) for node in in_ray]


VERSIONS = {"ray": "2.60.0", "torch": "2.9.0", "python": "3.11.7", "bigray": "1.0.0", "numpy": "2.3.0"}


def naming(nodes: int) -> Callable[[], Any]:
    from bigray.cluster.doctor.examine import named

    in_ray = [node.in_ray for node in make_facts(nodes)]
    return lambda: named(in_ray)


def examining(nodes: int, *, is_well: bool) -> Callable[[], Any]:
    from bigray.cluster.doctor import checks
    from bigray.cluster.doctor.facts import ClockFacts, DoorFacts, RingFacts, RingPlace, StorageFacts, TokenFacts

    examined = make_facts(nodes, is_well=is_well)
    names = [node.name for node in examined]
    answers: dict[str, int | None] = {"POST /api/jobs/": 401 if is_well else 200}
    doors = [DoorFacts("agent", f"{name}:52365", False, answers, name) for name in names]
    clocks = {name: ClockFacts(0.001 if is_well else 5.0, 0.001) for name in names}
    places = {name: RingPlace(1, 4 if is_well else 3) for name in names}
    pairs = zip(names[::2], names[1::2], strict=False)
    rings = [RingFacts(*pair, "gloo", 0.01 if is_well else None, "" if is_well else "refused") for pair in pairs]
    stored = StorageFacts("s3://runs", names[0], "0", dict.fromkeys(names, "0" if is_well else "1"))
    here = TokenFacts("token", "/home/ray/.ray/auth_token", 0o600)

    def check() -> list[Any]:
        return [
            *checks.check_answers(examined),
            *checks.check_versions(VERSIONS, examined),
            *checks.check_tokens(here, examined),
            *checks.check_doors(doors),
            *checks.check_clocks(clocks),
            *checks.check_memory(examined),
            *checks.check_disk(examined),
            *checks.check_gpus(examined, places),
            *checks.check_torch({} if is_well else dict.fromkeys(names, "no module")),
            *checks.check_rings(examined, rings, unmeasured=1),
            *checks.check_storage(stored),
        ]

    return check


def reporting(nodes: int) -> Callable[[], Any]:
    """Of a fault on every node, of which the checks tell the first ones."""
    from rich.console import Console

    from bigray.cluster.doctor.findings import Report
    from bigray.cluster.doctor.table import report_table, summary

    findings = tuple(examining(nodes, is_well=False)())
    report = Report("10.0.0.1:6379", tuple(node.name for node in make_facts(nodes)), findings, 10.0)
    console = Console(width=120, file=open(os.devnull, "w"))  # noqa: SIM115  # as long as the process

    def draw() -> None:
        console.print(report_table(report))
        summary(report)

    return draw


def pairing(nodes: int) -> Callable[[], Any]:
    from bigray.cluster.doctor.rings import rounds

    names = [node.name for node in make_facts(nodes)]
    return lambda: list(islice(rounds(names), RINGS_TIMED))


def best_s(call: Callable[[], Any]) -> float:
    """Processor time, the least of several calls; of one alone where that takes long."""
    times: list[float] = []
    gc.collect()  # what others have left behind
    while len(times) < MOST_REPEATS and sum(times) < ENOUGH_S:
        began_s = time.process_time()
        call()
        times.append(time.process_time() - began_s)
    return min(times)


def is_too_long(seconds: Sequence[float]) -> bool:
    """Whether the next number of nodes would take longer than there is patience for, if it goes on as it went."""
    return len(seconds) > 1 and seconds[-1] * max(1.0, seconds[-1] / seconds[-2]) > PATIENCE_S


def show_simulated(sizes: Sequence[int]) -> None:
    rows = []
    for one in simulated():
        seconds: list[float] = []
        for nodes in sizes:
            if is_too_long(seconds):
                break
            seconds.append(best_s(one.prepare(nodes)))
        tell(f"simulated: {one.label}: {', '.join(f'{each * 1e3:.3f}' for each in seconds)} ms")
        cells = [f"{each * 1e3:,.3f}" for each in seconds] + ["not run"] * (len(sizes) - len(seconds))
        rows.append((one.label, *cells, slope_of(seconds, sizes)))
    title = "SIMULATED nodes: milliseconds of processor time, of one call"
    print_table(title, ("", *(f"{nodes:,} nodes" for nodes in sizes), "slope"), rows)


def slope_of(seconds: Sequence[float], sizes: Sequence[int]) -> str:
    if len(seconds) < 2:
        return ""
    before, last = len(seconds) - 2, len(seconds) - 1
    return f"{math.log(seconds[last] / seconds[before]) / math.log(sizes[last] / sizes[before]):+.2f}"


if __name__ == "__main__":
    main()
