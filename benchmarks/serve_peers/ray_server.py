"""Ray Serve as its guide to batching shows it: `python ray_server.py BUNDLE PORT [OPTIONS]`.

Batches hold as many requests as the client has connections, so that a full one never waits for the timer, and
`max_ongoing_requests` is raised above that: with Serve's default of 5 it is several times slower.
"""

from typing import Any

from model import TorchModel
from ray import serve
from ray_program import headers_of, serve_until_ended
from starlette.requests import Request
from starlette.responses import JSONResponse


@serve.deployment(max_ongoing_requests=64)
class Model:
    def __init__(self, location: str) -> None:
        self.model = TorchModel(location)
        self.headers = headers_of(self.model.version)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def predict(self, images: list[Any]) -> list[dict]:
        return self.model(images)

    async def __call__(self, request: Request) -> JSONResponse:
        body = await request.json()
        answers = [await self.predict(record["image"]) for record in body["records"]]
        return JSONResponse({"predictions": answers}, headers=self.headers)


if __name__ == "__main__":
    serve_until_ended(Model)
