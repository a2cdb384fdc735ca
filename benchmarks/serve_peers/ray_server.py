"""Ray Serve as its guide to batching shows it: `python ray_server.py BUNDLE PORT`.

Batches hold as many requests as the client has connections, so that a full one never waits for the timer, and
`max_ongoing_requests` is raised above that: with Serve's default of 5 it is several times slower.
"""

import signal
import sys

import ray
from model import TorchModel
from ray import serve
from starlette.requests import Request


@serve.deployment(max_ongoing_requests=64)
class Model:
    def __init__(self, location: str) -> None:
        self.model = TorchModel(location)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def predict(self, images: list[list[float]]) -> list[dict]:
        return self.model(images)

    async def __call__(self, request: Request) -> dict:
        body = await request.json()
        return {"predictions": [await self.predict(record["image"]) for record in body["records"]]}


if __name__ == "__main__":
    ray.init("local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Model.bind(sys.argv[1]))
    try:
        signal.pause()
    except KeyboardInterrupt:
        serve.shutdown()
        ray.shutdown()
