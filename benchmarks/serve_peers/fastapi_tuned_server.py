"""FastAPI by somebody who knows it: `python fastapi_tuned_server.py BUNDLE PORT`.

orjson on the raw body instead of pydantic, ONNX Runtime on one thread, uvloop and httptools, no access log.
"""

import sys

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from onnx_model import quickest_model

app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> Response:
    images = [record["image"] for record in orjson.loads(await request.body())["records"]]
    document = {"predictions": app.state.model.records(images)}
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


@app.post("/raw")
async def predict_raw(request: Request) -> Response:
    return Response(app.state.model.raw(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    app.state.model = quickest_model(sys.argv[1])
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[2]),
        log_level="warning",
        access_log=False,
        loop="uvloop",
        http="httptools",
    )
