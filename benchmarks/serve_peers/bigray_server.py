"""bigray as shipped: `python bigray_server.py BUNDLE PORT [OPTIONS]`.

OPTIONS is JSON: `file`, a serve file (`serve/local.yaml`); `args` and `deployment`, changes to those parts of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml
from commands import obey

from bigray.cluster.connect import connect
from bigray.presets import find_preset
from bigray.serve import runner
from bigray.serve.config import ServeSpec


def read_spec(port: int, file: str = "serve/local.yaml", **changes: Mapping[str, Any]) -> ServeSpec:
    document = yaml.safe_load(find_preset(file).read_text())
    application = document["applications"][0]
    application["args"] = merged(application["args"], changes.get("args", {}))
    application["deployments"][0] = merged(application["deployments"][0], changes.get("deployment", {}))
    return ServeSpec.model_validate(document).with_port(port)


def merged(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The document with these keys changed, in objects within objects too."""
    inner = {key: merged(document[key], value) for key, value in changes.items() if isinstance(document.get(key), dict)}
    return {**document, **changes, **inner}


if __name__ == "__main__":
    spec = read_spec(int(sys.argv[2]), **(json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
    with connect():
        runner.deploy(sys.argv[1], spec)
        obey({"deploy": lambda bundle: runner.deploy(bundle, spec, force=True).version})
        runner.shutdown()
