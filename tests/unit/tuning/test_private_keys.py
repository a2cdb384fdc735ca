from __future__ import annotations

import json

import pytest

from bigray.tuning.runner import AWS_KEYS, keep_keys_private


def test_the_credentials_of_the_driver_are_in_no_runtime_environment_of_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution import class_cache

    for name in AWS_KEYS:
        monkeypatch.setenv(name, "planted-secret")
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    propagated = set(class_cache.ENV_VARS_TO_PROPAGATE)
    assert propagated >= {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}, "Ray has mended this: ours can go"
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", propagated)

    class Trainable: ...

    keep_keys_private()
    options = class_cache._ActorClassCache().get(Trainable)._default_options
    assert "planted-secret" not in json.dumps(options["runtime_env"])
    assert options["runtime_env"]["env_vars"]["RAY_CHDIR_TO_TRIAL_DIR"] == "0"
