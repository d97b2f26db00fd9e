"""Results of taskiq-postgres come over whole, whatever they are and whatever happens meanwhile."""

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from taskiq import TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import JSONSerializer, PickleSerializer
from taskiq_pg.asyncpg import AsyncpgResultBackend

from taskiq_sa_pg import (
    SchemaError,
    SQLAlchemyResultBackend,
    StorageError,
)
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.importing import ImportReport, Unreadable, count_rows, import_results
from taskiq_sa_pg.models import TaskIdField
from tests.conftest import (
    BackendFactory,
    Database,
    assert_nothing_checked_out,
    assert_nothing_in_use,
    eventually,
)
from tests.integration.old_tables import assert_same, fill, fill_plainly, old_backend, value

Backend = SQLAlchemyResultBackend[Any]


async def ids_in(database: Database, table: str) -> list[str]:
    rows = await database.fetch(f"SELECT task_id FROM {table}")
    return sorted(row["task_id"] for row in rows)


@pytest.mark.parametrize(
    ("field", "payload", "serializer"),
    [
        ("VarChar", "Bytea", PickleSerializer()),
        ("VarChar", "Jsonb", JSONSerializer()),
        ("Text", "Jsonb", PickleSerializer()),
        ("Uuid", "Bytea", JSONSerializer()),
    ],
    ids=["VarChar-Bytea-pickle", "VarChar-Jsonb-JSON", "Text-Jsonb-pickle", "Uuid-Bytea-JSON"],
)
async def test_everything_reads_as_from_the_old_table(
    field: TaskIdField,
    payload: str,
    serializer: TaskiqSerializer,
    database: Database,
    start_backend: BackendFactory,
) -> None:
    ours: Backend = await start_backend(field_for_task_id=field, field_for_payload=payload)
    async with old_backend(
        database.direct_dsn, field_for_task_id=field, serializer=serializer
    ) as old:
        with_result, with_progress = await fill(old)
        left_out: list[Unreadable] = []
        report = await import_results(
            ours, "old", serializer=serializer, batch_size=20, on_unreadable=left_out.append
        )
        assert left_out == []
        rows = len({*with_result, *with_progress})
        assert rows > 60
        assert report == ImportReport(
            rows=rows, results=len(with_result), progress=len(with_progress)
        )
        assert await count_rows(ours, "old") == rows
        await assert_same(old, ours, with_result, with_progress)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_wrong_address_is_tried_once(
    driver: str, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    ours: Backend = await start_backend()
    nowhere = make_engine(f"postgresql+{driver}://me:secret@127.0.0.1:1/old")
    for work in (import_results, count_rows):
        with pytest.raises(StorageError, match="check table old"):
            await work(ours, "old", from_engine=nowhere)
    assert [record.getMessage() for record in caplog.records if "again" in record.message] == []
    await nowhere.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_it_comes_from_another_database_on_an_engine_of_its_own(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    name = f"other_{uuid.uuid4().hex}"
    await database.fetch(f"CREATE DATABASE {name}")
    url = make_url(database.server_dsn).set(database=name)
    other = url.render_as_string(hide_password=False)
    engine = make_engine(url.set(drivername=f"postgresql+{driver}"))
    dsn = database.dsn if driver == "asyncpg" else database.psycopg_dsn
    try:
        ours: Backend = await start_backend(dsn, table_name="old")
        async with old_backend(other) as old:
            with_result, with_progress = await fill(old, repeat=1)
            for count in (len(with_result), 0):
                report = await import_results(ours, "old", from_engine=engine, from_schema="public")
                assert report.results == count
            assert await count_rows(ours, "old", from_engine=engine) == report.rows
            await assert_same(old, ours, with_result, with_progress)
        assert_nothing_checked_out(engine)
    finally:
        await engine.dispose()
        await database.fetch(f"DROP DATABASE {name}")


async def test_what_cannot_be_read_is_told_and_stops_nothing_else(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend(field_for_task_id="Uuid", max_payload_bytes=1000)
    good = [uuid.uuid4().hex for _ in range(20)]
    for task_id in good:
        await old.set_result(task_id, value(1))
        await old.set_progress(task_id, TaskProgress(state="x", meta=None))
    bad = [uuid.uuid4().hex for _ in range(4)]
    pickled = PickleSerializer().dumpb
    unimportable = b"cno_such_module\nno_such_class\n."
    await database.fetch("INSERT INTO old VALUES ($1, $2)", bad[0], b"garbage")
    await database.fetch("INSERT INTO old VALUES ($1, $2)", bad[1], unimportable)
    await database.fetch("INSERT INTO old VALUES ($1, $2)", bad[2], pickled(["no", "result"]))
    await old.set_result(
        bad[3], TaskiqResult(is_err=False, return_value="x" * 2000, execution_time=1)
    )
    await old.set_result("no UUID", value(2))
    await database.fetch("UPDATE old SET progress = 'garbage' WHERE task_id = $1", good[7])
    left_out: list[Unreadable] = []
    report = await import_results(ours, "old", batch_size=7, on_unreadable=left_out.append)
    reasons = {unreadable.task_id: unreadable.reason for unreadable in left_out}
    assert len(left_out) == len(reasons) == 6
    assert report == ImportReport(rows=25, results=20, progress=19, unreadable=6)
    assert reasons[good[7]].startswith("progress: ")
    assert reasons[bad[0]].startswith("result: ")
    assert "no_such_module" in reasons[bad[1]]
    assert "ValidationError" in reasons[bad[2]]
    assert "the limit is 1000" in reasons[bad[3]]
    assert "is not a UUID" in reasons["no UUID"]
    assert not any("\n" in reason for reason in reasons.values())
    for task_id in good:
        assert (await ours.get_result(task_id)).return_value == 1
    assert len(await database.fetch("SELECT FROM taskiq_results")) == 20
    assert len(await database.fetch("SELECT FROM old")) == 25


async def test_a_row_that_our_table_refuses_is_told_and_the_others_are_stored(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    task_ids = await fill_plainly(old, 60)
    await database.fetch(f"ALTER TABLE taskiq_results ADD CHECK (task_id <> '{task_ids[33]}')")
    left_out: list[Unreadable] = []
    report = await import_results(ours, "old", on_unreadable=left_out.append)
    assert report == ImportReport(rows=60, results=59, unreadable=1)
    assert [unreadable.task_id for unreadable in left_out] == [task_ids[33]]
    assert "check constraint" in left_out[0].reason
    assert await ids_in(database, "taskiq_results") == [*task_ids[:33], *task_ids[34:]]


async def test_a_fault_that_is_no_rows_ends_it(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    await fill_plainly(old, 30)
    await database.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE insufficient_privilege USING MESSAGE = 'the right is gone'; END$$"
    )
    await database.fetch(
        "CREATE TRIGGER refuse BEFORE INSERT ON taskiq_results FOR EACH ROW "
        "WHEN (NEW.task_id > 'task-00019') EXECUTE FUNCTION refuse()"
    )
    left_out: list[Unreadable] = []
    with pytest.raises(
        StorageError, match=r"import into table taskiq_results: .*the right is gone"
    ):
        await import_results(ours, "old", batch_size=10, on_unreadable=left_out.append)
    assert left_out == []
    await database.fetch("DROP TRIGGER refuse ON taskiq_results")
    report = await import_results(ours, "old")
    assert report == ImportReport(rows=30, results=10, already_there=20)


@pytest.mark.parametrize("dry_run", [False, True])
async def test_what_ours_have_stays(
    dry_run: bool, old: AsyncpgResultBackend, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    await old.set_result("1", value(1))
    await old.set_result("2", value(2))
    for task_id in "123":
        await old.set_progress(task_id, TaskProgress(state="old", meta=None))
    await ours.set_result("1", value(-1))
    await ours.set_progress("3", TaskProgress(state="new", meta=None))
    report = await import_results(ours, "old", dry_run=dry_run)
    assert report == ImportReport(rows=3, results=1, progress=2, already_there=2)
    assert (await ours.get_result("1")).return_value == -1
    progress = await ours.get_progress("3")
    assert progress is not None
    assert progress.state == "new"


@asynccontextmanager
async def blocked_import(
    ours: Backend, database: Database
) -> AsyncIterator[asyncio.Task[ImportReport]]:
    """An import that waits for a worker's INSERT, which is committed at the end."""
    worker = await asyncpg.connect(database.direct_dsn)
    transaction = worker.transaction()
    await transaction.start()
    await worker.execute(
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels) "
        "VALUES ('task-00001', false, $1, 1, '{}')",
        PickleSerializer().dumpb("newer"),
    )
    importing = asyncio.create_task(import_results(ours, "old"))

    async def is_blocked() -> bool:
        return bool(
            await database.fetch(
                "SELECT FROM pg_stat_activity "
                "WHERE application_name = 'importer' AND wait_event_type = 'Lock'"
            )
        )

    try:
        await eventually(is_blocked)
        yield importing
        await transaction.commit()
    finally:
        await worker.close()


async def test_a_result_that_comes_in_the_middle_stays(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    """It is not committed yet as the import looks for it."""
    ours: Backend = await start_backend(f"{database.dsn}&application_name=importer")
    await fill_plainly(old, 3)
    async with blocked_import(ours, database) as importing:
        pass
    assert await importing == ImportReport(rows=3, results=2, already_there=1)
    assert (await ours.get_result("task-00001")).return_value == "newer"


async def test_a_cancelled_import_leaves_nothing_under_way(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend(f"{database.dsn}&application_name=importer")
    await fill_plainly(old, 3)
    async with blocked_import(ours, database) as importing:
        importing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await importing
        assert_nothing_in_use(ours)
    assert await ids_in(database, "taskiq_results") == ["task-00001"]


async def test_a_second_run_brings_what_came_after_the_first(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    await fill_plainly(old, 30)
    before = await database.fetch("SELECT *, xmin::text FROM old ORDER BY task_id")
    assert (await import_results(ours, "old")).results == 30
    assert await database.fetch("SELECT *, xmin::text FROM old ORDER BY task_id") == before
    stored = await database.fetch("SELECT *, xmin::text FROM taskiq_results ORDER BY task_id")
    assert await import_results(ours, "old") == ImportReport(rows=30, already_there=30)
    again = await database.fetch("SELECT *, xmin::text FROM taskiq_results ORDER BY task_id")
    assert again == stored
    await old.set_result("later", value(1))
    assert await import_results(ours, "old") == ImportReport(rows=31, results=1, already_there=30)


async def test_a_cancelled_import_is_taken_up_again(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    task_ids = await fill_plainly(old, 100)
    importing: asyncio.Task[ImportReport] = asyncio.create_task(
        import_results(ours, "old", batch_size=30, on_batch=lambda _: importing.cancel() and None)
    )
    with pytest.raises(asyncio.CancelledError):
        await importing
    assert await ids_in(database, "taskiq_results") == task_ids[:30]
    report = await import_results(ours, "old", batch_size=30)
    assert report == ImportReport(rows=100, results=70, already_there=30)
    for number, task_id in enumerate(task_ids):
        assert (await ours.get_result(task_id)).return_value == number


async def test_a_killed_import_is_taken_up_again(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    task_ids = await fill_plainly(old, 1000)
    process = await asyncio.create_subprocess_exec(
        sys.executable, Path(__file__).parent / "importer.py", database.dsn, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for _ in range(5):
        assert await process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    stored = await ids_in(database, "taskiq_results")
    assert 50 <= len(stored) < 1000
    report = await import_results(ours, "old")
    assert report.results + report.already_there == report.rows == 1000
    assert await ids_in(database, "taskiq_results") == task_ids
    results = await ours.get_results(task_ids)
    assert [results[task_id].return_value for task_id in task_ids] == list(range(1000))


async def test_a_dry_run_stores_nothing_and_counts_the_same(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend(field_for_payload="Jsonb")
    await fill(old)
    await old.set_result("x" * 2700, value(1))
    dry = await import_results(ours, "old", dry_run=True)
    assert dry.unreadable == 1
    assert await ids_in(database, "taskiq_results") == []
    assert await ids_in(database, "taskiq_results_progress") == []
    assert await import_results(ours, "old") == dry


NAMES = ['say "x"', "100%", "Upper", "tabelle_ä", "a.b", "select"]
if not sqlalchemy.__version__.startswith("2.0."):  # which takes it for a parameter
    NAMES.append("%(x)s")


@pytest.mark.parametrize("name", NAMES)
async def test_the_old_table_and_its_schema_have_any_name(
    name: str, old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    task_ids = await fill_plainly(old, 5)
    schema, quoted = f"{name} {database.schema[:40]}", name.replace('"', '""')
    quoted_schema = schema.replace('"', '""')
    await database.fetch(f'ALTER TABLE old RENAME TO "{quoted}"')
    assert (await import_results(ours, name, batch_size=2, dry_run=True)).results == 5
    await database.fetch(f'CREATE SCHEMA "{quoted_schema}"')
    await database.fetch(f'ALTER TABLE "{quoted}" SET SCHEMA "{quoted_schema}"')
    try:
        with pytest.raises(SchemaError, match="does not exist"):
            await import_results(ours, name)
        report = await import_results(ours, name, from_schema=schema, batch_size=2)
    finally:
        await database.fetch(f'DROP SCHEMA "{quoted_schema}" CASCADE')
    assert report == ImportReport(rows=5, results=5)
    assert await ids_in(database, "taskiq_results") == task_ids
