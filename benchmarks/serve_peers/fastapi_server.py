"""FastAPI and uvicorn in one process, without batches: `python fastapi_server.py BUNDLE PORT`."""

import sys

import uvicorn
from fastapi import FastAPI, Request, Response
from model import TorchModel
from pydantic import BaseModel


class Record(BaseModel):
    image: list[float]


class Body(BaseModel):
    records: list[Record]


app = FastAPI()


@app.post("/predict")
async def predict(body: Body) -> dict:
    return {"predictions": app.state.model([record.image for record in body.records])}


@app.post("/raw")
async def predict_raw(request: Request) -> Response:
    return Response(app.state.model.raw(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    app.state.model = TorchModel(sys.argv[1])
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
