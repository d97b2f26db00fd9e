"""The commands for the broker's queue."""

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from sqlalchemy import NullPool

from taskiq_sa_pg.broker import QueueCount, SQLAlchemyBroker
from taskiq_sa_pg.cli.output import (
    MAX_INT,
    JsonOption,
    complain,
    plural,
    say,
    say_json,
    to_json,
)
from taskiq_sa_pg.cli.since import parse_since
from taskiq_sa_pg.cli.tables import say_table
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError, StorageError
from taskiq_sa_pg.importing import QueueImportReport, import_queue
from taskiq_sa_pg.models import DEFAULT_QUEUE, build_models

UNDEFINED_TABLE: Final = "42P01"

_STATES: Final = ("waiting", "delayed", "running", "parked")

_TaskIds = Annotated[
    list[str] | None, typer.Argument(metavar="TASK_IDS", help="Ids of parked tasks.")
]
_All = Annotated[bool, typer.Option("--all", help="All parked tasks.")]
_QueueName = Annotated[str | None, typer.Option(help="Only in this queue.")]
_TaskName = Annotated[str | None, typer.Option(help="Only with this task name.")]


async def queue(
    target: Target,
    limit: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_INT,
            help="Stop counting at this number, for each state and priority of a queue.",
        ),
    ] = 10_000,
    json: JsonOption = False,
) -> None:
    """Count the tasks in the broker's queue.

    Tasks are counted by queue, task name and state: waiting, delayed, running or parked. "oldest s"
    is the number of seconds for which the oldest waiting task has been due. "10,000+" means that
    counting stopped at --limit. A larger --limit takes longer: seconds for a million tasks.
    """
    async with _open(target) as broker:
        counts = await broker.get_queues(limit)
    oldest = max((each.oldest_waiting or 0.0 for each in counts if each.waiting), default=None)
    sums = {name: sum(getattr(each, name) for each in counts) for name in _STATES}
    depth = sum(sums.values())
    at_least = [name for name in _STATES if any(name in each.at_least for each in counts)]
    if json:
        tasks = [asdict(each) for each in counts]
        found = {"depth": depth, **sums, "oldest_waiting": oldest, "at_least": at_least}
        say_json({**found, "tasks": tasks})
        return
    since = "" if oldest is None else f", the oldest for {oldest:,.1f} s"
    waiting, *others = (f"{_shown(count, s in at_least)} {s}" for s, count in sums.items())
    noun = "task" if depth == 1 else "tasks"
    say(f"{_shown(depth, bool(at_least))} {noun}: {', '.join([waiting + since, *others])}")
    if counts:
        headers = ["queue", "task", "waiting", "oldest s", "delayed", "running", "parked"]
        say_table(headers, [_cells(each) for each in counts], "")


def _cells(each: QueueCount) -> list[str]:
    oldest = "" if each.oldest_waiting is None else f"{each.oldest_waiting:,.1f}"
    names = each.queue_name, each.task_name
    counts = [_shown(getattr(each, name), name in each.at_least) for name in _STATES]
    return [*names, counts[0], oldest, *counts[1:]]


def _shown(count: int, is_at_least: bool) -> str:
    return f"{count:,}{'+' if is_at_least else ''}"


async def parked(
    target: Target,
    queue_name: _QueueName = None,
    task_name: _TaskName = None,
    limit: Annotated[int, typer.Option(min=1, max=MAX_INT, help="Maximum number of tasks.")] = 100,
    json: JsonOption = False,
) -> None:
    """List parked tasks.

    The oldest task is first. A task is parked if it was delivered too often and never acknowledged.
    The worker in the list parked the task. The result of a parked task is an error. `release`
    delivers the task again, `discard` deletes it.
    """
    async with _open(target) as broker:
        found = await broker.get_parked(queue_name, task_name, limit)
    if json:
        say_json([asdict(each) for each in found])
        return
    headers = ["queued at", "queue", "task", "deliveries", "worker", "task id"]
    rows = [
        (t.queued_at, t.queue_name, t.task_name, str(t.deliveries), t.worker, t.task_id)
        for t in found
    ]
    say_table(headers, rows, "no parked tasks")


async def release(
    target: Target,
    task_ids: _TaskIds = None,
    everything: _All = False,
    queue_name: _QueueName = None,
    task_name: _TaskName = None,
    json: JsonOption = False,
) -> None:
    """Deliver parked tasks again.

    They are due at once, as if they had just been sent, and workers are notified. The result of a
    task stays an error until the task has run. The exit status is 1 if a task id is not parked.
    """
    column_ids = _check_choice(target, task_ids, everything, queue_name, task_name)
    async with _open(target) as broker:
        done = await broker.runtime.admin.release(column_ids, queue_name, task_name)
    _report(task_ids, column_ids, done, "released", json=json)


def discard(
    target: Target,
    task_ids: _TaskIds = None,
    everything: _All = False,
    queue_name: _QueueName = None,
    task_name: _TaskName = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for confirmation of --all.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Delete parked tasks.

    Their results, which are errors, are kept. --all asks for confirmation. The exit status is 1 if
    a task id is not parked.
    """
    column_ids = _check_choice(target, task_ids, everything, queue_name, task_name)
    if everything and not yes:
        if not sys.stdin.isatty():
            raise ConfigurationError(
                "discard --all asks for confirmation: without a terminal, add --yes"
            )
        # Not in an event loop, which would catch Ctrl-C.
        count = asyncio.run(_count(target, queue_name, task_name))
        if count:
            typer.confirm(f"Delete {plural(count, 'parked task')}?", abort=True, err=True)

    async def run() -> set[Any]:
        async with _open(target) as broker:
            return await broker.runtime.admin.discard(column_ids, queue_name, task_name)

    _report(task_ids, column_ids, asyncio.run(run()), "discarded", json=json)


async def _count(target: Target, queue_name: str | None, task_name: str | None) -> int:
    async with _open(target) as broker:
        return await broker.runtime.admin.count_parked(queue_name, task_name)


def _check_choice(
    target: Target,
    task_ids: list[str] | None,
    everything: bool,
    queue_name: str | None,
    task_name: str | None,
) -> list[Any] | None:
    """The ids as the column has them, or None for all.

    Raises:
        ConfigurationError: Both or neither were given.
    """
    if bool(task_ids) == everything:
        raise ConfigurationError("pass either task ids or --all")
    if not everything and not (queue_name is None and task_name is None):
        raise ConfigurationError("--queue-name and --task-name need --all")
    if not task_ids:
        return None
    return [target.config.to_column_task_id(task_id) for task_id in task_ids]


def _report(
    task_ids: list[str] | None,
    column_ids: list[Any] | None,
    done: Collection[Any],
    what: str,
    *,
    json: bool,
) -> None:
    named: Iterable[tuple[str, Any]] = zip(task_ids or (), column_ids or (), strict=True)
    missing = [task_id for task_id, column_id in named if column_id not in done]
    if json:
        say_json({what: len(done), "not_parked": missing})
    else:
        say(f"{plural(len(done), 'parked task')} {what}")
        for task_id in missing:
            complain(f"task {task_id} is not parked")
    if missing:
        raise typer.Exit(1)


async def import_old_queue(
    target: Target,
    from_table: Annotated[str, typer.Option(help="Table of taskiq-postgres' broker.")],
    from_schema: Annotated[
        str | None, typer.Option(help="Its PostgreSQL schema; by default the search_path decides.")
    ] = None,
    queue_name: Annotated[
        str, typer.Option(help="Queue for tasks without a label queue_name.")
    ] = DEFAULT_QUEUE,
    since: Annotated[
        str | None,
        typer.Option(help="Only sent in the last 30s, 15m, 2h, 7d or 1w, or since an ISO date."),
    ] = None,
    processing: Annotated[
        bool,
        typer.Option(
            "--processing",
            help="Also move tasks that a worker has taken. Stop the old workers first: they may "
            "still be executing them.",
        ),
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Copy: do not change the old table.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read everything, change nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Import tasks of taskiq-postgres' broker.

    They are moved into the queue in the same database. The old table also has every task that was
    lost since it was created: check with --dry-run, and choose with --since. Stop the old senders
    and workers first. You can interrupt the command and run it again. If several tasks have the
    same id, such as retries, the last is moved and the others are deleted. Tasks that the queue
    cannot hold stay and are printed, and the exit status is 1.
    """
    start = None if since is None else parse_since(since)
    async with _open(target, queue_name) as broker:
        report = await import_queue(
            broker.settings,
            broker.runtime.database,
            from_table,
            announce=broker.runtime.announce,
            from_schema=from_schema,
            since=start,
            processing=processing,
            keep=keep,
            dry_run=dry_run,
            on_left_out=lambda each: typer.echo(to_json(asdict(each)), err=True),
        )
    if json:
        say_json(asdict(report) | {"is_dry_run": dry_run})
    else:
        _say_report(report, "would be " if dry_run else "", "copied" if keep else "moved")
    if report.left_out:
        raise typer.Exit(1)


def _say_report(report: QueueImportReport, would: str, moved: str) -> None:
    since = "" if report.oldest is None else f", sent since {report.oldest:%Y-%m-%d %H:%M:%S%z}"
    say(
        f"{plural(report.messages, 'task')} read{since}: {report.moved:,} {would}{moved}, "
        f"{report.already_there:,} already in the queue, {report.superseded:,} sent again later, "
        f"{report.left_out:,} skipped"
    )
    if report.processing:
        taken = plural(report.processing, "task")
        say(f"{taken} taken by a worker left in the old table: --processing moves them, too")


@asynccontextmanager
async def _open(target: Target, queue_name: str = DEFAULT_QUEUE) -> AsyncIterator[SQLAlchemyBroker]:
    """A broker on the tables that delivers nothing; errors are printed at once."""
    broker = SQLAlchemyBroker(
        target.dsn,
        models=build_models(**asdict(target.config), queue=True),
        queue_name=queue_name,
        check_schema="off",  # reading needs fewer privileges than sending
        retry_timeout=0,
        startup_timeout=0,
        poolclass=NullPool,
    )
    await broker.startup()
    try:
        yield broker
    except StorageError as exc:
        if exc.sqlstate != UNDEFINED_TABLE:
            raise
        raise SchemaError(
            f"table {broker.settings.table} does not exist: create it with `taskiq-sa-pg upgrade "
            "--queue`, or pass --table-name and --schema of its results table"
        ) from exc
    finally:
        await broker.shutdown()
