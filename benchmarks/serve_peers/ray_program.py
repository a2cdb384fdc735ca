"""What the programs that serve by plain Ray Serve share: `python PROGRAM.py BUNDLE PORT [OPTIONS]`.

OPTIONS is JSON: `{"deployment": {...}}` for `Deployment.options`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from commands import obey
from ray import serve


def serve_until_ended(deployment: Any) -> None:
    bundle, port = sys.argv[1], int(sys.argv[2])
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    ray.init("local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def deploy(location: str) -> None:
        serve.run(deployment.options(**options.get("deployment", {})).bind(location))

    deploy(bundle)
    obey({"deploy": deploy})
    serve.shutdown()
    ray.shutdown()


def headers_of(version: str) -> dict[str, str]:
    """Which replica answers, and with which version (replica)."""
    return {"x-replica": serve.get_replica_context().replica_tag, "x-version": version}
