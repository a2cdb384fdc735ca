"""R2 that has a value for a single row too; apart from the tasks, as it needs torchmetrics to be defined (worker)."""

from __future__ import annotations

import torch
from torchmetrics.regression import R2Score


class R2(R2Score):  # type: ignore[misc]
    """torchmetrics' R2; of one row, of which it is not defined, 0, where torchmetrics raises at the end of an epoch."""

    def compute(self) -> torch.Tensor:
        if self.total < 2:
            return torch.zeros_like(self.residual)
        return super().compute()  # type: ignore[no-any-return]
