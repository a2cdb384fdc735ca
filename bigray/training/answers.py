"""What workers tell the switchboard and the driver of a group and of a bundle.

Apart from the modules that make these values: whoever receives one imports its module, and those import torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Address:
    """Where rank 0 keeps the store through which the ranks find each other."""

    host: str
    port: int


@dataclass(frozen=True)
class Exported:
    """What was written."""

    uri: str
    why_no_onnx: str | None
