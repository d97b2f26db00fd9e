"""The commands that list worker processes, and send tasks again."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from taskiq import AsyncBroker
from taskiq.exceptions import SendTaskError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.cli.brokers import broker_of, started
from taskiq_sa_pg.cli.output import JsonOption, complain, say, say_json
from taskiq_sa_pg.cli.tables import say_table
from taskiq_sa_pg.cli.target import Target
from taskiq_sa_pg.exceptions import TaskiqSaPgError
from taskiq_sa_pg.statements import LOST_AFTER

_NO_WORKERS = (
    'no workers. A worker is listed if its result backend has track="started" and its broker has '
    "TaskMetadataMiddleware"
)


async def workers(
    target: Target,
    max_age: Annotated[
        float,
        typer.Option(
            min=0,
            max=86_400,
            help="Seconds since a worker was last seen for it to count as alive; at most a day.",
        ),
    ] = LOST_AFTER,
    json: JsonOption = False,
) -> None:
    """List worker processes.

    The exit status is 1 if no worker is alive. This needs track="started" and
    TaskMetadataMiddleware. A worker renews its row every 15 seconds. A worker that was killed
    becomes "silent", and is listed for a day.
    """
    async with target.runtime() as runtime:
        found = await runtime.workers.read(max_age)
    if json:
        say_json([asdict(each) for each in found])
    else:
        states = {True: "alive", False: "silent"}
        rows = [
            (each.worker, states[each.is_alive], each.seen_at, each.started_at, str(each.running))
            for each in found
        ]
        say_table(["worker", "state", "seen at", "started at", "running"], rows, _NO_WORKERS)
    if not any(each.is_alive for each in found):
        raise typer.Exit(1)


async def retry(
    target: Target,
    task_ids: Annotated[
        list[str], typer.Argument(metavar="TASK_IDS", help="Ids of finished tasks.")
    ],
    broker: Annotated[
        str, typer.Option(help="Your broker, as module:attribute; it sends the tasks.")
    ],
    json: JsonOption = False,
) -> None:
    """Send finished tasks again.

    The tasks get their recorded arguments. The new task ids are printed. The tasks are read from
    the broker's result backend, or, with --dsn, from the tables that the options name. The exit
    status is 1 if a task could not be sent.
    """
    opened = broker_of(broker)
    sent: dict[str, str] = {}
    failed: dict[str, str] = {}
    async with started(opened), _backend_of(target, opened) as backend:
        for task_id in dict.fromkeys(task_ids):
            try:
                sent[task_id] = (await backend.resend(opened, task_id)).task_id
            except SendTaskError as exc:
                cause = exc.__cause__ or exc
                reason = str(cause) if isinstance(cause, TaskiqSaPgError) else repr(cause)
                failed[task_id] = f"task {task_id!r} could not be sent: {reason}"
            except TaskiqSaPgError as exc:
                failed[task_id] = str(exc)
            except Exception as exc:  # noqa: BLE001 - whatever a middleware of the broker raises
                failed[task_id] = f"task {task_id!r} could not be sent: {exc!r}"
            if not json and task_id in sent:
                say(sent[task_id])
    if json:
        say_json({"sent": sent, "failed": failed})
    for reason in failed.values():
        complain(" ".join(reason.split()))
    if failed:
        raise typer.Exit(1)


@asynccontextmanager
async def _backend_of(
    target: Target, broker: AsyncBroker
) -> AsyncIterator[SQLAlchemyResultBackend[Any]]:
    backend = broker.result_backend
    if isinstance(backend, SQLAlchemyResultBackend) and not target.has_dsn:
        yield backend
        return
    async with target.backend(check_schema="off") as other:
        yield other
