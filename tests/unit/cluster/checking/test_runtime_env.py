from __future__ import annotations

from typing import Any

import pytest

from bigray.cluster.checking.runtime_env import ARCHIVES, RUNTIME_ENV, entrypoint_resource_fault, runtime_env_mistakes

GOOD: dict[str, Any] = {
    "working_dir": "s3://bucket/job.zip?versionId=1",
    "py_modules": ["libs/mine", "https://example.com/theirs.whl"],
    "excludes": ["runs", "*.ckpt"],
    "pip": {"packages": ["scipy==1.17.1"], "pip_check": False},
    "env_vars": {"OMP_NUM_THREADS": "1", "TOKEN_PATH": "/etc/token", "HF_TOKEN": "$HF_TOKEN"},
    "config": {"setup_timeout_seconds": 600, "eager_install": True},
}

# name: (what is changed, where the fault is, how it begins)
PLANTED: dict[str, tuple[dict[str, Any], tuple[str | int, ...], str]] = {
    "a misspelt folder": ({"working_dirs": "."}, ("working_dirs",), "is not a key here, did you mean 'working_dir'?"),
    "excludes in the singular": ({"exclude": ["a"]}, ("exclude",), "is not a key here, did you mean 'excludes'?"),
    "a folder that is a list": ({"working_dir": ["."]}, ("working_dir",), "expected a text, got a list"),
    "modules that are one text": ({"py_modules": "libs"}, ("py_modules",), "expected a list"),
    "a variable that is a flag": ({"env_vars": {"A": True}}, ("env_vars", "A"), "expected a text, got the flag true"),
    "a variable that is a number": ({"env_vars": {"A": 1}}, ("env_vars", "A"), "expected a text, got the number 1"),
    "variables in a list": ({"env_vars": ["A=1"]}, ("env_vars",), "expected a mapping, got a list"),
    "a secret by its name": ({"env_vars": {"HF_TOKEN": "abc"}}, ("env_vars", "HF_TOKEN"), "is a secret in clear"),
    "a password in an address": (
        {"env_vars": {"DB": "postgres://me:pw12@db/x"}},
        ("env_vars", "DB"),
        "is a secret in clear",
    ),
    "pip and conda": ({"conda": "env"}, ("conda",), "'pip' and 'conda' exclude each other"),
    "a requirement that is a number": ({"pip": ["scipy", 1]}, ("pip", 1), "expected a requirement"),
    "pip without packages": ({"pip": {"pip_check": True}}, ("pip",), "'packages' is required, but missing"),
    "an option of pip misspelt": (
        {"pip": {"packages": [], "pip_chek": True}},
        ("pip", "pip_chek"),
        "is not a key here, did you mean 'pip_check'?",
    ),
    "pip that is a number": ({"pip": 3}, ("pip",), "expected a list of requirements"),
    "another torch": ({"pip": ["torch==2.9.0"]}, ("pip", 0), "torch==2.9.0 is not the 2.13.0 of constraints.txt"),
    "conda that is a list": ({"pip": None, "conda": ["a"]}, ("conda",), "expected a name, a path or a mapping"),
    "one slash": ({"working_dir": "s3:/bucket/job.zip"}, ("working_dir",), "'s3:/bucket/job.zip' has one slash"),
    "no archive": ({"working_dir": "gs://bucket/job"}, ("working_dir",), "'gs://bucket/job' is no archive"),
    "a wheel for a folder": ({"working_dir": "s3://b/job.whl"}, ("working_dir",), "'s3://b/job.whl' is no archive"),
    "an address that Ray does not load": (
        {"working_dir": "ftp://h/a.zip"},
        ("working_dir",),
        "'ftp://' is not an addr",
    ),
    "a module that is no archive": ({"py_modules": ["s3://b/libs"]}, ("py_modules", 0), "'s3://b/libs' is no archive"),
    "a misspelt setting": (
        {"config": {"setup_timeout_s": 5}},
        ("config", "setup_timeout_s"),
        "is not a key here, did you m",
    ),
    "a timeout that is text": (
        {"config": {"setup_timeout_seconds": "600"}},
        ("config", "setup_timeout_seconds"),
        "expected a whole number",
    ),
    "a list for a mapping": ({"config": []}, ("config",), "expected a mapping, got a list"),
    "an image beside a folder": (
        {"image_uri": "x:1", "pip": None, "py_modules": None, "excludes": None},
        ("working_dir",),
        "does not go with 'image_uri'",
    ),
}


def test_a_good_environment_has_no_fault() -> None:
    assert list(runtime_env_mistakes(GOOD)) == []


@pytest.mark.parametrize("name", PLANTED)
def test_a_mistake_of_an_environment_is_told_once_at_its_place(name: str) -> None:
    changes, path, message = PLANTED[name]
    (mistake,) = runtime_env_mistakes(GOOD | changes, ("env",))

    assert mistake[0] == ("env", *path)
    assert mistake[1].startswith(message)


def test_a_secret_is_never_repeated_in_the_message() -> None:
    ((_, message),) = runtime_env_mistakes({"env_vars": {"API_KEY": "swordfish"}})

    assert "swordfish" not in message


def test_what_ray_takes_is_taken_without_the_house_rules() -> None:
    assert list(runtime_env_mistakes({"env_vars": {"API_KEY": "swordfish"}, "pip": ["ray==2.9.0"]}, house=False)) == []


@pytest.mark.parametrize("value", ["text", 7, [], None])
def test_an_environment_that_is_no_mapping_is_told(value: Any) -> None:
    ((path, message),) = runtime_env_mistakes(value)

    assert path == ()
    assert message.startswith("expected a mapping")


def test_the_keys_and_archives_are_rays_own() -> None:
    from ray._common.runtime_env_package import RUNTIME_ENV_PACKAGE_EXTENSIONS
    from ray.runtime_env import RuntimeEnv

    assert set(RUNTIME_ENV.fields) - {"nsight", "rocprof_sys"} == RuntimeEnv.known_fields
    assert {key: set(endings) for key, endings in RUNTIME_ENV_PACKAGE_EXTENSIONS.items()} == {
        key: set(endings) for key, endings in ARCHIVES.items()
    }


@pytest.mark.parametrize(
    ("text", "begins"), [("a=1", "is not JSON"), ("[1]", "expected a JSON"), ('{"a": -1}', "'a' takes a nu")]
)
def test_entrypoint_resources_have_to_be_a_json_table(text: str, begins: str) -> None:
    assert (entrypoint_resource_fault(text) or "").startswith(begins)
    assert entrypoint_resource_fault('{"a": 0.5}') is None
