"""A row is stored as it is whether alone or among others, and batches never deadlock."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

import asyncpg
import pytest
from sqlalchemy.dialects import postgresql

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.codec import NO_TASK_METADATA, TaskMetadata
from taskiq_sa_pg.models import PayloadField, TaskIdField
from taskiq_sa_pg.statements import (
    Call,
    ProgressRow,
    ResultRow,
    upsert_progress,
    upsert_results,
)
from tests.conftest import BackendFactory, Database, eventually
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


class Kind(NamedTuple):
    """The types of a table, and who serves it."""

    task_id: TaskIdField
    payload: PayloadField
    driver: str

    def __str__(self) -> str:
        return "-".join(self)


# Every two values of two dimensions meet.
KINDS = [
    Kind("VarChar", "Bytea", "asyncpg"),
    Kind("VarChar", "Jsonb", "psycopg"),
    Kind("Text", "Bytea", "psycopg"),
    Kind("Text", "Jsonb", "asyncpg"),
    Kind("Uuid", "Bytea", "psycopg"),
    Kind("Uuid", "Jsonb", "asyncpg"),
]


@pytest.fixture(params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
async def backend(kind: Kind, database: Database, start_backend: BackendFactory) -> Backend:
    """A backend on tables of this kind."""
    backend: Backend = await start_backend(
        database.dsn_of(kind.driver),
        field_for_task_id=kind.task_id,
        field_for_payload=kind.payload,
    )
    return backend


def with_or_without(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of values and None."""
    choices = [(value, None) for value in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*choices)]


def new_ids(kind: Kind, number: int) -> list[Any]:
    """Task ids as the column has them, in no order."""
    ids = [uuid.uuid4() for _ in range(number)]
    return ids if kind.task_id == "Uuid" else [f"ü,{{}}\"'\\ NULL {i}" for i in ids]


def payload(kind: Kind, text: str) -> bytes | str:
    return text if kind.payload == "Jsonb" else text.encode() + b"\x00\xff"


def result_rows(kind: Kind) -> list[ResultRow]:
    """A row for every combination of NULLs, with what most rows have in the others, and without."""
    metadata = TaskMetadata(
        task_name="NULL",
        args='["ü", {}]',
        worker="\\",
        queued_at=datetime(2026, 11, 23, 16, 34, 56, 654321, tzinfo=UTC),
        started_at=datetime(2026, 11, 23, 16, 34, 57, 123456, tzinfo=timezone(timedelta(hours=2))),
    )
    optional = {
        "error": payload(kind, '{"a": [null, "ü\\\\"]}'),
        "error_type": "builtins.ValueError",
        "traceback": "line\n\t{1,2} \"quoted\" 'ü' \\",
        "log": "",
        "metadata": metadata,
        "expires_at": 3600.678901,
    }
    return [
        ResultRow(
            task_id=None,
            is_err=i % 2 == 1,
            return_value=payload(kind, f'{{"value": {i}}}'),
            execution_time=i + 0.1,
            labels=f'{{"label": "{i} \\\\ ü {{}}"}}' if i & 2 else "{}",
            attempt=i if i & 4 else 0,
            **(values.pop("metadata") or NO_TASK_METADATA)._asdict(),
            **values,
        )
        for i, values in enumerate(with_or_without(optional))
    ]


def progress_rows(kind: Kind) -> list[ProgressRow]:
    meta = {"meta": payload(kind, '["ü", {}, null]')}
    return [ProgressRow(task_id=None, state="{NULL}", **v) for v in with_or_without(meta)]


async def stored_rows(database: Database, table: str) -> dict[Any, tuple[Any, ...]]:
    """The rows by task id, without the times at which they were stored."""
    expiry = ", expires_at - finished_at AS ttl" if table == "taskiq_results" else ""
    rows = await database.fetch(f"SELECT *{expiry} FROM {table}")
    times = {"task_id", "finished_at", "expires_at", "updated_at"}
    return {
        row["task_id"]: tuple(value for name, value in row.items() if name not in times)
        for row in rows
    }


async def store(backend: Backend, calls: Sequence[Call]) -> None:
    for call in calls:
        await backend.runtime.database.fetch(*call, "store rows")


@pytest.mark.parametrize("what", ["results", "progress"])
async def test_a_row_is_stored_as_alone_among_others(
    what: str, kind: Kind, backend: Backend, database: Database
) -> None:
    """Whichever of its columns are NULL; in arrays, and in VALUES as for an application's own."""
    if what == "results":
        rows: Sequence[Any] = result_rows(kind)
        upsert, table = upsert_results(backend.models), "taskiq_results"
    else:
        rows = progress_rows(kind)
        upsert, table = upsert_progress(backend.models), "taskiq_results_progress"

    def with_ids() -> list[Any]:
        ids = new_ids(kind, len(rows))
        return [row._replace(task_id=i) for row, i in zip(rows, ids, strict=True)]

    alone, mixed, by_values = with_ids(), with_ids(), with_ids()
    for row in alone:
        await store(backend, upsert.of([row]))
    [call] = upsert.of(mixed)
    await store(backend, [call])
    await store(backend, upsert.of_mappings([row._asdict() for row in by_values]))
    found = await stored_rows(database, table)
    expected = [found[row.task_id] for row in alone]
    assert len(set(expected)) == len(rows)
    assert [found[row.task_id] for row in mixed] == expected
    assert [found[row.task_id] for row in by_values] == expected


async def test_every_row_of_a_batch_is_stored_and_no_other(
    kind: Kind, backend: Backend, database: Database
) -> None:
    upsert = upsert_results(backend.models)
    row = result_rows(kind)[0]
    expected = {}
    for number in (2, 500, 85, 3):
        rows = [
            row._replace(
                task_id=task_id,
                return_value=payload(kind, str(i)),
                execution_time=float(i),
                log="said" if i % 2 else None,
            )
            for i, task_id in enumerate(new_ids(kind, number))
        ]
        mappings = [row._asdict() for row in rows]
        await store(backend, upsert.of(rows) if number % 2 == 0 else upsert.of_mappings(mappings))
        expected |= {row.task_id: (row.return_value, row.execution_time, row.log) for row in rows}
    query = "SELECT task_id, return_value, execution_time, log FROM taskiq_results"
    found = {row["task_id"]: tuple(row)[1:] for row in await database.fetch(query)}
    assert found == expected


@pytest.mark.parametrize("kind", KINDS[:1], indirect=True, ids=str)
async def test_a_batch_is_streamed(kind: Kind, backend: Backend, database: Database) -> None:
    row = result_rows(kind)[0]
    [(statement, parameters)] = upsert_results(backend.models).of(
        [row._replace(task_id=i) for i in new_ids(kind, 3)]
    )
    compiled: Any = statement.compile(dialect=postgresql.asyncpg.dialect())
    values = [parameters[name] for name in compiled.positiontup]
    plan = "\n".join(row[0] for row in await database.fetch(f"EXPLAIN {compiled}", *values))
    assert "ProjectSet" in plan, plan
    assert "Function Scan" not in plan, plan


@pytest.mark.parametrize("size", [1, 3])
async def test_a_row_replaces_all_of_another(
    size: int, kind: Kind, backend: Backend, database: Database
) -> None:
    upsert = upsert_results(backend.models)
    [plain, *_, empty] = result_rows(kind)
    full = plain._replace(is_err=True, labels='{"a": 1}')
    ids = new_ids(kind, size)
    for attempt, values in enumerate([full, empty._replace(is_err=False, labels="{}"), full]):
        row = values._replace(attempt=attempt)
        await store(backend, upsert.of([row._replace(task_id=i) for i in ids]))
        [reference] = new_ids(kind, 1)
        await store(backend, upsert.of([row._replace(task_id=reference)]))
        found = await stored_rows(database, "taskiq_results")
        assert {found[i] for i in ids} == {found[reference]}
    earlier = [full._replace(task_id=i, attempt=1, task_name="earlier") for i in ids]
    await store(backend, upsert.of(earlier))
    assert await stored_rows(database, "taskiq_results") == found


@pytest.mark.parametrize("kind", KINDS[:2], indirect=True, ids=str)
@pytest.mark.parametrize(
    ("sent", "replaces"),  # the attempt and minute, after (1, 1)
    [
        ((0, 2), True),  # the task id is used again
        ((0, 1), False),
        ((0, None), False),
        ((1, 2), True),
        ((1, 1), True),
        ((1, None), True),
        ((1, 0), False),
        ((2, 0), True),  # sent by a worker whose clock is behind
    ],
)
async def test_what_was_sent_later_replaces_a_later_attempt(
    sent: tuple[int, int | None], replaces: bool, kind: Kind, backend: Backend, database: Database
) -> None:
    upsert = upsert_results(backend.models)

    def row_of(attempt: int, minute: int | None) -> ResultRow:
        queued_at = None if minute is None else datetime(2026, 11, 23, 0, minute, tzinfo=UTC)
        row = result_rows(kind)[0]
        return row._replace(attempt=attempt, queued_at=queued_at, log=f"{attempt}, {minute}")

    for size in (1, 3):
        ids = new_ids(kind, size)
        for row in (row_of(1, 1), row_of(*sent)):
            await store(backend, upsert.of([row._replace(task_id=i) for i in ids]))
        rows = await database.fetch("SELECT log FROM taskiq_results WHERE task_id = ANY($1)", ids)
        assert [row["log"] for row in rows] == [row_of(*(sent if replaces else (1, 1))).log] * size


async def are_waiting(database: Database, number: int) -> bool:
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name LIKE 'crossing%'"
    waits = [row["wait_event_type"] for row in await database.fetch(query)]
    return waits.count("Lock") >= number


@pytest.fixture(params=["asyncpg", "psycopg"])
async def two(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> tuple[Backend, Backend]:
    """Two backends on the same tables, as two processes have them, that delete what they read.

    They try nothing again: that would hide a deadlock.
    """
    dsn = database.dsn_of(request.param)
    given: dict[str, Any] = {"keep_results": False, "notify": False, "retry_timeout": 0}
    first, second = [
        await start_backend(f"{dsn}&application_name=crossing{i}", **given) for i in range(2)
    ]
    return first, second


TASK_IDS = [f"{i:03}" for i in range(200)]
TABLES = {"set_result": "taskiq_results", "set_progress": "taskiq_results_progress"}


async def write(backend: Backend, operation: str, task_ids: Sequence[str], value: int) -> None:
    given: Any = result_of(value) if operation == "set_result" else progress_of(value)
    await asyncio.gather(*[getattr(backend, operation)(i, given) for i in task_ids])


@asynccontextmanager
async def one_locked(database: Database, operation: str) -> AsyncIterator[None]:
    """The row in the middle, where those who come up to it wait for each other's rows."""
    holder = await asyncpg.connect(database.direct_dsn)
    async with holder.transaction():
        query = f"SELECT 1 FROM {TABLES[operation]} WHERE task_id = '100' FOR UPDATE"
        await holder.execute(query)
        yield
    await holder.close()


@pytest.mark.parametrize("operation", TABLES)
async def test_writers_of_the_same_tasks_in_opposite_orders_never_deadlock(
    operation: str, two: tuple[Backend, Backend], database: Database
) -> None:
    await write(two[0], operation, TASK_IDS, 0)
    async with one_locked(database, operation):
        writing = [
            asyncio.create_task(write(two[0], operation, TASK_IDS, 1)),
            asyncio.create_task(write(two[1], operation, TASK_IDS[::-1], 2)),
        ]
        await eventually(lambda: are_waiting(database, 2))
    await asyncio.gather(*writing)
    for value in range(4):
        await asyncio.gather(
            write(two[0], operation, TASK_IDS, value),
            write(two[1], operation, TASK_IDS[::-1], value),
        )
    column = "return_value" if operation == "set_result" else "meta"
    query = f"SELECT count(*), count(DISTINCT {column}) AS values FROM {TABLES[operation]}"
    [stored] = await database.fetch(query)
    assert (stored["count"], stored["values"]) == (200, 1)


@pytest.mark.parametrize("operation", TABLES)
async def test_writers_and_deleting_readers_of_the_same_tasks_never_deadlock(
    operation: str, two: tuple[Backend, Backend], database: Database
) -> None:
    for task_id in reversed(TASK_IDS):  # so they are the other way round in the table
        await write(two[0], "set_progress", [task_id], 0)
        await write(two[0], "set_result", [task_id], 0)
    async with one_locked(database, operation):
        reads = [asyncio.create_task(two[0].get_result(i)) for i in TASK_IDS]
        await eventually(lambda: are_waiting(database, 1))
        writing = asyncio.create_task(write(two[1], operation, TASK_IDS, 1))
        await eventually(lambda: are_waiting(database, 2))
    await writing
    results = await asyncio.gather(*reads)
    # What was written after it had been read is still there.
    read_first = {i for i, r in zip(TASK_IDS, results, strict=True) if r.return_value == 0}
    left = await two[0].get_results(TASK_IDS)
    assert set(left) == (read_first if operation == "set_result" else set())
