"""iter_results(): results that meet conditions, streamed, on a connection that nobody waits for."""

import tracemalloc
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import aliased

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    ResultDecodeError,
    SQLAlchemyResultBackend,
    StorageError,
    build_models,
)
from tests.conftest import BackendFactory, Database, assert_comes_to_rest, eventually
from tests.integration.engines import SHAPES
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

SECOND = timedelta(seconds=1)


async def fill(database: Database, rows: int, **columns: str) -> None:
    """Stores successes whose execution_time is their number, from 1 on; past the library."""
    values = {"task_id": "'task ' || n", "return_value": r"'\x80054e2e'", **columns}
    await database.fetch(
        f"INSERT INTO taskiq_results (is_err, execution_time, labels, {', '.join(values)}) "
        f"SELECT false, n, '{{}}', {', '.join(values.values())} FROM generate_series(1, {rows}) n"
    )


async def open_sessions(database: Database) -> list[str]:
    return [state for state in await database.sessions("ours") if state != "idle"]


async def assert_only_idle(database: Database) -> None:
    """No session of ours is in a transaction any more."""

    async def is_idle() -> bool:
        return await open_sessions(database) == []

    await eventually(is_idle)


async def times(backend: Backend, *args: Any, **kwargs: Any) -> list[float]:
    return [r.execution_time async for _, r in backend.iter_results(*args, **kwargs)]


@pytest.mark.parametrize(
    ("kind", "payload"), [("VarChar", "Bytea"), ("Text", "Jsonb"), ("Uuid", "Jsonb")]
)
async def test_results_come_as_get_result_has_them(
    dsn: str, start_backend: BackendFactory, kind: str, payload: str
) -> None:
    backend: Backend = await start_backend(
        dsn, field_for_task_id=kind, field_for_payload=payload, table_name='Odd "résults" 100%'
    )
    ids = [new_id() for _ in range(5)]
    values = ["ünï 🙂\x00", 2**80, None, [0.1, {"b": 1, "a": 2}]]
    for task_id, value in zip(ids, values, strict=False):
        await backend.set_result(task_id, result_of(value, labels={"n": 2**80}, log="said"))
    error = LookupError("ünï")
    await backend.set_result(ids[-1], result_of(None, is_err=True, error=error))
    found = {i: result async for i, result in backend.iter_results(with_logs=True)}
    kept = await backend.get_results(ids, with_logs=True)
    assert {i.replace("-", ""): repr(r) for i, r in found.items()} == {
        i: repr(r) for i, r in kept.items()
    }
    async for _, result in backend.iter_results():
        assert result.log is None


async def test_conditions_and_order(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 500)
    Result = backend.models.Result  # noqa: N806 - it is a class
    time = Result.execution_time
    assert len(await times(backend)) == 500
    assert await times(backend, time <= 3, order_by=time) == [1, 2, 3]
    assert await times(backend, where=[time <= 9, time > 7], order_by=time.desc()) == [9, 8]
    assert await times(backend, (c for c in [time < 2])) == [1]
    assert await times(backend, Result.is_err) == []
    assert await times(backend, Result.duration < 2 * SECOND) == [1]
    both = (Result.is_err.desc(), Result.duration.desc())
    assert (await times(backend, ~Result.is_err, order_by=both, batch_size=7))[:2] == [500, 499]
    assert await times(backend, sa.text("execution_time = 5")) == [5]
    assert await times(backend, Result.__table__.c.task_id == "task 4") == [4]
    among = sa.select(sa.func.max(aliased(Result).execution_time)).scalar_subquery()
    assert await times(backend, time == among) == [500]
    other = build_models("taskiq_results").Result
    assert await times(backend, Result.task_id.in_(sa.select(other.task_id).limit(0))) == []


async def test_every_row_comes_once_whatever_the_batch(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 100)
    order_by = backend.models.Result.execution_time
    for batch_size in (1, 49, 50, 51, 100, 1000):
        found = await times(backend, order_by=order_by, batch_size=batch_size)
        assert found == list(range(1, 101))


async def test_expired_results_are_left_out(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 9, expires_at="now() + (n - 5) * interval '1 hour'")
    Result = backend.models.Result  # noqa: N806 - it is a class
    assert await times(backend, order_by=Result.execution_time) == [6, 7, 8, 9]
    assert await times(backend, sa.or_(Result.is_expired, sa.true())) == [6, 7, 8, 9]


async def test_none_is_deleted_where_reading_deletes(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn, keep_results=False)
    await fill(database, 3)
    assert len(await times(backend)) == len(await times(backend)) == 3


async def test_what_cannot_be_read_back_hides_nothing(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 9, log="'said'")
    await database.fetch(
        "UPDATE taskiq_results SET return_value = 'garbage' WHERE execution_time IN (1, 5, 9)"
    )
    order_by = backend.models.Result.execution_time
    found = dict([pair async for pair in backend.iter_results(order_by=order_by, with_logs=True)])
    assert len(found) == 9
    bad = {task_id: result for task_id, result in found.items() if result.is_err}
    assert list(bad) == ["task 1", "task 5", "task 9"]
    for task_id, result in bad.items():
        assert isinstance(result.error, ResultDecodeError)
        assert task_id in str(result.error)
        assert (result.return_value, result.log) == (None, "said")
        assert result.execution_time == float(task_id[-1])
        with pytest.raises(ResultDecodeError):
            result.raise_for_error()
    assert len(await times(backend)) == 9


def foreign() -> Any:
    return build_models("taskiq_results").Result


UNFIT: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a bool": (lambda r: [r.is_err, "x" == "y"], (), TypeError, "where takes .* not False"),  # noqa: PLR0133
    "a lone bool": (lambda r: True, (), TypeError, "where takes .* not True"),
    "None": (lambda r: None, (), TypeError, "where takes .* not None"),
    "a str": (lambda r: "is_err", (), TypeError, "where takes .* not 'is_err'"),
    "a class": (lambda r: r, (), TypeError, "where takes .* not <class"),
    "an order that is a str": (lambda r: (), "is_err", TypeError, "order_by takes .* not 'is_err'"),
    "another class": (
        lambda r: foreign().is_err,
        (),
        ConfigurationError,
        "not to taskiq_results: ",
    ),
    "an alias": (lambda r: aliased(r).is_err, (), ConfigurationError, "must refer to backend.mod"),
    "another table": (
        lambda r: sa.column("x", _selectable=sa.table("orders")) == r.task_id,  # type: ignore[call-arg]
        *((), ConfigurationError, r"not to orders: .* subquery"),
    ),
    "an order by another class": (
        *(lambda r: r.is_err, foreign().task_id.desc(), ConfigurationError, "not to taskiq_res"),
    ),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_is_no_condition_on_results_is_refused(unfit: str) -> None:
    backend = Backend("postgresql://nowhere")
    where, order_by, error, said = UNFIT[unfit]
    with pytest.raises(error, match=said):
        backend.iter_results(where(backend.models.Result), order_by=order_by)


@pytest.mark.parametrize("size", [0, -1, True])
def test_a_batch_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigurationError, match=f"batch_size must be .* not {size}"):
        Backend("postgresql://nowhere").iter_results(batch_size=size)


def test_it_needs_a_started_backend() -> None:
    with pytest.raises(NotStartedError):
        Backend("postgresql://nowhere").iter_results()


async def test_what_postgresql_refuses_is_said(dsn: str, start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(dsn)
    with pytest.raises(StorageError, match="cannot read results in table taskiq_results: ") as e:
        await times(backend, sa.text("nothing = 1"))
    assert e.value.sqlstate == "42703"
    await assert_comes_to_rest(backend)


async def test_the_first_come_before_the_last_are_made(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """A late row fails in the server: those before have come, and the error is not hidden."""
    backend: Backend = await start_backend(dsn)
    await fill(database, 1000)
    Result = backend.models.Result  # noqa: N806 - it is a class
    found: list[float] = []

    async def collect() -> None:
        where = 1 / (Result.execution_time - 700) < 10
        async for _, result in backend.iter_results(where, batch_size=100):
            found.append(result.execution_time)

    with pytest.raises(StorageError, match="division by zero") as e:
        await collect()
    assert e.value.sqlstate == "22012"
    assert found == list(range(1, 601))
    await assert_only_idle(database)


async def peak_of(backend: Backend, rows: int) -> int:
    tracemalloc.start()
    found = 0
    async with aclosing(backend.iter_results()) as results:
        async for _ in results:
            found += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == rows
    return peak


async def test_memory_does_not_grow_with_the_results(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    peaks = []
    for rows in (400, 1000, 4000):
        await database.fetch("TRUNCATE taskiq_results")
        await fill(database, rows)
        peaks.append(await peak_of(backend, rows))
    assert peaks[2] < 1.5 * peaks[1] < 10_000_000, peaks


# What concerns the connection itself, with each driver; else the one or the other.
WITH_EACH_DRIVER = {"AUTOCOMMIT as an option", "no prepared statements", "settings of the server's"}
STREAMING = [
    (shape, driver)
    for number, shape in enumerate(SHAPES)
    for position, driver in enumerate(("asyncpg", "psycopg"))
    if shape in WITH_EACH_DRIVER or position == number % 2
]


@pytest.mark.parametrize(("shape", "driver"), STREAMING)
async def test_engines_of_applications_stream(
    database: Database, start_backend: BackendFactory, shape: str, driver: str
) -> None:
    await start_backend(field_for_payload="Jsonb")  # makes the tables
    engine = SHAPES[shape](database.dsn_of(driver))
    backend: Backend = await start_backend(
        engine=engine, field_for_payload="Jsonb", run_migrations=False
    )
    value = {"b": ["ünï", 2**80], "a": 1.0}
    for number in range(3):
        await backend.set_result(str(number), result_of(value, labels={"n": number}))
    found = {i: r async for i, r in backend.iter_results(batch_size=2)}
    assert found == await backend.get_results(["0", "1", "2"])
    assert found["1"].return_value == value
    assert await backend.forget(["0", "1"]) == 2
    await backend.shutdown()
    await engine.dispose()
