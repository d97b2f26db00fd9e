"""The command that imports results of taskiq-postgres."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from sqlalchemy import NullPool

from taskiq_sa_pg.cli.output import MAX_INT, JsonOption, plural, say, say_json, to_json
from taskiq_sa_pg.cli.tables import console, is_terminal
from taskiq_sa_pg.cli.target import Target, find_serializer
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.exceptions import ConfigurationError, TaskiqSaPgError
from taskiq_sa_pg.importing import ImportReport, Unreadable, count_rows, import_results

# Of one kind. More are hardly broken rows: the serializer is another one, or a class is missing.
_MOST_UNDECODABLE: Final = 20


_FromTable = Annotated[str, typer.Option(help="Table of taskiq-postgres.")]
_FromSchema = Annotated[
    str | None, typer.Option(help="Its PostgreSQL schema; by default the search_path decides.")
]
_FromDsn = Annotated[str | None, typer.Option(help="Its database, if it is another one.")]
_Serializer = Annotated[
    str,
    typer.Option(
        help="Serializer of its rows: pickle, json, orjson, msgpack, cbor or module:attribute."
    ),
]
_BatchSize = Annotated[
    int, typer.Option(min=1, max=MAX_INT, help="Number of rows to read at once.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Read everything, store nothing.")]
_ErrorsTo = Annotated[Path | None, typer.Option(help="File for skipped rows, as lines of JSON.")]
_SkipAll = Annotated[
    bool,
    typer.Option(
        "--skip-all",
        help=f"Do not stop after {_MOST_UNDECODABLE} rows that cannot be read for the same reason: "
        "skip them all.",
    ),
]


async def import_old_results(
    target: Target,
    from_table: _FromTable,
    from_schema: _FromSchema = None,
    from_dsn: _FromDsn = None,
    serializer: _Serializer = "pickle",
    batch_size: _BatchSize = 1000,
    dry_run: _DryRun = False,
    errors_to: _ErrorsTo = None,
    skip_all: _SkipAll = False,
    json: JsonOption = False,
) -> None:
    """Import results of taskiq-postgres.

    Progress is imported, too. The old table is not changed, and existing rows in the new tables are
    never overwritten. You can interrupt the command and run it again. Rows that cannot be read are
    skipped, and the exit status is 1. After 20 of them with the same reason the command stops; what
    was stored is kept. Decoding a pickle runs code that its writer has chosen.
    """
    async with AsyncExitStack() as stack:
        errors = stack.enter_context(_open(errors_to)) if errors_to else None
        backend = await stack.enter_async_context(target.backend())
        engine = None
        if from_dsn is not None:
            engine = make_engine(from_dsn, "--from-dsn", poolclass=NullPool)
            stack.push_async_callback(engine.dispose)
        total = await count_rows(backend, from_table, from_engine=engine, from_schema=from_schema)
        if errors is not None:
            # Not before: a command that cannot even start keeps the errors of the last one.
            errors.truncate(0)
        report = await import_results(
            backend,
            from_table,
            from_engine=engine,
            from_schema=from_schema,
            serializer=find_serializer(serializer),
            batch_size=batch_size,
            dry_run=dry_run,
            on_batch=stack.enter_context(_bar(total)),
            on_unreadable=_Skipped(errors, None if skip_all else serializer).add,
        )
    if json:
        say_json(asdict(report) | {"is_dry_run": dry_run})
    else:
        _say_report(report, "would be " if dry_run else "")
    if report.unreadable:
        raise typer.Exit(1)


class _Skipped:
    """Prints what is skipped, as lines of JSON, and stops if it is too much.

    Args:
        file: Where to; None is standard error.
        serializer: Its name, for the question whether it is the right one; None never stops.
    """

    def __init__(self, file: TextIO | None, serializer: str | None) -> None:
        self._file = file
        self._serializer = serializer
        self._counts = Counter[tuple[str, str]]()

    def add(self, skipped: Unreadable) -> None:
        line = {"task_id": skipped.task_id, "reason": skipped.reason}
        typer.echo(to_json(line), file=self._file, err=True)
        if skipped.undecodable is None or self._serializer is None:
            return
        self._counts[skipped.undecodable] += 1
        if self._counts[skipped.undecodable] == _MOST_UNDECODABLE:
            raise TaskiqSaPgError(
                f"stopped: {_MOST_UNDECODABLE} rows could not be read for the same reason "
                f"({skipped.undecodable[1]}). Is {self._serializer} the --serializer of the old "
                "table? What was stored is kept. Run the command again with another --serializer, "
                "or with --skip-all to skip such rows"
            )


def _say_report(report: ImportReport, would: str) -> None:
    say(
        f"{plural(report.rows, 'row')} read: {plural(report.results, 'result')} and "
        f"{report.progress:,} progress {would}imported, {report.already_there:,} already in the "
        f"tables, {report.unreadable:,} skipped"
    )


def _open(path: Path) -> TextIO:
    try:
        return path.open("a", encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--errors-to: cannot write {path}: {exc.strerror}") from exc


@contextmanager
def _bar(total: int) -> Iterator[Callable[[ImportReport], None]]:
    """Shows how much of the old table has been read, on a terminal only."""
    if not is_terminal():
        yield lambda _: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("", total=total)
        yield lambda report: progress.update(bar, completed=report.rows)
