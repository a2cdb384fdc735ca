"""The Serve deployment: one bundle loaded in one process (replica)."""

from __future__ import annotations

from ray import serve

from bigray.bundle import ModelBundle
from bigray.inference import Predictor
from bigray.serve.asgi import ModelApp
from bigray.serve.batching import Batcher, is_slow
from bigray.serve.config import BundleArgs


@serve.deployment(
    name="Model",
    # requests gather into batches in the replica, so it must be handed more of them than one batch holds
    max_ongoing_requests=256,
    # one log line a request costs as much as the prediction
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)
@serve.ingress()
class Model:
    """Loads and verifies the bundle when the replica starts; Serve then hands HTTP requests to `ModelApp`."""

    def __init__(self, args: BundleArgs) -> None:
        bundle = ModelBundle.load(args.bundle)
        predictor = Predictor(bundle, num_threads=args.num_threads, allow_factories=args.allow_factories)
        example = bundle.manifest.inputs.from_records([bundle.manifest.example])
        batcher = Batcher(
            predictor.run, args.max_batch_size, use_thread=is_slow(predictor.run, example, args.max_batch_size)
        )
        self._app = ModelApp(bundle, predictor.backend, batcher, int(args.max_body_mb * 2**20))

    def __serve_build_asgi_app__(self) -> ModelApp:
        return self._app
