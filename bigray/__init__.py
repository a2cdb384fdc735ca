"""bigray: one job file from data through Ray Train and Ray Tune to an autoscaling endpoint on Ray Serve."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigray.bundle import ModelBundle
    from bigray.cluster.connect import connect
    from bigray.errors import BigrayError
    from bigray.inference import Predictor
    from bigray.loading import load_job, load_search
    from bigray.results import Leaderboard, Verification
    from bigray.serve.client import Client
    from bigray.serve.config import load_serve
    from bigray.specs import JobSpec, SearchSpec
    from bigray.training.runner import train
    from bigray.tuning.runner import tune
    from bigray.verification import verify
    from bigray.workflow import deploy, plan

__all__ = [
    "BigrayError",
    "Client",
    "JobSpec",
    "Leaderboard",
    "ModelBundle",
    "Predictor",
    "SearchSpec",
    "Verification",
    "connect",
    "deploy",
    "load_job",
    "load_search",
    "load_serve",
    "plan",
    "train",
    "tune",
    "verify",
]

_HOME = {
    "BigrayError": "errors",
    "Client": "serve.client",
    "JobSpec": "specs",
    "Leaderboard": "results",
    "ModelBundle": "bundle",
    "Predictor": "inference",
    "SearchSpec": "specs",
    "Verification": "results",
    "connect": "cluster.connect",
    "deploy": "workflow",
    "load_job": "loading",
    "load_search": "loading",
    "load_serve": "serve.config",
    "plan": "workflow",
    "train": "training.runner",
    "tune": "tuning.runner",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import bigray` alone costs no Ray and no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'bigray' has no attribute '{name}'")
    return getattr(importlib.import_module(f"bigray.{_HOME[name]}"), name)
