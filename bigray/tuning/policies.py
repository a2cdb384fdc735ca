"""The scheduler that a search file names."""

from __future__ import annotations

from typing import Literal

from bigray.specs import SearchSpec
from bigray.tuning.asha import Asha
from bigray.tuning.pbt import Pbt
from bigray.tuning.policy import MedianStopping, Policy, ToTheEnd


def make_policy(search: SearchSpec, mode: Literal["max", "min"], seed: int) -> Policy:
    match search.scheduler:
        case "asha":
            return Asha(search, mode)
        case "median":
            return MedianStopping(search, mode)
        case "pbt":
            return Pbt(search, mode, seed)
        case "none":
            return ToTheEnd()
