"""Which commands find the same run."""

from pathlib import Path

import pytest

from bigray.training.request import make_request
from bigray.training.runner import training_trials
from tests.integration.jobs import make_job


def test_a_run_is_another_one_when_the_file_of_its_factory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "import torch\n\ndef net(input_shape, num_outputs):\n    return torch.nn.Linear(input_shape[0], num_outputs)\n"
    )
    file = tmp_path / "my_net_for_run_id.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    job = make_job(tmp_path, models={"net": {"factory": "my_net_for_run_id:net"}})
    before = make_request(job, training_trials(job)).run_id
    assert make_request(job, training_trials(job)).run_id == before
    file.write_text(source + "# wider soon\n")
    assert make_request(job, training_trials(job)).run_id != before
