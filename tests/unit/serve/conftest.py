from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.inference import Predictions, Predictor
from bigray.serve.batching import Batcher, Capacity, QueueLimits
from bigray.serve.config import ServeSpec, load_serve
from bigray.serve.loaded import LoadedModel
from bigray.serve.release import registry
from bigray.serve.release.record import Release
from bigray.serve.release.registry import MemoryKeyValue
from bigray.serve.sample import write_sample_bundle

CLASSES = ("cat", "dog", "fox")


@pytest.fixture(scope="session")
def make_release(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Release]:
    """Versions of one model, by seed: classification of 2 x 3 images, without ONNX, which takes seconds to export."""
    written: dict[int, Release] = {}

    def make(seed: int) -> Release:
        if seed not in written:
            location = write_sample_bundle(
                str(tmp_path_factory.mktemp("bundles")),
                name="animals",
                columns=(Column(name="image", shape=(2, 3)),),
                class_names=CLASSES,
                params={"hidden": [4]},
                seed=seed,
                onnx=False,
            )
            written[seed] = Release(version=ModelBundle.load(location).version, bundle=location)
        return written[seed]

    return make


@pytest.fixture(scope="session")
def release(make_release: Callable[[int], Release]) -> Release:
    """The first version."""
    return make_release(0)


@pytest.fixture
def a(make_release: Callable[[int], Release]) -> Release:
    return make_release(0)


@pytest.fixture
def b(make_release: Callable[[int], Release]) -> Release:
    return make_release(1)


@pytest.fixture
def c(make_release: Callable[[int], Release]) -> Release:
    return make_release(2)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryKeyValue:
    """What Ray's head node would keep."""
    store = MemoryKeyValue()
    monkeypatch.setattr(registry, "RayKeyValue", lambda: store)
    return store


@pytest.fixture
def spec() -> ServeSpec:
    """A serve file of application 'model'."""
    return load_serve("serve/local.yaml").with_bundle("new")


@pytest.fixture(scope="session")
def bundle(release: Release) -> ModelBundle:
    """Classification of 2 x 3 images, labels 'cat', 'dog' and 'fox'."""
    return ModelBundle.load(release.bundle)


@pytest.fixture(scope="session")
def regression_location(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Regression from two scalar columns."""
    root = tmp_path_factory.mktemp("bundles")
    columns = (Column(name="width"), Column(name="height"))
    return write_sample_bundle(
        str(root), name="area", columns=columns, class_names=(), params={"hidden": [4]}, onnx=False
    )


@pytest.fixture(scope="session")
def regression_bundle(regression_location: str) -> ModelBundle:
    return ModelBundle.load(regression_location)


@pytest.fixture(scope="session")
def predictor(bundle: ModelBundle) -> Predictor:
    return Predictor(bundle)


@pytest.fixture(scope="session")
def make_model(bundle: ModelBundle) -> Callable[..., LoadedModel]:
    """A model as a replica holds it, real but for what it answers: `label`, or what `run` makes of the rows."""

    def make(
        version: str = "a" * 12,
        label: str = "cat",
        *,
        name: str = "animals",
        run: Callable[[np.ndarray], Predictions] | None = None,
        is_slow: bool = False,
        max_rows: int = 64,
        seconds_per_row: float = 1e-4,
        limits: QueueLimits | None = None,
        nbytes: int = 100,
    ) -> LoadedModel:
        batcher = Batcher(
            run or (lambda rows: labelled(label, len(rows))), Capacity(max_rows, seconds_per_row, is_slow), limits
        )
        return LoadedModel(name, bundle.manifest, version, f"/bundles/{version}", "torch", batcher, nbytes)

    return make


def labelled(label: str, num_rows: int) -> Predictions:
    row = [1.0 if name == label else 0.0 for name in CLASSES]
    return Predictions([label] * num_rows, np.array([row] * num_rows, np.float32), None)
