"""The command that brings results over from another package."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from sqlalchemy import NullPool

from taskiq_sa_pg.cli.output import JsonOption, console, say, say_json, to_json
from taskiq_sa_pg.cli.target import Target, find_serializer
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.importing import ImportReport, count_rows, import_results


async def import_old_results(
    target: Target,
    from_table: Annotated[str, typer.Option(help="The table of taskiq-postgres.")],
    from_schema: Annotated[
        str | None, typer.Option(help="Its PostgreSQL schema, else the search_path's.")
    ] = None,
    from_dsn: Annotated[
        str | None, typer.Option(help="Its database, where that is another.")
    ] = None,
    serializer: Annotated[
        str,
        typer.Option(help="Of its rows: pickle, json, orjson, msgpack, cbor or module:attribute."),
    ] = "pickle",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are read at once.")] = 1000,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read everything, and store nothing.")
    ] = False,
    errors_to: Annotated[
        Path | None, typer.Option(help="File for what cannot be read, as lines of JSON.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Stores the results and progress of a taskiq-postgres table that ours do not have.

    The old table stays as it is, and nothing of ours is overwritten, so the command may be
    interrupted and run again. The exit status is 1 if something could not be read. Reading a pickle
    runs what it says.
    """
    async with AsyncExitStack() as stack:
        errors = stack.enter_context(_open(errors_to)) if errors_to else None
        backend = await stack.enter_async_context(target.backend())
        engine = None
        if from_dsn is not None:
            engine = make_engine(from_dsn, "--from-dsn", poolclass=NullPool)
            stack.push_async_callback(engine.dispose)
        total = await count_rows(backend, from_table, from_engine=engine, from_schema=from_schema)
        report = await import_results(
            backend,
            from_table,
            from_engine=engine,
            from_schema=from_schema,
            serializer=find_serializer(serializer),
            batch_size=batch_size,
            dry_run=dry_run,
            on_batch=stack.enter_context(_bar(total)),
            on_unreadable=lambda each: typer.echo(to_json(asdict(each)), file=errors, err=True),
        )
    if json:
        say_json(asdict(report) | {"is_dry_run": dry_run})
    else:
        _say_report(report, "would be " if dry_run else "")
    if report.unreadable:
        raise typer.Exit(1)


def _say_report(report: ImportReport, would: str) -> None:
    say(
        f"{report.rows:,} rows read: {report.results:,} results and {report.progress:,} "
        f"progress {would}imported, {report.already_there:,} were there already, "
        f"{report.unreadable:,} could not be read"
    )


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--errors-to: cannot write {path}: {exc.strerror}") from exc


@contextmanager
def _bar(total: int) -> Iterator[Callable[[ImportReport], None]]:
    """Shows how much of the old table has been read; on a terminal only."""
    if not sys.stdout.isatty():
        yield lambda _: None
        return
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("", total=total)
        yield lambda report: progress.update(bar, completed=report.rows)
