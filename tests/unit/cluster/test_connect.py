from __future__ import annotations

import pytest

from bigray.cluster.connect import keep_stdout_for_results


def test_what_the_raylet_reports_goes_to_standard_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # puts Ray's own back afterwards
    keep_stdout_for_results()
    keep_stdout_for_results()
    worker.print_to_stdstream({"lines": ["a worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    printed = capsys.readouterr()

    assert printed.out == ""
    assert printed.err.count("a worker died") == 1
