"""An endpoint without Ray: one bundle in one process, with the application of a replica."""

from __future__ import annotations

from collections.abc import Sequence

from bigray.serve.asgi import ModelApp
from bigray.serve.assembly import assemble
from bigray.serve.config import BundleArgs


def standalone_app(bundle: str, *, num_threads: int = 1, allow_factories: Sequence[str], **args: object) -> ModelApp:
    """The ASGI application of one bundle; `args` are further keys of a serve file's `args`.

    Raises:
        CorruptFile, StorageError, DeployError: the bundle cannot be served.
    """
    settings = BundleArgs.model_validate({"bundle": bundle, "allow_factories": tuple(allow_factories), **args})
    return assemble(bundle, settings, num_threads=num_threads).app
