"""LitServe with batches of up to 64 gathered for 2 ms: `python litserve_server.py BUNDLE PORT`."""

import sys

import litserve
from model import TorchModel


class ModelApi(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = TorchModel(sys.argv[1])

    def decode_request(self, request: dict) -> list[float]:
        return request["records"][0]["image"]

    def batch(self, inputs: list[list[float]]) -> list[list[float]]:
        return inputs

    def predict(self, x: list[list[float]]) -> list[dict]:
        return self.model(x)

    def unbatch(self, output: list[dict]) -> list[dict]:
        return output

    def encode_response(self, output: dict) -> dict:
        return {"predictions": [output]}


if __name__ == "__main__":
    server = litserve.LitServer(ModelApi(max_batch_size=64, batch_timeout=0.002), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning")
