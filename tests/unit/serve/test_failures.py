from __future__ import annotations

from bigray.serve.failures import first_error_line

TRACEBACK = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:model:Model.initialize_and_get_metadata() (pid=1, ip=192.0.2.2)
  File "replica.py", line 1, in initialize
    self._forward = load()
bigray.errors.DeployError: bundle of run 'r': has no model.onnx
"""


def test_the_replicas_own_error_is_found():
    assert first_error_line(TRACEBACK) == "DeployError: bundle of run 'r': has no model.onnx"


def test_text_without_a_traceback_gives_its_first_line():
    assert first_error_line("\n waiting for resources \nmore") == "waiting for resources"
    assert first_error_line("") == ""
