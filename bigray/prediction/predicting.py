"""`bigray predict BUNDLE DATA`: plan, go on where it stopped, spread, write (driver)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from bigray.bundle import ModelBundle
from bigray.errors import BigrayError, SpecError
from bigray.inference import BUILT_IN_FACTORIES, Predictor, check_factory
from bigray.prediction.answers import answer_schema, answer_table, lineage
from bigray.prediction.output import Output
from bigray.prediction.parts import Part, remaining
from bigray.prediction.rows import Rows, open_rows

BATCH_SIZE = 256
"""Rows of one forward pass."""


@dataclass(frozen=True)
class PredictionResult:
    """What was written."""

    location: str
    rows: int
    parts: int
    parts_done_before: int
    """Whole parts that an earlier attempt had left."""
    lineage: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answering:
    """All that it takes to answer a part, on any node."""

    bundle: ModelBundle
    rows: Rows
    batch_size: int = BATCH_SIZE
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES

    def start(self) -> Callable[[Part, bytes], pa.Table]:
        """Load the model; the function answers a packed part, batch by batch.

        Raises:
            SpecError: of that function; names the row that cannot be read.
        """
        predictor = Predictor(self.bundle, allow_factories=self.allow_factories)

        def answer(part: Part, packed: bytes) -> pa.Table:
            table = self.rows.unpack(part, packed)
            return pa.concat_tables(list(self._answers(predictor, part, table)))

        return answer

    def _answers(self, predictor: Predictor, part: Part, table: pa.Table) -> Iterator[pa.Table]:
        manifest = self.bundle.manifest
        for start in range(0, part.num_rows, self.batch_size):
            batch = table.slice(start, self.batch_size)
            numbers = range(part.start + start, part.start + start + batch.num_rows)
            yield answer_table(predictor.run(manifest.inputs.from_table(batch, numbers)), manifest.outputs)


Spread = Callable[[Answering, Sequence[Part]], Iterable[tuple[Part, pa.Table]]]
"""Answers parts somewhere, and gives them back whole, in any order."""


def predict_source(
    location: str,
    source: str,
    out: str,
    *,
    batch_size: int = BATCH_SIZE,
    allow_factories: Sequence[str] = BUILT_IN_FACTORIES,
    spread: Spread | None = None,
    on_part: Callable[[int, int], object] = lambda done, total: None,
) -> PredictionResult:
    """Answer every row of a source; rows come out in its order. The same call goes on where one was interrupted.

    `spread` is by default the cluster that Ray is connected to. `on_part` is told how many parts of all are done.

    Raises:
        SpecError: the data does not suit the model, or something else is at `out`.
        StorageError: there is no sound bundle, or `out` cannot be written.
        DeployError: the bundle's factory is not allowed.
    """
    bundle = ModelBundle.load(location)
    check_factory(bundle, allow_factories)
    rows = open_rows(source, bundle.manifest.inputs)
    num_rows = rows.parts[-1].stop if rows.parts else 0
    if num_rows == 0:
        raise SpecError(f"'{source}': holds no rows")
    document = lineage(bundle, source, rows.fingerprint, num_rows)
    output = Output(out)
    done = output.begin(document)
    total = len(rows.parts)
    if done is None:
        return PredictionResult(output.location, num_rows, total, total, document)
    missing = remaining(rows.parts, done)
    answering = Answering(bundle, rows, batch_size, tuple(allow_factories))
    before = total - len(missing)
    for count, (part, table) in enumerate((spread or spread_over_ray)(answering, missing) if missing else (), 1):
        output.write(part, table, document)
        on_part(before + count, total)
    output.finish(rows.parts, answer_schema(bundle.manifest.outputs), document)
    return PredictionResult(output.location, num_rows, total, before, document)


def answer_here(answering: Answering, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """In this process, one part after the other, without Ray."""
    answer = answering.start()
    for part in parts:
        yield part, answer(part, answering.rows.pack(part))


def spread_over_ray(answering: Answering, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
    """Over the cluster by Ray Data: a pool of actors, each with the model loaded once (driver; Ray is connected).

    A part is one row of the data set that Ray sees, so that Ray neither cuts nor joins parts, nor reads a Parquet file,
    of whose extension types it would run what is pickled in them.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    most = max(1, min(int(ray.cluster_resources().get("CPU", 1)), len(parts)))
    tables = [
        pa.table({"part": [number], "packed": pa.array([answering.rows.pack(part)], pa.large_binary())})
        for number, part in enumerate(parts)
    ]
    answered = ray.data.from_arrow(tables).map_batches(
        PartActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        fn_constructor_args=(answering, tuple(parts)),
        num_cpus=1,
    )
    for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from _unpacked(batch, parts)


class PartActor:
    """Answers parts in a process of its own; what Ray Data calls."""

    def __init__(self, answering: Answering, parts: Sequence[Part]) -> None:
        self._answer, self._parts = answering.start(), parts

    def __call__(self, batch: pa.Table) -> pa.Table:
        """(part, packed rows) -> (part, packed answers, error): a fault of the data comes back as text, not as a
        failure of Ray's."""
        found: dict[str, list[Any]] = {"part": [], "answers": [], "error": []}
        for number, packed in zip(batch["part"].to_pylist(), batch["packed"].to_pylist(), strict=True):
            answers, error = b"", ""
            try:
                answers = _pack_answers(self._answer(self._parts[number], packed))
            except BigrayError as fault:
                error = str(fault)
            for name, value in (("part", number), ("answers", answers), ("error", error)):
                found[name].append(value)
        return pa.table(found, schema=_RETURNED)


_RETURNED = pa.schema([("part", pa.int64()), ("answers", pa.large_binary()), ("error", pa.string())])


def _pack_answers(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _unpacked(batch: pa.Table, parts: Sequence[Part]) -> Iterator[tuple[Part, pa.Table]]:
    for row in batch.to_pylist():
        if row["error"]:
            raise SpecError(row["error"].splitlines())
        with pa.ipc.open_stream(row["answers"]) as stream:
            yield parts[row["part"]], stream.read_all()
