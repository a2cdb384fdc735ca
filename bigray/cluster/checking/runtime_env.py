"""A runtime environment, read strictly: Ray keeps keys that it does not know, and never says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from bigray.cluster.checking.faults import Path
from bigray.cluster.checking.nearest import unknown
from bigray.cluster.checking.secret_values import is_secret
from bigray.cluster.checking.shapes import (
    ANYTHING,
    FLAG,
    TEXT,
    TEXT_TABLE,
    TEXTS,
    Fields,
    Mistake,
    Scalar,
    fields,
    mismatches,
    pruned,
    shown,
)
from bigray.cluster.checking.versions import requirement_fault

REMOTE = ("http", "https", "s3", "gs", "azure", "abfss", "file", "gcs", "local")
ARCHIVES = {
    "working_dir": (".zip", ".tar.gz", ".tgz", ".tar.xz"),
    "py_modules": (".zip", ".whl", ".tar.gz", ".tgz", ".tar.xz"),
}
"""What a package at an address may be (`ray._common.runtime_env_package` of 2.60)."""

RUNTIME_ENV = Fields(
    {
        "working_dir": TEXT, "py_modules": TEXTS, "excludes": TEXTS, "env_vars": TEXT_TABLE, "pip": ANYTHING,
        "uv": ANYTHING, "conda": ANYTHING, "py_executable": TEXT, "java_jars": TEXTS, "image_uri": TEXT,
        "container": fields(image=TEXT, worker_path=TEXT, run_options=TEXTS), "worker_process_setup_hook": TEXT,
        "config": fields(setup_timeout_seconds=Scalar("whole", least=-1), eager_install=FLAG, log_files=TEXTS),
        "nsight": ANYTHING, "rocprof_sys": ANYTHING, "_nsight": ANYTHING, "_rocprof_sys": ANYTHING,
        "_ray_release": ANYTHING, "_ray_commit": ANYTHING, "_inject_current_ray": ANYTHING,
    },
    gone={
        "exclude": "is not a key here, did you mean 'excludes'?",
        "env": "is not a key here, did you mean 'env_vars'?",
        "environment": "is not a key here, did you mean 'env_vars'?",
        "requirements": "is not a key here, did you mean 'pip'?",
    },
)  # fmt: skip
_INSTALLERS = {
    "pip": ("packages", "pip_check", "pip_version", "pip_install_options"),
    "uv": ("packages", "uv_check", "uv_version", "uv_pip_install_options"),
}


def runtime_env_mistakes(value: Any, path: Path = (), *, house: bool = True) -> Iterator[Mistake]:
    """What is wrong with a runtime environment; with `house` also what Ray takes and bigray does not.

    Runs anywhere and reads no file that the environment names.
    """
    value = pruned(value)
    yield from mismatches(RUNTIME_ENV, value, path)
    if not isinstance(value, dict):
        return
    yield from _installer_mistakes(value, path)
    yield from _combinations(value, path)
    for key in ("working_dir", "py_modules"):
        places = value.get(key, ())
        for index, place in enumerate(places if isinstance(places, list) else (places,) if places else ()):
            where = (*path, key, index) if isinstance(places, list) else (*path, key)
            if isinstance(place, str) and (message := _package_fault(key, place)):
                yield where, message
    if house:
        yield from _house_mistakes(value, path)


def _installer_mistakes(value: dict[str, Any], path: Path) -> Iterator[Mistake]:
    for name, known in _INSTALLERS.items():
        installer = value.get(name)
        if isinstance(installer, dict):
            for key in installer:
                if key not in known:
                    yield (*path, name, key), unknown(key, known)
            if "packages" not in installer:
                yield (*path, name), "'packages' is required, but missing"
        if installer is not None:
            yield from _package_list_mistakes(*_packages(value, name, path))
    if "conda" in value and not isinstance(value["conda"], str | dict):
        yield (*path, "conda"), f"expected a name, a path or a mapping, got {shown(value['conda'])}"


def _packages(value: dict[str, Any], name: str, path: Path) -> tuple[Any, Path]:
    """What an installer is to install, wherever it stands, and its path; an empty list where it is missing."""
    installer = value.get(name, [])
    if isinstance(installer, dict):
        return installer.get("packages", []), (*path, name, "packages")
    return installer, (*path, name)


def _package_list_mistakes(packages: Any, path: Path) -> Iterator[Mistake]:
    if isinstance(packages, list):
        for index, package in enumerate(packages):
            if not isinstance(package, str):
                yield (*path, index), f"expected a requirement such as 'scipy==1.17.1', got {shown(package)}"
    elif not isinstance(packages, str):
        yield path, f"expected a list of requirements or the path of a requirements file, got {shown(packages)}"


def _combinations(value: dict[str, Any], path: Path) -> Iterator[Mistake]:
    installers = [key for key in ("pip", "uv", "conda") if key in value]
    if len(installers) > 1:
        yield (*path, installers[1]), f"'{installers[0]}' and '{installers[1]}' exclude each other; keep one"
    image = next((key for key in ("image_uri", "container") if key in value), None)
    if image is not None:
        others = sorted(set(value) & set(RUNTIME_ENV.fields) - {image, "config", "env_vars"})
        if others:
            yield (*path, others[0]), f"does not go with '{image}', which only takes 'config' and 'env_vars' beside it"


def _package_fault(key: str, place: str) -> str | None:
    if re.match(r"[a-z0-9]+:/(?!/)", place):
        return f"'{place}' has one slash after its scheme; write {place.replace(':/', '://', 1)}"
    scheme, separator, rest = place.partition("://")
    if not separator:
        return None  # a folder or an archive beside the driver
    if scheme not in REMOTE:
        return f"'{scheme}://' is not an address that Ray loads from; use one of {', '.join(REMOTE[:6])}"
    if scheme in ("gcs", "local"):
        return None  # Ray's own, of packages that it holds
    if not rest.split("?", 1)[0].lower().endswith(ARCHIVES[key]):
        return f"'{place}' is no archive; one at an address has to end with {', '.join(ARCHIVES[key])}"
    return None


def _house_mistakes(value: dict[str, Any], path: Path) -> Iterator[Mistake]:
    variables = value.get("env_vars")
    for name, text in variables.items() if isinstance(variables, dict) else ():
        if is_secret(str(name), text):
            yield (
                (*path, "env_vars", name),
                "is a secret in clear, and Ray shows runtime environments to everybody; put it into the pods' "
                "environment from a Secret",
            )
    for name in _INSTALLERS:
        packages, where = _packages(value, name, path)
        for index, requirement in enumerate(packages if isinstance(packages, list) else ()):
            if isinstance(requirement, str) and (fault := requirement_fault(requirement, bound=True)):
                yield (*where, index), fault


def entrypoint_resource_fault(text: str) -> str | None:
    """What is wrong with `entrypointResources`, a JSON table of custom resources in a string."""
    try:
        table = json.loads(text)
    except ValueError:
        return "is not JSON; write '{\"name\": 1}'"
    if not isinstance(table, dict):
        return f"expected a JSON table such as '{{\"name\": 1}}', got {shown(table)}"
    for name, count in table.items():
        if isinstance(count, bool) or not isinstance(count, int | float) or count < 0:
            return f"'{name}' takes a number from 0 up, got {shown(count)}"
    return None
