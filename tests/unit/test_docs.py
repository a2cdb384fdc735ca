"""The guides say what the code takes: their snippets load, and no setting is left out."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bigray.loading import load_job, load_search
from bigray.models import mlp
from bigray.specs import (
    AshaSpec,
    JobSpec,
    KeepSpec,
    MedianSpec,
    NonFiniteSpec,
    ParamGroupSpec,
    PbtSpec,
    ScalingSpec,
    ScheduleSpec,
    SearchSpec,
    SeedSpec,
    Spec,
    TrainingSpec,
)

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/training.md").read_text()
SNIPPETS = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
TUNING_GUIDE = (ROOT / "docs/tuning.md").read_text()
SEARCHES = re.findall(r"```toml\n(.*?)```", TUNING_GUIDE, flags=re.DOTALL)
OF_README = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")])


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `base`, table by table, as if both were in one file."""
    tables = {key: _merged(base[key], value) for key, value in more.items() if isinstance(base.get(key), dict)}
    return {**base, **more, **tables}


def _job_with(snippet: str) -> JobSpec:
    """The example that the guide is about, with the snippet's keys."""
    example = tomllib.loads((ROOT / "examples/digits/job.toml").read_text())
    return JobSpec.model_validate(_merged(example, tomllib.loads(snippet)))


def test_there_are_snippets_to_check() -> None:
    assert len(SNIPPETS) > 10


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.splitlines()[1].split("=")[0].strip())
def test_every_snippet_of_the_training_guide_is_a_part_of_a_job_file(snippet: str) -> None:
    from bigray.training.optimization import group_faults, optimizer_faults

    training = _job_with(snippet).training

    assert not optimizer_faults(training)
    assert not group_faults(training.param_groups, mlp((64,), 10, hidden=[128]))


def test_the_readmes_job_file_and_its_parts_load() -> None:
    whole, *parts = OF_README

    assert JobSpec.model_validate(tomllib.loads(whole)).training.exact
    assert all(_job_with(part) for part in parts)


def test_a_snippet_with_a_key_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(ValueError, match="warmup"):
        _job_with("[training]\nwarmup = 50\n")


@pytest.mark.parametrize(
    "spec", [TrainingSpec, ScalingSpec, ScheduleSpec, ParamGroupSpec, KeepSpec, SeedSpec, NonFiniteSpec]
)
def test_the_training_guide_tells_of_every_setting(spec: type[Spec]) -> None:
    missing = set(spec.model_fields) - _words_of_code(GUIDE, SNIPPETS)

    assert not missing, f"not in docs/training.md: {sorted(missing)}"


def _words_of_code(guide: str, snippets: list[str]) -> set[str]:
    code = " ".join(snippets + re.findall(r"`([^`\n]+)`", guide))
    return set(re.findall(r"\w+", code))


@pytest.mark.parametrize("spec", [SearchSpec, AshaSpec, MedianSpec, PbtSpec])
def test_the_tuning_guide_tells_of_every_setting(spec: type[Spec]) -> None:
    missing = set(spec.model_fields) - _words_of_code(TUNING_GUIDE, SEARCHES)

    assert not missing, f"not in docs/tuning.md: {sorted(missing)}"


@pytest.mark.parametrize("number", range(len(SEARCHES)))
def test_every_snippet_of_the_tuning_guide_is_a_search_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    path = tmp_path / "search.toml"
    path.write_text(SEARCHES[number])

    assert load_search(path, load_job("examples/digits/job.toml"))


def test_the_tuning_guide_has_a_snippet_for_each_scheduler() -> None:
    named = {tomllib.loads(snippet).get("scheduler") for snippet in SEARCHES}

    assert {"asha", "median", "pbt"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())

    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]
