"""queue, parked, release, discard and import-queue."""

import asyncio
import json
import os
import pty
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
import typer
from sqlalchemy.ext.asyncio import create_async_engine
from taskiq import BrokerMessage

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend
from taskiq_sa_pg.cli.app import app
from taskiq_sa_pg.models import TaskIdField, build_models
from tests.cli.conftest import Cli, failure
from tests.commands import only_variables
from tests.conftest import Database

NO_QUEUE = (
    "taskiq-sa-pg: table taskiq_results_queue does not exist: create it with `taskiq-sa-pg upgrade "
    "--queue`, or pass --table-name and --schema of its results table"
)

WAITS, PARKED = "now() - interval '90 seconds'", "'infinity'"
LATER = "now() + interval '1 hour'"


@dataclass(frozen=True)
class CliOf(Cli):
    """The commands on tables with task ids of a type."""

    field_for_task_id: TaskIdField

    @property
    def environment(self) -> Mapping[str, str]:
        return {**super().environment, "TASKIQ_SA_PG_FIELD_FOR_TASK_ID": self.field_for_task_id}


@dataclass
class Queue:
    """The test's queue, the commands on it, and what is in it."""

    cli: Cli
    database: Database
    is_uuid: bool = False

    def put(self, *task_ids: str, available_at: str = PARKED, worker: str | None = "w:1") -> None:
        """Puts tasks into it as a broker leaves them, those of even number as `even`."""
        for number, task_id in enumerate(task_ids):
            self.execute(
                "INSERT INTO taskiq_results_queue (task_id, queue_name, task_name, message, "
                f"available_at, worker, deliveries, queued_at) VALUES ($1, $2, $3, $4, "
                f"{available_at}, $5, 6, now() + interval '1 second' * $6)",
                uuid.UUID(task_id) if self.is_uuid else task_id,
                "mail" if number % 3 == 2 else "default",
                "odd" if number % 2 else "even",
                b"message",
                worker,
                number,
            )

    def execute(self, query: str, *args: object) -> list[asyncpg.Record]:
        return asyncio.run(self.database.fetch(query, *args))

    def rows(self) -> dict[str, asyncpg.Record]:
        query = (
            "SELECT *, available_at = 'infinity' AS is_parked, available_at <= now() AS is_due "
            "FROM taskiq_results_queue"
        )
        return {str(row["task_id"]): row for row in self.execute(query)}


NewQueue = Callable[..., Queue]


@pytest.fixture
def new_queue(database: Database) -> NewQueue:
    """Makes the tables, on which the commands work by a driver."""

    def make(driver: str = "asyncpg", field_for_task_id: TaskIdField = "VarChar") -> Queue:
        async def create() -> None:
            dsn = database.dsn.replace("postgresql://", "postgresql+psycopg://", 1)
            engine = create_async_engine(dsn)
            models = build_models(field_for_task_id=field_for_task_id, queue=True)
            assert models.queue_table is not None
            async with engine.begin() as connection:
                await connection.run_sync(models.queue_table.create)
            await engine.dispose()

        asyncio.run(create())
        cli = CliOf(database.dsn_of(driver), field_for_task_id)
        return Queue(cli, database, field_for_task_id == "Uuid")

    return make


@pytest.fixture
def queue(new_queue: NewQueue) -> Queue:
    return new_queue()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_tasks_are_counted_by_what_they_are_at(new_queue: NewQueue, driver: str) -> None:
    """One whose lease has ended waits again; a driver that knows no infinity counts the same."""
    queue = new_queue(driver)
    assert queue.cli.ok("queue") == "0 tasks: 0 waiting, 0 delayed, 0 running, 0 parked\n"
    assert queue.cli.json("queue")["oldest_waiting"] is None
    queue.put("waits", available_at=WAITS, worker=None)
    queue.put("its lease has ended", available_at="now() - interval '1 hour'", worker="w:1")
    queue.put("delayed", "delayed too", available_at=LATER, worker=None)
    queue.put("running", available_at=LATER)
    queue.put("parked", "parked as well", "in another queue")

    found = queue.cli.json("queue")
    assert 3600 <= found.pop("oldest_waiting") < 4000
    [even, odd, mail] = found.pop("tasks")
    counts = {"depth": 8, "waiting": 2, "delayed": 2, "running": 1, "parked": 3}
    assert found == {**counts, "at_least": []}
    assert 3600 <= even.pop("oldest_waiting") < 4000
    assert even == {
        "queue_name": "default",
        "task_name": "even",
        "waiting": 2,
        "delayed": 1,
        "running": 1,
        "parked": 1,
        "at_least": [],
    }
    assert odd == {
        "queue_name": "default",
        "task_name": "odd",
        "oldest_waiting": None,
        "waiting": 0,
        "delayed": 1,
        "running": 0,
        "parked": 1,
        "at_least": [],
    }
    assert (mail["queue_name"], mail["parked"], mail["waiting"]) == ("mail", 1, 0)

    head, names, *lines = queue.cli.ok("queue").splitlines()
    assert head.startswith("8 tasks: 2 waiting, the oldest for 3,6")
    assert head.endswith(" s, 2 delayed, 1 running, 3 parked")
    assert names.split() == [
        "queue",
        "task",
        "waiting",
        "oldest",
        "s",
        "delayed",
        "running",
        "parked",
    ]
    assert lines[1].split() == ["default", "odd", "0", "1", "0", "1"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_parked_tasks_are_listed(new_queue: NewQueue, driver: str) -> None:
    queue = new_queue(driver)
    queue.put("waits", available_at=WAITS, worker=None)
    queue.put("c", "a", "b\x1b[1m", worker="host:1")

    def ids(*arguments: str) -> list[str]:
        return [each["task_id"] for each in queue.cli.json("parked", *arguments)]

    assert ids() == ["c", "a", "b\x1b[1m"], "in the order in which they were sent"
    assert ids("--limit", "2") == ["c", "a"]
    assert ids("--task-name", "even") == ["c", "b\x1b[1m"]
    assert ids("--task-name", "even", "--queue-name", "mail") == ["b\x1b[1m"]
    found = queue.cli.json("parked", "--limit", "1")[0]
    assert found["queued_at"] == str(queue.rows()["c"]["queued_at"]).replace(" ", "T").replace(
        "+00:00", "Z"
    )
    # Five times to be executed, and once more to be given up.
    assert (found["deliveries"], found["worker"]) == (5, "host:1")
    assert queue.cli.ok("parked").splitlines()[-1].split() == [
        *found_time(queue),
        *("mail", "even", "5", "host:1", "b\\x1b[1m"),
    ]


def found_time(queue: Queue) -> list[str]:
    queued_at = queue.rows()["b\x1b[1m"]["queued_at"]
    return str(queued_at.isoformat(sep=" ", timespec="seconds")).split()


DONE = {"release": "released", "discard": "discarded"}
IDS = [str(uuid.UUID(int=number)) for number in range(4)]


@pytest.mark.parametrize(
    ("driver", "field"), [("asyncpg", "VarChar"), ("psycopg", "Text"), ("psycopg", "Uuid")]
)
@pytest.mark.parametrize("command", ["release", "discard"])
def test_what_is_not_parked_is_named(
    new_queue: NewQueue, driver: str, field: TaskIdField, command: str
) -> None:
    queue = new_queue(driver, field)
    parked, runs, other, unknown = IDS
    queue.put(parked, other)
    queue.put(runs, available_at=LATER)
    before = queue.rows()
    named = parked.replace("-", "") if field == "Uuid" else parked
    result = queue.cli.run(command, runs, named, unknown)
    assert (result.exit_code, result.stdout) == (
        1,
        f"1 parked task {DONE[command]}\n",
    )
    assert result.stderr.splitlines() == [
        f"taskiq-sa-pg: task {runs} is not parked",
        f"taskiq-sa-pg: task {unknown} is not parked",
    ]
    after = queue.rows()
    assert {key: after[key] for key in (runs, other)} == {key: before[key] for key in (runs, other)}
    if command == "release":
        row = after[parked]
        assert row["is_due"]
        assert (row["deliveries"], row["worker"]) == (0, None)
        assert row["claim"] == before[parked]["claim"] + 1
    else:
        assert parked not in after
    result = queue.cli.run(command, named, "--json")
    assert json.loads(result.stdout) == {DONE[command]: 0, "not_parked": [named]}
    assert result.exit_code == 1


@pytest.mark.parametrize("command", [["release"], ["discard", "--yes"]])
def test_all_may_be_of_a_queue_and_of_a_task(queue: Queue, command: list[str]) -> None:
    queue.put("0", "1", "2", "3")
    queue.put("runs", available_at=LATER)
    queue.put("waits", available_at=WAITS, worker=None)

    def parked() -> set[str]:
        return {task_id for task_id, row in queue.rows().items() if row["is_parked"]}

    queue.cli.ok(*command, "--all", "--queue-name", "mail", "--task-name", "odd")
    assert parked() == {"0", "1", "2", "3"}
    assert queue.cli.ok(*command, "--all", "--queue-name", "mail").startswith("1 parked task ")
    assert parked() == {"0", "1", "3"}
    queue.cli.ok(*command, "--all", "--task-name", "odd")
    assert parked() == {"0"}
    queue.cli.ok(*command, "--all")
    assert parked() == set()
    assert queue.rows()["runs"]["worker"] == "w:1"
    assert {"runs", "waits"} <= queue.rows().keys()


@pytest.mark.parametrize("command", [["release"], ["discard", "--yes"]])
def test_any_number_may_be_parked(queue: Queue, command: list[str]) -> None:
    queue.execute(
        "INSERT INTO taskiq_results_queue (task_id, task_name, message, available_at) "
        "SELECT n, 't', '', 'infinity' FROM generate_series(1, 2345) n"
    )
    assert queue.cli.ok(*command, "--all").startswith("2,345 parked tasks")
    assert queue.cli.json("queue")["parked"] == 0


async def test_workers_are_told_of_what_is_released(database: Database, cli: Cli) -> None:
    """A task that was given up is executed, and its result takes the place of the error."""
    backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
        database.dsn, run_migrations=True
    )
    broker = SQLAlchemyBroker(database.dsn, check_schema="off", max_deliveries=1)
    broker = broker.with_result_backend(backend)
    broker.register_task(lambda: None, task_name="t")
    models, queue = broker.models, broker.models.queue_table
    assert queue is not None
    await broker.startup()
    async with backend.runtime.database.engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all, tables=[queue])
    listener = await asyncpg.connect(database.direct_dsn)
    told: asyncio.Queue[str] = asyncio.Queue()
    await listener.add_listener(
        models.config.queue_channel, lambda *notification: told.put_nowait(notification[-1])
    )
    message = BrokerMessage(task_id="x", task_name="t", message=b"{}", labels={})
    await broker.kick(message)
    assert await told.get() == '["default"]'
    await database.fetch("UPDATE taskiq_results_queue SET available_at = 'infinity', deliveries=2")
    tasks = broker.listen()
    assert await asyncio.to_thread(cli.ok, "release", "x") == "1 parked task released\n"
    assert await told.get() == '["default"]'
    delivered = await anext(tasks)
    assert delivered.data == b"{}"
    assert (await database.fetch("SELECT deliveries FROM taskiq_results_queue"))[0][0] == 1
    await delivered.ack()  # type: ignore[misc]  # ours is a coroutine function
    await tasks.aclose()
    await listener.close()
    await broker.shutdown()


def test_discarding_all_asks(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.put("0", "1", "2")
    line = queue.cli.fails("discard", "--all", status=2)
    assert (
        line == "taskiq-sa-pg: discard --all asks for confirmation: without a terminal, add --yes"
    )
    for answer, is_left in ((b"n\n", True), (b"y\n", False)):
        controller, terminal = pty.openpty()
        os.write(controller, answer)
        refused = pytest.raises(typer.Abort) if is_left else nullcontext()
        with os.fdopen(terminal) as stdin, only_variables(queue.cli.environment), refused:
            monkeypatch.setattr(sys, "stdin", stdin)
            app(["discard", "--all", "--task-name", "odd"], standalone_mode=False)
        os.close(controller)
        assert capsys.readouterr().err == "Delete 1 parked task? [y/N]:"
        assert queue.rows().keys() == ({"0", "1", "2"} if is_left else {"0", "2"})


def test_a_discarded_task_keeps_its_result(queue: Queue) -> None:
    queue.cli.store(lambda backend: backend.set_result("x", failure(ValueError("given up"))))
    queue.put("x")
    queue.cli.ok("discard", "x")
    assert queue.cli.json("show", "x")["outcome"] == "failed"


@pytest.mark.parametrize("command", ["release", "discard"])
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "pass either task ids or --all"),
        ("x --all", "pass either task ids or --all"),
        ("x --task-name t", "--queue-name and --task-name need --all"),
        ("x --queue-name q", "--queue-name and --task-name need --all"),
    ],
)
def test_which_tasks_has_to_be_clear(cli: Cli, command: str, arguments: str, reason: str) -> None:
    assert cli.fails(command, *arguments.split(), status=2) == f"taskiq-sa-pg: {reason}"


@pytest.mark.parametrize("command", ["queue", "parked", "release x", "discard --all --yes"])
def test_without_a_queue_the_remedy_is_told(cli: Cli, command: str) -> None:
    assert cli.fails(*command.split()) == NO_QUEUE


OLD = (
    "CREATE TABLE old (id SERIAL PRIMARY KEY, task_id VARCHAR NOT NULL, task_name VARCHAR NOT NULL,"
    " message TEXT NOT NULL, labels JSONB NOT NULL, status TEXT NOT NULL DEFAULT 'pending', "
    "created_at TIMESTAMP WITH TIME ZONE DEFAULT NOW());"
    "INSERT INTO old (task_id, task_name, message, labels, status, created_at) VALUES "
    """('a', 't', '{}', '{}', 'pending', '2026-01-02 03:04:05Z'),"""
    """('b', 't', '{}', '{"queue_name": "mail"}', 'pending', now()),"""
    """('a', 't', '{"retry": 1}', '{}', 'pending', now()),"""
    """('c', 't', '{}', '{"priority": "high"}', 'pending', now()),"""
    """('d', 't', '{}', '{}', 'processing', now())"""
)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_tasks_of_taskiq_postgres_are_moved(new_queue: NewQueue, driver: str) -> None:
    queue = new_queue(driver)
    Cli(queue.database.dsn).execute(OLD)
    command = ("import-queue", "--from-table", "old")
    counts = {"messages": 4, "moved": 2, "already_there": 0, "superseded": 1, "left_out": 1}
    reason = "the label priority must be a whole number from 0 to 9, not 'high'"
    left_out = {"task_id": "c", "reason": reason}

    result = queue.cli.run(*command, "--dry-run", "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report.pop("oldest") == "2026-01-02T03:04:05Z"
    assert report == {**counts, "processing": 1, "is_dry_run": True}
    assert json.loads(result.stderr) == left_out
    assert not queue.rows()

    result = queue.cli.run(*command, "--since", "1h", "--queue-name", "new")
    assert result.exit_code == 1
    told, processing = result.stdout.splitlines()
    assert told.startswith("3 tasks read, sent since ")
    assert told.endswith(": 2 moved, 0 already in the queue, 0 sent again later, 1 skipped")
    assert (
        processing == "1 task taken by a worker left in the old table: --processing moves them, too"
    )
    rows = queue.rows()
    assert {task_id: row["queue_name"] for task_id, row in rows.items()} == {
        "a": "new",
        "b": "mail",
    }
    assert rows["a"]["message"] == b'{"retry": 1}'

    queue.execute("UPDATE old SET labels = '{}' WHERE task_id = 'c'")
    assert queue.cli.ok(*command, "--processing", "--keep").endswith(
        ": 2 copied, 1 already in the queue, 0 sent again later, 0 skipped\n"
        "1 task taken by a worker left in the old table: --processing moves them, too\n"
    )


def test_without_the_old_table_or_ours_nothing_is_imported(cli: Cli, queue: Queue) -> None:
    assert "table old does not exist" in cli.fails("import-queue", "--from-table", "old")
    queue.execute("CREATE TABLE old (id INTEGER)")
    line = cli.fails("import-queue", "--from-table", "old")
    assert "table old is not a table of taskiq-postgres' broker" in line
    cli.execute("DROP TABLE old, taskiq_results_queue;" + OLD)
    assert cli.fails("import-queue", "--from-table", "old") == NO_QUEUE
    assert len(queue.execute("SELECT FROM old")) == 5
