"""The guides say what the code takes: their snippets load, and no setting is left out."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from bigray import cli
from bigray.loading import load_job, load_search
from bigray.models import mlp
from bigray.serve.config import BundleArgs, ModelEntry, load_serve
from bigray.serve.observe.prometheus import render_prometheus
from bigray.serve.observe.telemetry import Telemetry
from bigray.serve.release.gate import CHECKS, FORCIBLE
from bigray.serve.scaling.settings import ScalingSettings
from bigray.specs import (
    AshaSpec,
    AugmentSpec,
    ColumnSpec,
    DataSpec,
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
    SplitSpec,
    TrainingSpec,
)

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs/training.md").read_text()
SNIPPETS = re.findall(r"```toml\n(.*?)```", GUIDE, flags=re.DOTALL)
TUNING_GUIDE = (ROOT / "docs/tuning.md").read_text()
SEARCHES = re.findall(r"```toml\n(.*?)```", TUNING_GUIDE, flags=re.DOTALL)
OF_README = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
DATA_GUIDE = (ROOT / "docs/data.md").read_text()
OF_DATA = re.findall(r"```toml\n(.*?)```", DATA_GUIDE, flags=re.DOTALL)
SERVING_GUIDE = (ROOT / "docs/serving.md").read_text()
SERVE_README = (ROOT / "serve/README.md").read_text()
SERVE_FILES = [
    text for text in re.findall(r"```yaml\n(.*?)```", SERVING_GUIDE, flags=re.DOTALL) if "applications:" in text
]
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


@pytest.mark.parametrize("number", range(len(OF_DATA)))
def test_every_snippet_of_the_data_guide_is_a_part_of_a_job_file(number: int) -> None:
    snippet = tomllib.loads(OF_DATA[number])
    example = tomllib.loads((ROOT / "examples/digits/job.toml").read_text())
    if "train" in snippet["data"]:
        del example["data"]["source"]

    assert JobSpec.model_validate(_merged(example, snippet))


@pytest.mark.parametrize("spec", [DataSpec, ColumnSpec, SplitSpec, AugmentSpec])
def test_the_data_guide_tells_of_every_setting(spec: type[Spec]) -> None:
    missing = set(spec.model_fields) - _words_of_code(DATA_GUIDE, OF_DATA)

    assert not missing, f"not in docs/data.md: {sorted(missing)}"


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


def _written_commands(page: str) -> Iterator[tuple[str, ...]]:
    """The words behind each `bigray` in a page's shell snippets, also where another tool starts it."""
    for snippet in re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL):
        for line in snippet.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "bigray" in words:
                yield tuple(words[words.index("bigray") + 1 :])


def _mentioned_commands(page: str) -> Iterator[tuple[str, ...]]:
    """The same of commands within a sentence or a table, which may leave out what is not at issue."""
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    yield from (tuple(shlex.split(text)) for text in re.findall(r"`bigray\s+([^`]+)`", prose))


def _find_command(words: tuple[str, ...]) -> tuple[Any, list[str]]:
    """The command that the words name, and what is left of them; KeyError where there is none."""
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while hasattr(command, "commands") and rest:
        command = command.commands[rest.pop(0)]
    return command, rest


def _parse(words: tuple[str, ...]) -> None:
    """Parse a command line as `bigray` does, without running it."""
    command, rest = _find_command(words)
    command.make_context(command.name, rest)


GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "serve/README.md"]
WRITTEN = sorted({words for page in GUIDES for words in _written_commands(page.read_text())})
MENTIONED = sorted({words for page in GUIDES for words in _mentioned_commands(page.read_text())})


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_every_command_that_a_page_shows_can_be_typed(words: tuple[str, ...]) -> None:
    _parse(words)


@pytest.mark.parametrize("words", MENTIONED, ids=" ".join)
def test_every_command_that_a_page_mentions_exists_with_its_options(words: tuple[str, ...]) -> None:
    command, rest = _find_command(words)
    options = {option for parameter in command.params for option in parameter.opts}

    assert {word for word in rest if word.startswith("-")} <= options


def test_the_serving_guide_shows_every_command_around_an_endpoint() -> None:
    shown = {words[0] for words in _written_commands(SERVING_GUIDE)}

    assert {
        "deploy",
        "rollback",
        "versions",
        "trace",
        "status",
        "top",
        "predict",
        "autoscale",
        "keys",
        "delete",
    } <= shown


@pytest.mark.parametrize("line", ["deploy runs/a --canry 10%", "rollback", "keys add web more"])
def test_a_command_that_cannot_be_typed_would_be_found(line: str) -> None:
    with pytest.raises(Exception, match=r"--canry|[Mm]issing|extra argument"):
        _parse(tuple(line.split()))


@pytest.mark.parametrize("number", range(len(SERVE_FILES)))
def test_every_snippet_of_the_serving_guide_is_a_serve_file(number: int, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(SERVE_FILES[number])
    spec = load_serve(path)

    scaling = spec.deployment.autoscaling_config
    assert scaling is None or spec.scaling_settings("docs/serving.md").max_replicas == scaling.max_replicas


@pytest.mark.parametrize("spec", [BundleArgs, ModelEntry, ScalingSettings])
def test_the_serving_guide_tells_of_every_setting(spec: Any) -> None:
    missing = set(spec.model_fields) - _words_of_code(SERVING_GUIDE, SERVE_FILES)

    assert not missing, f"not in docs/serving.md: {sorted(missing)}"


def test_the_serve_readme_has_a_row_for_each_key_of_args() -> None:
    table = SERVE_README.partition("## Keys of `args`")[2].partition("\n## ")[0]

    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == sorted(BundleArgs.model_fields)


def test_the_serving_guide_has_a_row_for_each_check_of_the_gate() -> None:
    rows = re.findall(r"^\| (\w+) \|.*\| (yes|no) \|$", SERVING_GUIDE, flags=re.MULTILINE)

    assert rows == [(name, "yes" if name in FORCIBLE else "no") for name in CHECKS]


def test_the_serving_guide_names_every_metric_and_no_other() -> None:
    telemetry = Telemetry()
    telemetry.record("digits", "0123456789ab", "predict", 200, 0.001, 1, 100)
    telemetry.record_batch("digits", "0123456789ab", 1, 0.001, 0.0)
    telemetry.shed("digits")
    telemetry.refused("401")
    telemetry.set_versions("digits", "0123456789ab", candidate="ba9876543210", kind="canary", share=0.1)
    exposed = re.findall(r"^# TYPE (\w+)", render_prometheus({"a": telemetry.snapshot()}).decode(), flags=re.MULTILINE)

    assert sorted(re.findall(r"`(bigray_\w+)`", SERVING_GUIDE)) == sorted(exposed)
