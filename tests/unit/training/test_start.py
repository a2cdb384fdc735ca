"""What the processes of a run import before they have anything to train: each second of it is at every start."""

from __future__ import annotations

import pytest

from tests.unit.training.own_process import printed_by

PARTS = {
    "driver": ["session", "groups", "runner", "trainer", "entry", "answers"],
    "Ray Train's controller": ["trainer", "backend", "entry", "setup", "barrier"],
    "switchboard": ["switchboard", "commands", "heartbeat", "answers"],
}


@pytest.mark.parametrize("process", PARTS)
def test_a_process_that_trains_nothing_imports_no_torch(process: str) -> None:
    imports = "; ".join(f"import bigray.training.{module}" for module in PARTS[process])

    assert _loaded_by(imports, "torch") == "False"


def test_a_worker_imports_what_cuts_a_model_only_where_one_is_cut() -> None:
    assert _loaded_by("import bigray.training.worker", "torch") == "True"
    assert _loaded_by("import bigray.training.worker", "torch.distributed.fsdp") == "False"


def _loaded_by(imports: str, module: str) -> str:
    return printed_by(f"import sys; {imports}; print({module!r} in sys.modules)")
