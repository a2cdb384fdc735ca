"""BentoML with adaptive batches: `python bentoml_server.py BUNDLE PORT`, in a virtual environment of its own.

Needs neither bigray nor torch. An answer is the list of predictions, since a batched API returns what it is given one
for one.
"""

import os
import sys
from pathlib import Path

import bentoml
from onnx_model import OnnxModel

BUNDLE = "BENCHMARK_BUNDLE"


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Model:
    def __init__(self) -> None:
        self.model = OnnxModel(os.environ[BUNDLE])

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def predict(self, records: list[dict]) -> list[dict]:
        answers = self.model.records([record["image"] for record in records])
        return [{**answer, "probabilities": answer["probabilities"].tolist()} for answer in answers]


if __name__ == "__main__":
    os.environ |= {BUNDLE: sys.argv[1], "BENTOML_DO_NOT_TRACK": "True"}
    address = ["--host", "127.0.0.1", "--port", sys.argv[2], "--working-dir", str(Path(__file__).parent)]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Model", *address])
