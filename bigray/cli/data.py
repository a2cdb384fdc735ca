"""The command that shows a job's data before anything is trained on it: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bigray.cli.app import AsJson, JobFile, Overrides, app
from bigray.errors import SpecError, StorageError


@app.command(
    epilog="Examples: bigray data examples/messy_csv/job.toml; "
    "bigray data examples/digits/job.toml --sheet digits.png --set data.split.holdout=0.2"
)
def data(
    job: JobFile,
    set_: Overrides = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", metavar="PNG", help="Of images: write a sheet of them, a class in turn.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job's data holds: parts, columns, classes, gaps, outliers, duplicates, leaks. Trains nothing."""
    from bigray import console
    from bigray.data.overview import TableReport, look_at
    from bigray.loading import load_job

    if sheet is not None and not sheet.parent.is_dir():
        raise SpecError(f"--sheet: {sheet.parent}: no such folder")
    spec = load_job(job, set_ or ())
    found = look_at(spec.data, spec.training.target_kind, spec.training.positive)
    if sheet is not None:
        if not isinstance(found, TableReport):
            raise SpecError("--sheet: is for images, and the inputs are text")
        try:
            sheet.write_bytes(found.sheet())
        except OSError as error:
            raise StorageError(f"--sheet: {sheet}: cannot be written: {error.strerror}") from error
    if as_json:
        console.print_json({"job": spec.name, **found.to_json(), "warnings": found.warnings})
        return
    if isinstance(found, TableReport):
        console.print_data_report(spec.name, found)
    else:
        console.print_text_report(spec.name, found)
    if sheet is not None:
        console.say(f"wrote {sheet}")
