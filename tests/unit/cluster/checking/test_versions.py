from __future__ import annotations

import importlib.metadata

import pytest

from bigray.cluster.checking.versions import (
    image_fault,
    parse_image,
    pip_faults,
    ray_version_fault,
    requirement_fault,
    wanted_version,
)

RAY = wanted_version("ray")


def test_the_wanted_ray_is_that_of_the_constraints_and_the_installed_one() -> None:
    assert importlib.metadata.version("ray") == RAY
    assert wanted_version("Jinja2") == wanted_version("jinja2")
    assert wanted_version("no-such-package") is None


def test_an_image_is_taken_apart() -> None:
    image = parse_image("rayproject/ray:2.60.0-py311-gpu@sha256:00ff")
    assert (image.repository, image.tag, image.digest) == ("rayproject/ray", "2.60.0-py311-gpu", "sha256:00ff")
    assert (image.ray, image.python, image.has_cuda) == ("2.60.0", (3, 11), True)
    own = parse_image("registry:5000/team/bigray:0.1.0-ray2.60.0-cu128")
    assert (own.repository, own.ray, own.has_cuda) == ("registry:5000/team/bigray", "2.60.0", True)
    assert parse_image("registry:5000/team/bigray").tag is None
    assert parse_image("example.org/bigray:0.1.0").ray is None


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("rayproject/ray", "has no tag"),
        ("registry:5000/bigray", "has no tag"),
        ("rayproject/ray:latest", "moves"),
        ("rayproject/ray:nightly-py311-gpu", "moves"),
        ("rayproject/ray:2.9.3-gpu", "Ray 2.9.3 is not the"),
        ("example.org/bigray:1-ray2.9.3", "Ray 2.9.3 is not the"),
        (f"rayproject/ray:{RAY}-py310", "Python 3.10"),
    ],
)
def test_an_image_that_is_not_pinned_or_of_another_version_is_told(image: str, says: str) -> None:
    assert says in (image_fault(image) or "")


@pytest.mark.parametrize(
    "image",
    [f"rayproject/ray:{RAY}-py311", f"rayproject/ray:{RAY}", "a/b:1.0", "a/b:latest@sha256:00", "a/b@sha256:00"],
)
def test_a_pinned_image_is_taken(image: str) -> None:
    assert image_fault(image) is None


def test_a_field_with_another_ray_is_told() -> None:
    assert ray_version_fault(RAY or "") is None
    assert "2.9.0 is not the" in (ray_version_fault("2.9.0") or "")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("pip install ray", "not pinned"),
        ("pip install -U 'ray[default]>=2.9'", "not pinned"),
        ("cd /x && python -m pip install torch==2.1.0 --index-url https://example.org", "torch==2.1.0 is not the"),
        ("sudo pip3 install ray==2.9.*", "not pinned"),
        ("(true || pip install ray==2.9.0)", "ray==2.9.0 is not the"),
        ("pip install -c constraints.txt ray==2.9.0", "ray==2.9.0 is not the"),
        ("pip install \\\n  numpy", "not pinned"),
    ],
)
def test_a_requirement_that_is_not_pinned_to_the_constraints_is_told(command: str, says: str) -> None:
    (fault,) = pip_faults(command)
    assert says in fault


@pytest.mark.parametrize(
    "command",
    [
        "pip install -c constraints.txt ray torch 'boto3>=1.35'",
        "pip install -r requirements.txt",
        "pip install . ./wheels/x.whl /opt/y -e .",
        f"pip install 'ray[default]=={RAY}'",
        "pip install torch==2.13+cpu",
        "pip install some-other-package==1.0",
        "pip install --index-url https://example.org/simple -c c.txt ray",
        "pip uninstall ray",
        "echo pip",
        "apt-get install -y python3-pip",
    ],
)
def test_a_requirement_that_is_pinned_or_bound_is_taken(command: str) -> None:
    assert list(pip_faults(command)) == []


def test_what_installs_from_an_address_is_left_alone() -> None:
    assert requirement_fault("bigray @ https://example.org/bigray.whl") is None
