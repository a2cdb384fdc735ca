"""Clusters of several raylets on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bigray.cluster.connect import prepare_environment


@contextlib.contextmanager
def ray_cluster(head: dict[str, Any], *nodes: dict[str, Any]) -> Iterator[Any]:
    """Ray's own test cluster, to which this process is connected.

    With a token like every other Ray of the test run: a process that has had one asks for it ever after, also where
    `RAY_AUTH_MODE` says otherwise, and the cluster's own calls to this driver would be refused.
    """
    prepare_environment(joining=False)
    import ray
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(None, create_token_if_missing=True)
    cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    for node in nodes:
        cluster.add_node(**node)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="bigray", log_to_driver=False)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
