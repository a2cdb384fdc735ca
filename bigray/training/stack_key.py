"""Which trials may share a stack: decided on the driver, from settings alone (no torch)."""

from __future__ import annotations

from bigray.specs import TrialSpec, digest

PER_LANE = frozenset({"lr", "weight_decay", "momentum", "lr_scaling", "lr_batch_size"})
"""Settings in which the lanes of a stack may differ: each lane has its own number, and the operations are the same."""


def stack_key(trial: TrialSpec) -> str:
    """Equal for trials that may share a stack: the same model and seed, and the same settings but for `PER_LANE`."""
    document = trial.model_dump(mode="json", exclude={"trial_id": True, "training": set(PER_LANE)})
    return digest(document)
