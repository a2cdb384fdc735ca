"""What a serve file may say about the number of replicas: the `policy_kwargs` of bigray's autoscaling policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScalingSettings(BaseModel):
    """How many replicas a load gets, and how soon."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target_utilisation: float = Field(default=0.7, ge=0.1, le=0.8)
    """Share of a replica's capacity to use; above 0.8 the queue of even a steady stream is longer than its work."""
    max_queue_age_s: float = Field(default=0.25, gt=0)
    """A request that waits longer than this asks for one more replica, whatever the utilisation."""
    drain_within_s: float = Field(default=5.0, gt=0)
    """A backlog that the replicas at hand work off within this time asks for no more of them."""
    spare: int = Field(default=0, ge=0)
    """Warm replicas kept beyond the need."""
    scale_down_after_s: float = Field(default=30.0, gt=0)
    """The highest need of this time counts when replicas are let go."""
    scale_to_zero_after_s: float = Field(default=300.0, gt=0)
    """Without any request for this time the last replica goes too, where `min_replicas` is 0."""
    min_replicas: int = Field(default=1, ge=0)
    """In Serve the bounds of its own `autoscaling_config` count instead."""
    max_replicas: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> ScalingSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}")
        return self


def read_settings(
    policy_kwargs: Mapping[str, Any], *, min_replicas: int, max_replicas: int, place: str
) -> ScalingSettings:
    """The settings of a serve file; `place` names the file in messages.

    Raises:
        SpecError: with one line for each key that is unknown or out of range.
    """
    from bigray.loading import validate_document  # not for Serve's controller, which imports this module too

    document = {**policy_kwargs, "min_replicas": min_replicas, "max_replicas": max_replicas}
    return validate_document(ScalingSettings, document, place)
