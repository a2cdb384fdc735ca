"""bigray as shipped: `python bigray_server.py BUNDLE PORT`."""

from __future__ import annotations

import signal
import sys

from bigray.cluster.connect import connect
from bigray.serve import runner
from bigray.serve.config import load_serve

if __name__ == "__main__":
    with connect():
        runner.deploy(sys.argv[1], load_serve("serve/local.yaml").with_port(int(sys.argv[2])))
        try:
            signal.pause()
        except KeyboardInterrupt:
            runner.shutdown()
