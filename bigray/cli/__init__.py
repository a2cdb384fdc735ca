"""The command line. Heavy modules are imported inside the commands."""

from __future__ import annotations

import os
import sys

import bigray.cli.bundles
import bigray.cli.cluster
import bigray.cli.data
import bigray.cli.doctor
import bigray.cli.jobs
import bigray.cli.serving
import bigray.cli.training  # noqa: F401  # each registers its commands
from bigray.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point."""
    sys.path.insert(0, os.getcwd())  # 'package.module:function' in a job file is found as with `python -m`
    app()
