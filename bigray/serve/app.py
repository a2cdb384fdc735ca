"""`bigray.serve.app:build`, the import path of every serve file: also for Ray's own `serve run` and `serve deploy`."""

# no `from __future__ import annotations` here: Ray looks for a pydantic class, not for its name, in the signature

from ray import serve

from bigray.serve.config import BundleArgs
from bigray.serve.replica import Model


def build(args: BundleArgs) -> serve.Application:
    """The application that serves the bundle named in `args` (Ray calls this in a task on the cluster)."""
    return Model.bind(args)  # type: ignore[attr-defined, unused-ignore]
