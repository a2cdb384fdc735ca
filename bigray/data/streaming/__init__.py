"""Parquet that is larger than memory: gone through in batches, and prepared into files of rows. Runs on the driver."""

from __future__ import annotations

from bigray.data.streaming.decision import to_stream
from bigray.data.streaming.preparing import prepare_streamed

__all__ = ["prepare_streamed", "to_stream"]
