"""A driver in a process of its own, so that its memory is known: `python -m tests.integration.streaming_driver JOB`.

Prints one JSON object: the largest resident memory of the driver and of the workers, in bytes, and the metric.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bigray.host_memory import fields_of
from bigray.specs import JobSpec
from bigray.training.runner import train


def main() -> None:
    job = JobSpec.model_validate_json(Path(sys.argv[1]).read_text())
    board = train(job)
    driver = fields_of(Path("/proc/self/status"))["VmHWM"] * 1024
    workers = max(trial.ledger.peak_rss_bytes for trial in board.trials)
    print(json.dumps({"driver": driver, "workers": workers, "metrics": board.winner.metrics}))


if __name__ == "__main__":
    main()
