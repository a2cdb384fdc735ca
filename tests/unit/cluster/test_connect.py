from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from bigray.cluster.connect import keep_stdout_for_results, lost_head


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


def test_a_head_is_lost_where_nothing_answers_at_its_address_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    assert lost_head() is None  # no cluster has been joined
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        assert lost_head() is None
    assert lost_head() == address
