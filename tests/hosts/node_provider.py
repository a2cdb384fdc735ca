"""A cloud of hosts for Ray's autoscaler: it asks the test's process, which brings them up, by files in a folder.

Runs in the autoscaler's process on the head, whose settings name it (`provider: {type: external, module: ...}`); what
answers it is `autoscaled.Cloud`. Neither imports the other's half: only these names and the files are common.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

MODULE = "tests.hosts.node_provider.HostProvider"
HEAD = "head"
"""Id and kind of the one node that no autoscaler starts, but has to know."""
ANSWER_S = 60.0
EVERY_S = 0.05
NODES, ASKED, ANSWERED = "nodes.json", "asked", "answered"


class LaunchRefused(Exception):
    """The cloud has no such host just now."""


class HostProvider(NodeProvider):  # type: ignore[misc]
    """Every call reads the files anew, so that it may come from any thread."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._folder = Path(provider_config["folder"])

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return [
            node_id for node_id, node in read_nodes(self._folder).items() if tag_filters.items() <= node["tags"].items()
        ]

    def is_running(self, node_id: str) -> bool:
        return bool(read_nodes(self._folder).get(node_id, {}).get("is_running", False))

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in read_nodes(self._folder)

    def node_tags(self, node_id: str) -> dict[str, str]:
        """None of a node that has gone since it was listed: the autoscaler then leaves it out of account."""
        return dict(read_nodes(self._folder).get(node_id, {}).get("tags", {}))

    def internal_ip(self, node_id: str) -> str | None:
        return read_nodes(self._folder).get(node_id, {}).get("address")

    def external_ip(self, node_id: str) -> str | None:
        return self.internal_ip(node_id)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Only the first autoscaler changes tags, and only where it sets nodes up itself, which it is told not to."""
        raise NotImplementedError("tags of hosts stay as they were when these were launched")

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> None:
        """Returns once the hosts are listed; they are still coming up then.

        Raises:
            LaunchRefused: none of them comes.
        """
        request = {"do": "launch", "tags": tags, "count": count, "resources": resources, "labels": labels}
        if (refusal := ask(self._folder, request)) is not None:
            raise LaunchRefused(refusal)

    def terminate_node(self, node_id: str) -> None:
        self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> None:
        if (refusal := ask(self._folder, {"do": "terminate", "nodes": list(node_ids)})) is not None:
            raise RuntimeError(refusal)


def head_entry(address: str) -> dict[str, Any]:
    """As one of `write_nodes`."""
    tags = {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
        TAG_RAY_USER_NODE_TYPE: HEAD,
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
    }
    return {"tags": tags, "address": address, "is_running": True}


def kind_of(tags: Mapping[str, str]) -> str:
    """The type of node that the autoscaler's settings describe."""
    return tags[TAG_RAY_USER_NODE_TYPE]


def read_nodes(folder: Path) -> dict[str, dict[str, Any]]:
    """Tags, address and whether it is up, by id, of each node that was launched and not terminated since."""
    nodes: dict[str, dict[str, Any]] = json.loads((folder / NODES).read_text())
    return nodes


def write_nodes(folder: Path, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    _write(folder / NODES, nodes)


def ask(folder: Path, request: Mapping[str, Any]) -> str | None:
    """Ask the test's process; why it refuses, or None where it does what is asked.

    Raises:
        TimeoutError: it does not answer.
    """
    # the time first, so that names sort as they came
    name = f"{time.time_ns()}-{uuid.uuid4().hex}.json"
    _write(folder / ASKED / name, request)
    deadline = time.monotonic() + ANSWER_S
    while not (folder / ANSWERED / name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer to {request}")
        time.sleep(EVERY_S)
    refusal: str | None = json.loads((folder / ANSWERED / name).read_text())["refusal"]
    return refusal


def take_request(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The oldest request that has no answer yet, and its name."""
    waiting = sorted({file.name for file in (folder / ASKED).glob("*.json")} - _names(folder / ANSWERED))
    return (waiting[0], json.loads((folder / ASKED / waiting[0]).read_text())) if waiting else None


def answer(folder: Path, name: str, refusal: str | None) -> None:
    _write(folder / ANSWERED / name, {"refusal": refusal})


def make_folders(folder: Path) -> None:
    for kind in (ASKED, ANSWERED):
        (folder / kind).mkdir(parents=True)


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.json")}


def _write(file: Path, document: Mapping[str, Any]) -> None:
    """At once or not at all, for whoever reads meanwhile."""
    unfinished = file.with_suffix(f".{uuid.uuid4().hex}")
    unfinished.write_text(json.dumps(document))
    os.replace(unfinished, file)
