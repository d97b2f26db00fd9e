"""Tasks of taskiq-postgres' broker, which fills its own table, come into our queue."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from taskiq import BrokerMessage
from taskiq_pg.asyncpg import AsyncpgBroker

from taskiq_sa_pg import SchemaError, SQLAlchemyBroker, StorageError
from taskiq_sa_pg.broker import QueueSettings
from taskiq_sa_pg.database import Database as OurDatabase
from taskiq_sa_pg.importing import QueueImportReport, import_queue
from taskiq_sa_pg.models import TaskIdField, build_models
from tests.conftest import Database, eventually

TABLE, OURS = "taskiq_messages", "taskiq_results_queue"

SEEN = (
    "SELECT task_id, queue_name, priority, task_name, message, queued_at, available_at, "
    f"available_at <= now() AS is_due, worker, deliveries FROM {OURS} ORDER BY available_at"
)


class Importer:
    """Imports into a queue that it makes, and keeps what it was told."""

    def __init__(self, database: Database, driver: str, field: TaskIdField) -> None:
        self.schema = database
        self.models = build_models(field_for_task_id=field, queue=True)
        self.database = OurDatabase(database.dsn_of(driver), retry_timeout=0)
        self.left_out: dict[str, str] = {}
        self.announced: list[Collection[str]] = []

    async def run(self, table: str = TABLE, **options: Any) -> QueueImportReport:
        def leave_out(each: Any) -> None:
            self.left_out[each.task_id] = each.reason

        return await import_queue(
            QueueSettings(models=self.models),
            self.database,
            table,
            announce=self.announced.append,
            on_left_out=leave_out,
            **options,
        )

    async def ours(self) -> list[asyncpg.Record]:
        return await self.schema.fetch(SEEN)

    async def left(self) -> list[asyncpg.Record]:
        return await self.schema.fetch(f"SELECT id, task_id, message FROM {TABLE} ORDER BY id")


@asynccontextmanager
async def importing(
    database: Database, driver: str = "asyncpg", field: TaskIdField = "VarChar"
) -> AsyncIterator[Importer]:
    importer = Importer(database, driver, field)
    await importer.database.open()
    queue = importer.models.queue_table
    assert queue is not None
    async with importer.database.engine.begin() as connection:
        await connection.run_sync(queue.create)
    yield importer
    await importer.database.close()


@pytest.fixture
async def importer(database: Database) -> AsyncIterator[Importer]:
    async with importing(database) as importer:
        yield importer


@pytest.fixture
async def old(database: Database) -> AsyncIterator[AsyncpgBroker]:
    broker = AsyncpgBroker(database.direct_dsn, write_kwargs={"min_size": 1})
    await broker.startup()
    yield broker
    await broker.shutdown()


async def send(broker: Any, task_id: str, text: str = "", **labels: Any) -> None:
    message = BrokerMessage(task_id=task_id, task_name="t", message=text.encode(), labels=labels)
    await broker.kick(message)


def report(messages: int, **counts: int) -> QueueImportReport:
    return QueueImportReport(messages, **counts)


async def counted(importer: Importer, **options: Any) -> QueueImportReport:
    """What an import counts, without the time."""
    found = await importer.run(**options)
    found.oldest = None
    return found


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_tasks_are_delivered_as_they_were_sent(
    database: Database, old: AsyncpgBroker, driver: str
) -> None:
    async def greet(name: str) -> None: ...

    broker = SQLAlchemyBroker(database.dsn, check_schema="off")
    broker.register_task(greet, task_name="greet")
    task = old.register_task(greet, task_name="greet")
    async with importing(database, driver) as importer:
        sent = await task.kicker().with_labels(tenant="ü").kiq("Jürgen 😀")
        await send(old, "first")
        await database.fetch(f"UPDATE {TABLE} SET created_at = '2026-01-02Z' WHERE task_id='first'")
        assert await counted(importer) == report(2, moved=2)
        assert await importer.left() == []
        assert importer.announced == [{"default"}]
        assert [row["task_id"] for row in await importer.ours()] == ["first", sent.task_id]
        await database.fetch(f"DELETE FROM {OURS} WHERE task_id = 'first'")
        await broker.startup()
        tasks = broker.listen()
        delivered = broker.formatter.loads((await anext(tasks)).data)
        assert (delivered.task_id, delivered.args) == (sent.task_id, ["Jürgen 😀"])
        assert delivered.labels["tenant"] == "ü"
        await tasks.aclose()
        await broker.shutdown()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_labels_are_honoured_from_when_the_task_was_sent(
    database: Database, old: AsyncpgBroker, driver: str
) -> None:
    sent_at = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    async with importing(database, driver) as importer:
        await send(old, "late", delay="7200")
        await send(old, "over", delay=1800.5, priority="9")
        await send(old, "mail", queue_name="mail", priority=3)
        await database.fetch(f"UPDATE {TABLE} SET created_at = $1", sent_at)
        await send(old, "no time")
        await database.fetch(f"UPDATE {TABLE} SET created_at = NULL WHERE task_id = 'no time'")
        found = await importer.run()
        assert (found.moved, found.oldest) == (4, sent_at)
        mail, over, fourth, late = await importer.ours()
        assert (mail["queue_name"], mail["priority"], mail["available_at"]) == ("mail", 3, sent_at)
        assert (over["queue_name"], over["priority"], over["is_due"]) == ("default", 9, True)
        assert over["available_at"] == sent_at + timedelta(seconds=1800.5)
        assert late["available_at"] == sent_at + timedelta(hours=2)
        assert (late["is_due"], late["queued_at"]) == (False, sent_at)
        assert fourth["is_due"]
        assert set(importer.announced[0]) == {"default", "mail"}


async def test_what_a_worker_has_taken_stays_unless_it_is_asked_for(
    importer: Importer, old: AsyncpgBroker
) -> None:
    await send(old, "taken")
    tasks = old.listen()
    taken = await anext(tasks)
    await send(old, "waits")
    assert await counted(importer) == report(1, moved=1, processing=1)
    assert await counted(importer, processing=True) == report(1, moved=1)
    assert await importer.left() == []
    await taken.ack()  # type: ignore[misc]  # a worker of theirs that has survived does no harm
    await tasks.aclose()
    assert {row["task_id"] for row in await importer.ours()} == {"taken", "waits"}


async def test_of_one_task_id_the_last_message_is_moved(
    importer: Importer, old: AsyncpgBroker
) -> None:
    """As a retry's; the others would execute it again. Where ours has the id, it stays."""
    for number, task_id in enumerate(["a", "b", "a", "ours", "a"]):
        await send(old, task_id, str(number))
    await importer.schema.fetch(
        f"INSERT INTO {OURS} (task_id, task_name, message) VALUES ('ours', 't', 'sent to us')"
    )
    expected = report(5, moved=2, superseded=2, already_there=1)
    assert await counted(importer, dry_run=True) == expected
    assert len(await importer.left()) == 5
    assert importer.announced == []
    assert await counted(importer) == expected
    assert await importer.left() == []
    messages = {row["task_id"]: row["message"] for row in await importer.ours()}
    assert messages == {"a": b"4", "b": b"1", "ours": b"sent to us"}


async def test_an_earlier_message_of_another_slice_goes_too(
    importer: Importer, old: AsyncpgBroker
) -> None:
    await send(old, "again", "early")
    await fill(importer, 1200)
    await send(old, "again", "late")
    assert await counted(importer) == report(1202, moved=1201, superseded=1)
    rows = {row["task_id"]: row["message"] for row in await importer.ours()}
    assert rows["again"] == b"late"
    assert len(rows) == 1201


async def fill(importer: Importer, count: int) -> None:
    """Adds messages, as many as several slices have."""
    await importer.schema.fetch(
        f"INSERT INTO {TABLE} (task_id, task_name, message, labels) "
        "SELECT 'task-' || n, 't', n, '{}' FROM generate_series(1, $1::integer) n",
        count,
    )


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_an_import_that_fails_is_ended_by_the_next(
    database: Database, old: AsyncpgBroker, driver: str
) -> None:
    """What was committed stays; no task is lost, and none is in both tables."""
    async with importing(database, driver) as importer:
        await fill(importer, 1200)
        await database.fetch(f"ALTER TABLE {OURS} ADD CONSTRAINT no CHECK (task_id <> 'task-700')")
        with pytest.raises(StorageError, match="move the tasks of table taskiq_messages"):
            await importer.run()
        ours = [row["task_id"] for row in await importer.ours()]
        left = [row["task_id"] for row in await importer.left()]
        assert sorted(ours + left) == sorted(f"task-{n}" for n in range(1, 1201))
        assert (len(ours), len(importer.announced)) == (500, 1)
        await database.fetch(f"ALTER TABLE {OURS} DROP CONSTRAINT no")
        assert await counted(importer) == report(700, moved=700)
        assert len(await importer.ours()) == 1200


async def test_large_messages_come_in_smaller_slices(
    importer: Importer, old: AsyncpgBroker
) -> None:
    await importer.schema.fetch(
        f"INSERT INTO {TABLE} (task_id, task_name, message, labels) "
        "SELECT n, 't', repeat('x', 5000000), '{}' FROM generate_series(1, 3) n"
    )
    assert await counted(importer) == report(3, moved=3)
    assert len(importer.announced) == 2


async def test_a_task_that_an_old_worker_takes_meanwhile_is_left_to_it(
    importer: Importer, old: AsyncpgBroker
) -> None:
    await send(old, "taken")
    await send(old, "waits")
    worker = await asyncpg.connect(importer.schema.direct_dsn)
    transaction = worker.transaction()
    await transaction.start()
    await worker.execute(f"UPDATE {TABLE} SET status = 'processing' WHERE task_id = 'taken'")
    pid = worker.get_server_pid()
    running = asyncio.create_task(counted(importer))

    async def is_waiting() -> bool:
        query = "SELECT FROM pg_stat_activity WHERE $1 = ANY(pg_blocking_pids(pid))"
        return bool(await importer.schema.fetch(query, pid))

    await eventually(is_waiting)
    await transaction.commit()
    await worker.close()
    assert await running == report(1, moved=1, processing=1)
    assert [row["task_id"] for row in await importer.left()] == ["taken"]


async def test_copies_leave_the_old_table(importer: Importer, old: AsyncpgBroker) -> None:
    await send(old, "a")
    assert await counted(importer, keep=True) == report(1, moved=1)
    assert await counted(importer, keep=True) == report(1, already_there=1)
    assert len(await importer.left()) == 1
    assert await counted(importer) == report(1, already_there=1)
    assert await importer.left() == []


async def test_what_was_sent_before_may_be_left(importer: Importer, old: AsyncpgBroker) -> None:
    await send(old, "lost long ago")
    await importer.schema.fetch(f"UPDATE {TABLE} SET created_at = '2026-01-02Z'")
    await send(old, "new")
    since = datetime.now(UTC) - timedelta(days=1)
    assert await counted(importer, since=since) == report(1, moved=1)
    assert [row["task_id"] for row in await importer.left()] == ["lost long ago"]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_what_our_queue_cannot_hold_stays_and_is_named(
    database: Database, old: AsyncpgBroker, driver: str
) -> None:
    good = "7" * 32
    async with importing(database, driver, "Uuid") as importer:
        await send(old, "no UUID")
        await send(old, good)
        await send(old, "8" * 32, priority="10")
        await database.fetch(
            f"INSERT INTO {TABLE} (task_id, task_name, message, labels) "
            "VALUES ('99999999-9999-9999-9999-999999999999', 't', '', $1)",
            json.dumps(["no", "object"]),
        )
        assert await counted(importer, dry_run=True) == report(4, moved=1, left_out=3)
        assert await counted(importer) == report(4, moved=1, left_out=3)
        assert [row["task_id"].hex for row in await importer.ours()] == [good]
        assert list(importer.left_out) == [row["task_id"] for row in await importer.left()]
        no_uuid, no_priority, no_labels = importer.left_out.values()
        assert "is not a UUID" in no_uuid
        assert no_priority.startswith("the label priority must be a whole number")
        assert no_labels == "its labels are not a JSON object"


async def test_only_a_table_of_their_broker_is_read(
    importer: Importer, old: AsyncpgBroker, other_database: Database
) -> None:
    with pytest.raises(SchemaError, match="table elsewhere does not exist"):
        await importer.run("elsewhere")
    with pytest.raises(
        SchemaError, match="taskiq_results_queue is not a table of taskiq-postgres'"
    ):
        await importer.run(OURS)
    await send(old, "a")
    await other_database.fetch(f"CREATE TABLE moved (LIKE {importer.schema.schema}.{TABLE})")
    found = await importer.run("moved", from_schema=other_database.schema)
    assert found == QueueImportReport()
    assert len(await importer.left()) == 1
