"""Ray Serve by somebody who knows it: `python ray_tuned_server.py BUNDLE PORT [OPTIONS]`.

orjson on the raw body, ONNX Runtime, no access log, and no `@serve.batch`, whose queue costs more than a small model;
the flags for HAProxy and throughput are in the environment that starts it.
"""

import orjson
from onnx_model import quickest_model
from ray import serve
from ray_program import headers_of, serve_until_ended
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(max_ongoing_requests=64, logging_config={"enable_access_log": False, "log_level": "WARNING"})
class Model:
    def __init__(self, location: str) -> None:
        self.model = quickest_model(location)
        self.headers = headers_of(self.model.version)

    async def __call__(self, request: Request) -> Response:
        body = await request.body()
        if request.headers.get("content-type") == "application/octet-stream":
            return Response(self.model.raw(body), media_type="application/octet-stream", headers=self.headers)
        images = [record["image"] for record in orjson.loads(body)["records"]]
        document = orjson.dumps({"predictions": self.model.records(images)}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(document, media_type="application/json", headers=self.headers)


if __name__ == "__main__":
    serve_until_ended(Model)
