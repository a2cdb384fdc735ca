from __future__ import annotations

import pytest

from bigray.bundle import ModelBundle
from bigray.data.features import Column
from bigray.inference import Predictor
from bigray.serve.sample import write_sample_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Classification of 2 x 3 images, labels 'cat', 'dog' and 'fox'; without ONNX, which takes seconds to export."""
    root = tmp_path_factory.mktemp("bundles")
    location = write_sample_bundle(
        str(root),
        name="animals",
        columns=(Column(name="image", shape=(2, 3)),),
        class_names=("cat", "dog", "fox"),
        params={"hidden": [4]},
        onnx=False,
    )
    return ModelBundle.load(location)


@pytest.fixture(scope="session")
def regression_bundle(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Regression from two scalar columns."""
    root = tmp_path_factory.mktemp("bundles")
    columns = (Column(name="width"), Column(name="height"))
    return ModelBundle.load(
        write_sample_bundle(str(root), name="area", columns=columns, class_names=(), params={"hidden": [4]}, onnx=False)
    )


@pytest.fixture(scope="session")
def predictor(bundle: ModelBundle) -> Predictor:
    return Predictor(bundle)
