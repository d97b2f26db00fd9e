"""What is imported from: which tables there are, how they are read, and what of a class is kept."""

import sys
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import JSONSerializer, PickleSerializer
from taskiq_pg.asyncpg import AsyncpgResultBackend

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    SchemaError,
    SQLAlchemyResultBackend,
)
from taskiq_sa_pg.codec import qualified_name
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.importing import ImportReport, count_rows, import_results
from tests.conftest import BackendFactory, Database, assert_nothing_checked_out
from tests.integration.databases import Log
from tests.integration.old_tables import fill_plainly, old_backend, value

Backend = SQLAlchemyResultBackend[Any]


@pytest.fixture
def reads() -> Log:
    """The statements on the old table's engine."""
    return Log()


@pytest.fixture
async def engine(database: Database, reads: Log) -> AsyncIterator[AsyncEngine]:
    """An engine for the old table."""
    engine = make_engine(database.dsn)
    event.listen(engine.sync_engine, "connect", reads.attach)
    yield engine
    assert_nothing_checked_out(engine)
    await engine.dispose()


async def test_a_batch_is_one_select_and_the_last_one_is_empty(
    old: AsyncpgResultBackend, start_backend: BackendFactory, engine: AsyncEngine, reads: Log
) -> None:
    ours: Backend = await start_backend()
    await fill_plainly(old, 95)
    seen: list[int] = []
    await import_results(
        ours, "old", from_engine=engine, batch_size=10, on_batch=lambda r: seen.append(r.rows)
    )
    assert seen == [*range(10, 100, 10), 95]
    assert reads.count('FROM "old"') == len(seen) + 1
    assert reads.count("BEGIN") == 1  # of the look at the catalogue
    assert not any(
        word in query for word in ("INSERT", "UPDATE", "DELETE") for query in reads.queries
    )


async def test_large_rows_come_in_small_batches(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    """Of 48 MB no more than some batches of 8 MB are in memory at once."""
    ours: Backend = await start_backend()
    large = TaskiqResult(is_err=False, return_value="x" * 4_000_000, execution_time=1)
    await old.set_result("0", large)
    await database.fetch(
        "INSERT INTO old SELECT number::text, result FROM old, generate_series(1, 11) number"
    )
    sizes: list[int] = []
    tracemalloc.start()
    try:
        report = await import_results(ours, "old", on_batch=lambda r: sizes.append(r.rows))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report == ImportReport(rows=12, results=12)
    assert sizes == list(range(2, 13, 2))
    assert peak < 60_000_000


@pytest.mark.parametrize("field", ["VarChar", "Uuid"])
async def test_uuids_become_the_ids_that_taskiq_makes(
    field: str, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend(field_for_task_id=field)
    task_ids = [uuid.uuid4().hex for _ in range(30)]
    async with old_backend(database.direct_dsn, field_for_task_id="Uuid") as old:
        for number, task_id in enumerate(task_ids):
            await old.set_result(task_id, value(number))
        report = await import_results(ours, "old", batch_size=7)
    assert report == ImportReport(rows=30, results=30)
    for number, task_id in enumerate(task_ids):
        assert (await ours.get_result(task_id)).return_value == number


async def test_no_row_is_skipped_however_the_old_column_sorts(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    """In every collation that the server has of these; few servers have but the first."""
    ours: Backend = await start_backend()
    task_ids = [a + b for a in "aAbBzZäÄ_-1 😀" for b in ("", "a", "A", "-", "9")]
    for task_id in task_ids:
        await old.set_result(task_id, value(1))
    there = await database.fetch(
        "SELECT DISTINCT collname FROM pg_collation "
        "WHERE collname IN ('C', 'en_US.utf8', 'und-x-icu', 'sv-x-icu')"
    )
    assert there
    for row in there:
        alter = f'ALTER TABLE old ALTER task_id TYPE varchar COLLATE "{row["collname"]}"'
        await database.fetch(alter)
        await database.fetch("TRUNCATE taskiq_results")
        report = await import_results(ours, "old", batch_size=3)
        assert report == ImportReport(rows=len(task_ids), results=len(task_ids))


async def test_of_two_spellings_of_a_uuid_one_comes(
    old: AsyncpgResultBackend, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend(field_for_task_id="Uuid")
    task_id = uuid.uuid4()
    for spelling in (task_id.hex, str(task_id), str(task_id).upper()):
        await old.set_result(spelling, value(1))
    report = await import_results(ours, "old")
    assert report == ImportReport(rows=3, results=1, already_there=2)


async def test_an_old_table_without_progress_is_read(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    task_ids = await fill_plainly(old, 5)
    await database.fetch("ALTER TABLE old DROP COLUMN progress")
    assert await import_results(ours, "old", batch_size=2) == ImportReport(rows=5, results=5)
    assert (await ours.get_result(task_ids[4])).return_value == 4


async def test_a_row_without_anything_is_nothing(
    old: AsyncpgResultBackend, database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    await database.fetch("INSERT INTO old VALUES ('empty'), (NULL)")
    assert await import_results(ours, "old") == ImportReport(rows=1)
    assert await count_rows(ours, "old") == 1
    assert not await ours.is_result_ready("empty")


async def test_a_table_of_another_kind_is_refused(
    database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    for columns, told in (
        ("task_id int, result bytea, progress bytea", "task_id integer"),
        ("task_id text, result jsonb, progress bytea", "result jsonb"),
        ("task_id text, result bytea, progress text", "progress text"),
        ("id text, result bytea", "id text"),
        ("task_id text, progress bytea", "task_id text, progress bytea"),
    ):
        await database.fetch(f'CREATE TABLE "Other" ({columns})')
        for call in (import_results, count_rows):
            with pytest.raises(
                SchemaError, match="Other is not a table of taskiq-postgres"
            ) as raised:
                await call(ours, "Other")
            assert told in str(raised.value)
        await database.fetch('DROP TABLE "Other"')
    with pytest.raises(SchemaError, match="is not a table of taskiq-postgres"):
        await import_results(ours, "taskiq_results")


async def test_a_table_that_is_not_there_is_told(
    old: AsyncpgResultBackend, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    for call in (import_results, count_rows):
        for name in ("Old", "ol", "taskiq_results_"):
            with pytest.raises(SchemaError, match=f"table {name} does not exist"):
                await call(ours, name)
        with pytest.raises(SchemaError, match=r"table nowhere\.old does not exist"):
            await call(ours, "old", from_schema="nowhere")


async def test_arguments_that_cannot_work_are_refused(
    database: Database, start_backend: BackendFactory
) -> None:
    ours: Backend = await start_backend()
    unfit: dict[str, Any] = {"batch_size": "9", "dry_run": "no", "serializer": JSONSerializer}
    for name, given in [("batch_size", 0), *unfit.items()]:
        with pytest.raises(ConfigurationError, match=f"{name} must be .* not {given!r}"):
            await import_results(ours, "old", **{name: given})
    unstarted = Backend(database.dsn)
    for call in (import_results, count_rows):
        with pytest.raises(NotStartedError):
            await call(unstarted, "old")


@pytest.mark.parametrize("serializer", [PickleSerializer(), JSONSerializer()])
async def test_readers_get_classes_that_the_import_does_not_have(
    serializer: Any,
    old: AsyncpgResultBackend,
    start_backend: BackendFactory,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And the import runs no module because an old row names it."""
    ours: Backend = await start_backend(serializer=serializer)
    (tmp_path / "a_shop.py").write_text("open(f'{__file__}.ran', 'x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = ModuleType("a_shop")
    classes = {
        name: type(name, (LookupError,), {"__module__": "a_shop"})
        for name in ("Outer", "ResultGetError")
    }
    vars(module).update(classes)
    error = classes["Outer"]("args", 1)
    error.__cause__ = classes["ResultGetError"](["cause"])
    await old.set_result(
        "1", TaskiqResult(is_err=True, return_value=None, execution_time=1, error=error)
    )
    assert (await import_results(ours, "old")).results == 1
    assert not (tmp_path / "a_shop.py.ran").exists()
    stand_in = (await ours.get_result("1")).error
    assert stand_in is not None
    assert (qualified_name(type(stand_in)), stand_in.args) == ("a_shop.Outer", ("args", 1))
    monkeypatch.setitem(sys.modules, "a_shop", module)
    read = (await ours.get_result("1")).error
    assert isinstance(read, classes["Outer"])
    assert read.args == ("args", 1)
    assert isinstance(read.__cause__, classes["ResultGetError"])
    assert read.__cause__.args == (["cause"],)
    assert read.__suppress_context__


async def test_a_result_that_was_stored_whole_is_read(
    database: Database, old: AsyncpgResultBackend, start_backend: BackendFactory
) -> None:
    """Other packages pickle the TaskiqResult itself, or what is less of it."""
    ours: Backend = await start_backend()
    whole = TaskiqResult(is_err=True, return_value=(1, b"2"), execution_time=1, error=KeyError(3))
    least = {"is_err": False, "return_value": {4}, "execution_time": 1}
    for task_id, stored in (("whole", whole), ("least", least)):
        dumped = PickleSerializer().dumpb(stored)
        await database.fetch("INSERT INTO old VALUES ($1, $2)", task_id, dumped)
    progress = PickleSerializer().dumpb(TaskProgress(state="x", meta={"a": (1, 2)}))
    await database.fetch("INSERT INTO old VALUES ('p', NULL, $1)", progress)
    assert await import_results(ours, "old") == ImportReport(rows=3, results=2, progress=1)
    read = await ours.get_result("whole")
    assert read.return_value == (1, b"2")
    assert repr(read.error) == "KeyError(3)"
    assert (await ours.get_result("least")).return_value == {4}
    assert await ours.get_progress("p") == TaskProgress(state="x", meta={"a": (1, 2)})
