from __future__ import annotations

import os
import subprocess
import sys

from bigray.tuning.runner import AWS_KEYS

CODE = """
from ray.tune.execution import class_cache

from bigray.tuning.runner import keep_keys_private

class Trainable: ...

def environment():
    return class_cache._ActorClassCache().get(Trainable)._default_options["runtime_env"]["env_vars"]

print(sorted(environment().items()))
keep_keys_private()
print(sorted(environment().items()))
"""


def test_the_credentials_of_the_driver_are_in_no_runtime_environment_of_tune() -> None:
    """In a process of its own: one that has run a sweep before keeps them private already."""
    planted = {**dict.fromkeys(AWS_KEYS, "planted-secret"), "RAY_CHDIR_TO_TRIAL_DIR": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, **planted},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    of_ray, ours = done.stdout.splitlines()

    assert "planted-secret" in of_ray, "Ray has mended this: keep_keys_private can go"
    assert "planted-secret" not in ours
    assert "('RAY_CHDIR_TO_TRIAL_DIR', '0')" in ours, "what else Tune propagates stays"
