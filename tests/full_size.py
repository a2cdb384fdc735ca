"""What runs with `BIGRAY_FULL=1` only."""

import os

import pytest

IS_FULL = os.environ.get("BIGRAY_FULL") == "1"
full_size = pytest.mark.skipif(not IS_FULL, reason="takes minutes; with BIGRAY_FULL=1")
