from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from bigray.cluster.connect import connect, keep_stdout_for_results
from bigray.errors import ClusterError


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


def test_a_head_that_is_gone_is_told_instead_of_what_ray_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    failure = ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable", None)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=address))
        with pytest.raises(ray.exceptions.ActorUnavailableError), connect():
            raise failure
    with pytest.raises(ClusterError) as told, connect():
        raise failure

    assert str(told.value) == (
        f"{address}: the head of the cluster is gone; start it, or join another, and give the command again"
    )
