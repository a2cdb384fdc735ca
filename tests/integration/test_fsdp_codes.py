"""Numbers of tokens reach a model that is cut over workers as they are, in any precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bigray.models import language_model
from bigray.training.fsdp import shard_module
from bigray.training.loop import Worker


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_large_vocabulary_is_not_rounded(precision: str) -> None:
    torch.manual_seed(0)
    model = language_model((4,), 5000, width=16, depth=1, heads=2).eval()
    codes = torch.tensor([[257.0, 513.0, 2049.0, 4999.0]])
    with torch.no_grad():
        expected = model(codes)
        found = shard_module(model, Worker(0, 1, torch.device("cpu")), precision)(codes)

    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
