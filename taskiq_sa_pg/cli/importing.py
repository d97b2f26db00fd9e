"""The command that brings results over from another package."""

import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TextIO

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg.cli.output import JsonOption, console, say, say_json, to_json
from taskiq_sa_pg.cli.target import Target, find_serializer
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.exceptions import ConfigurationError
from taskiq_sa_pg.importing import ImportReport, Unreadable, count_rows, import_results


async def import_old_results(
    target: Target,
    from_table: Annotated[str, typer.Option(help="The table of taskiq-postgres.")],
    from_schema: Annotated[
        str | None, typer.Option(help="Its PostgreSQL schema, else the search_path's.")
    ] = None,
    from_dsn: Annotated[
        str | None, typer.Option(help="Its database, where that is another.")
    ] = None,
    from_serializer: Annotated[
        str,
        typer.Option(
            "--serializer",
            help="Of its rows: pickle, json, orjson, msgpack, cbor or module:attribute.",
        ),
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
    with ExitStack() as stack:
        errors = stack.enter_context(_open(errors_to)) if errors_to else None

        def tell(unreadable: Unreadable) -> None:
            if errors is not None:
                errors.write(to_json(asdict(unreadable)) + "\n")
            else:
                typer.echo(to_json(asdict(unreadable)), err=True)

        async with target.backend() as backend, _engine(from_dsn) as engine:
            total = await count_rows(
                backend, from_table, from_engine=engine, from_schema=from_schema
            )
            bar = stack.enter_context(_Bar(total))
            report = await import_results(
                backend,
                from_table,
                from_engine=engine,
                from_schema=from_schema,
                serializer=find_serializer(from_serializer),
                batch_size=batch_size,
                dry_run=dry_run,
                on_batch=bar.show,
                on_unreadable=tell,
            )
    if json:
        say_json(asdict(report))
    else:
        say(_summary(report, is_dry_run=dry_run))
    if report.unreadable:
        raise typer.Exit(1)


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--errors-to: cannot write {path}: {exc.strerror}") from exc


@asynccontextmanager
async def _engine(dsn: str | None) -> AsyncIterator[AsyncEngine | None]:
    if dsn is None:
        yield None
        return
    engine = make_engine(dsn, poolclass=NullPool)
    try:
        yield engine
    finally:
        await engine.dispose()


class _Bar:
    """How much of the old table has been read; shown on a terminal only."""

    def __init__(self, total: int) -> None:
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console(),
            disable=not sys.stdout.isatty(),
        )
        self._bar = self._progress.add_task("", total=total)

    def __enter__(self) -> "_Bar":
        if not self._progress.disable:
            self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._progress.disable:  # older rich would print an empty line
            self._progress.stop()

    def show(self, report: ImportReport) -> None:
        self._progress.update(self._bar, completed=report.rows)


def _summary(report: ImportReport, *, is_dry_run: bool) -> str:
    would = "would be " if is_dry_run else ""
    return (
        f"{report.rows:,} rows read: {report.results:,} results and {report.progress:,} progress "
        f"{would}imported, {report.already_there:,} were there already, "
        f"{report.unreadable:,} could not be read"
    )
