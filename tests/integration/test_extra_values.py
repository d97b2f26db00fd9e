"""Columns of the application's own, filled by extra_values in the row that is written anyway."""

import asyncio
import contextvars
import enum
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    ResultMixin,
    SchemaError,
    SQLAlchemyResultBackend,
    StorageError,
)
from taskiq_sa_pg.engines import make_engine
from tests.conftest import BackendFactory, Database
from tests.integration.stores import Log, address
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

NOW = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


class Colour(enum.Enum):
    """Stored by name."""

    RED = 1
    BLUE = 2


class Reversed(sa.types.TypeDecorator[str]):
    """A type of the application's."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, _: Any) -> str | None:
        return value if value is None else value[::-1]

    def process_result_value(self, value: str | None, _: Any) -> str | None:
        return value if value is None else value[::-1]


class Upper(sa.types.UserDefinedType[str]):
    """A type that wraps its values in a function of SQL."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "TEXT"

    def bind_expression(self, bindvalue: Any) -> Any:
        return sa.func.upper(sa.type_coerce(bindvalue, sa.Text))


def new_models() -> Models:
    """Models with columns of their own, on a Base of their own."""

    class Base(DeclarativeBase): ...

    class Tenant(Base):
        __tablename__ = "tenants"
        name: Mapped[str] = mapped_column(primary_key=True)

    class Result(ResultMixin, Base):
        tenant: Mapped[str | None] = mapped_column(
            'Tenant "Ä" (100%) :x', sa.ForeignKey(Tenant.name)
        )
        region: Mapped[str] = mapped_column(sa.String(8), server_default="nowhere")
        colour: Mapped[Colour | None]
        details: Mapped[Any | None] = mapped_column(postgresql.JSONB)
        plain_json: Mapped[Any | None] = mapped_column(sa.JSON(none_as_null=True))
        order_id: Mapped[uuid.UUID | None]
        order_text: Mapped[str | None] = mapped_column(sa.Uuid(as_uuid=False))
        price: Mapped[Decimal | None] = mapped_column(sa.Numeric(10, 2))
        count: Mapped[int | None]
        day: Mapped[date | None]
        at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
        span: Mapped[timedelta | None]
        is_test: Mapped[bool | None]
        blob: Mapped[bytes | None]
        reversed: Mapped[str | None] = mapped_column(Reversed)
        tags: Mapped[list[str] | None] = mapped_column(postgresql.ARRAY(sa.Text))
        upper: Mapped[str | None] = mapped_column(Upper)
        size: Mapped[int | None] = mapped_column(
            sa.Computed("length(return_value)", persisted=True)
        )
        number: Mapped[int] = mapped_column(sa.BigInteger, sa.Identity(always=True))

    class Progress(ProgressMixin, Base):
        stage: Mapped[str] = mapped_column(server_default="early")

    return Models(Result, Progress)


VALUES: dict[str, Any] = {
    "tenant": "acme",
    "region": "north",
    "colour": Colour.BLUE,
    "details": {"a": [1, None, "ü'\\"], "b": None},
    "plain_json": ["x", {"y": 1}],
    "order_id": uuid.UUID(int=7),
    "order_text": str(uuid.UUID(int=8)),
    "price": Decimal("12.50"),
    "count": -3,
    "day": NOW.date(),
    "at": NOW,
    "span": timedelta(days=1, microseconds=5),
    "is_test": True,
    "blob": b"\x00\xff",
    "reversed": "abc",
    "tags": ["a", 'b,"{}'],
    "upper": "abc",
}


@dataclass
class Application:
    """An application's tables and engine, and what it starts backends with."""

    models: Models
    engine: AsyncEngine
    log: Log
    start_backend: BackendFactory

    async def start(self, function: Callable[..., Any] | None, **arguments: Any) -> Backend:
        backend: Backend = await self.start_backend(
            engine=self.engine,
            models=self.models,
            extra_values=function,
            **{"run_migrations": False, "notify": False, **arguments},
        )
        return backend

    async def start_with(self, values: Mapping[str, Mapping[str, Any]]) -> Backend:
        """A backend that knows the values for each task id."""
        return await self.start(lambda task_id, _: values[task_id])

    async def execute(self, *statements: Any) -> None:
        async with self.engine.begin() as connection:
            for statement in statements:
                await connection.execute(
                    sa.text(statement) if isinstance(statement, str) else statement
                )

    async def stored(self, *names: str) -> dict[str, Any]:
        """What is stored in these attributes, by task id."""
        result: Any = self.models.Result
        columns = [getattr(result, name) for name in names]
        async with AsyncSession(self.engine) as session:
            rows = (await session.execute(sa.select(result.task_id, *columns))).all()
        return {row[0]: row[1] if len(names) == 1 else tuple(row[1:]) for row in rows}


@pytest.fixture(params=["asyncpg", "psycopg"])
async def application(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory, log: Log
) -> AsyncIterator[Application]:
    engine = make_engine(address(database, request.param))
    if request.param == "asyncpg":
        sa.event.listen(engine.sync_engine, "connect", log.attach)
    models = new_models()
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
        tenants = models.metadata.tables["tenants"]
        await connection.execute(sa.insert(tenants), [{"name": "acme"}, {"name": "other"}])
    yield Application(models, engine, log, start_backend)
    await engine.dispose()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


async def store(backend: Backend, *task_ids: str, **fields: Any) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i, **fields)) for i in task_ids])


async def returned(backend: Backend, *task_ids: str) -> list[Any]:
    return [(await backend.get_result(task_id)).return_value for task_id in task_ids]


async def test_values_of_every_type_are_stored_alone_and_among_others(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await application.start(lambda *_: VALUES)
    await store(backend, "alone")
    await store(backend, *"abc")
    expected = tuple({**VALUES, "upper": "ABC"}.values())
    assert await application.stored(*VALUES) == dict.fromkeys(["alone", *"abc"], expected)
    assert await returned(backend, "alone", "b") == ["alone", "b"]
    assert errors(caplog) == []


async def test_values_of_types_that_fit_an_array_share_a_statement(
    application: Application,
) -> None:
    """However many rows there are, each with its own values, and NULLs among them."""
    values = {name: value for name, value in VALUES.items() if name not in {"tags", "upper"}}
    rows = {
        f"{i:03}": {
            n: v if n == "region" or i % (k + 2) else None
            for k, (n, v) in enumerate(values.items())
        }
        for i in range(300)
    }
    backend = await application.start_with(rows)
    await store(backend, "000")
    application.log.queries.clear()
    await store(backend, *rows)
    await asyncio.sleep(0)
    if application.engine.dialect.driver == "asyncpg":
        assert 1 <= application.log.count("INSERT") <= 4
        assert application.log.count("BEGIN") == 0
    assert await application.stored(*values) == {
        task_id: tuple(row.values()) for task_id, row in rows.items()
    }


async def test_a_column_without_a_key_gets_its_default_and_is_left_alone_later(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where others of the batch fill it; None is NULL."""
    values: dict[str, dict[str, Any]] = {
        "all": {"tenant": "acme", "region": "north", "tags": ["x"], "count": 1},
        "none": {},
        "tenant": {"tenant": "acme"},
        "region": {"region": "north"},
    }
    expected: dict[str, list[Any]] = {
        "all": ["acme", "north", ["x"], 1],
        "none": [None, "nowhere", None, None],
        "tenant": ["acme", "nowhere", None, None],
        "region": [None, "north", None, None],
    }
    backend = await application.start_with(values)
    await store(backend, *values)
    names = ("tenant", "region", "tags", "count")
    assert await application.stored(*names) == {t: tuple(row) for t, row in expected.items()}
    values.update(
        {"all": {"tenant": None}, "none": {"count": 5}, "tenant": {}, "region": {"tags": []}}
    )
    expected["all"][0], expected["none"][3], expected["region"][2] = None, 5, []
    await store(backend, *values)
    assert await application.stored(*names) == {t: tuple(row) for t, row in expected.items()}
    assert errors(caplog) == []


@pytest.mark.parametrize(
    "function",
    [None, lambda *_: {}, lambda *_: {"count": 3}],
    ids=["without", "none", "another"],
)
async def test_what_the_application_filled_in_later_survives_an_overwrite(
    application: Application, function: Any
) -> None:
    backend = await application.start(function)
    await store(backend, *"ab")
    result: Any = application.models.Result
    progress: Any = application.models.Progress
    await asyncio.gather(*[backend.set_progress(i, progress_of(1)) for i in "ab"])
    await application.execute(
        sa.update(result).values(tenant="acme", region="south", tags=["kept"]),
        sa.update(progress).values(stage="late"),
    )
    await store(backend, *"ab", labels={"_retries": 1})
    await store(backend, "a", labels={"_retries": 2})
    await asyncio.gather(*[backend.set_progress(i, progress_of(2)) for i in "ab"])
    kept = ("acme", "south", ["kept"])
    assert await application.stored("tenant", "region", "tags") == {"a": kept, "b": kept}
    assert await application.stored("attempt") == {"a": 2, "b": 1}
    async with AsyncSession(application.engine) as session:
        assert (await session.scalars(sa.select(progress.stage))).all() == ["late", "late"]


async def test_an_earlier_attempt_overwrites_no_value_of_a_later_one(
    application: Application,
) -> None:
    backend = await application.start(lambda _, result: {"count": result.labels["_retries"]})
    for attempt in (2, 1):
        await store(backend, *"ab", labels={"_retries": attempt})
        await store(backend, "c", labels={"_retries": attempt})
    assert set((await application.stored("count")).values()) == {2}


class Raising:
    """A dict of sorts."""

    def __call__(self, *_: Any) -> Any:
        raise LookupError("no tenant\nfor you")


async def forgotten_coroutine() -> dict[str, Any]:
    raise AssertionError("nobody awaits it")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (Raising(), "no tenant"),
        (lambda *_: None, "must return a dict, not NoneType"),
        (lambda *_: [("tenant", "acme")], "must return a dict, not list"),
        (lambda *_: forgotten_coroutine(), "must return a dict, not coroutine"),
        (lambda *_: {"tenant": "acme", "tennant": 1}, "'tennant'; the attributes that it can fill"),
        (lambda *_: {"tenant": "acme", "is_err": True}, "'is_err'"),
        (lambda *_: {"tenant": "acme", "finished_at": NOW}, "'finished_at'"),
        (lambda *_: {'Tenant "Ä" (100%) :x': "acme"}, "tenant, region, colour"),
        (lambda *_: {"tenant": "acme", "size": 1}, "'size'"),
        (lambda *_: {"tenant": "acme", "number": 1}, "'number'"),
        (lambda *_: {"tenant": "acme", 7: 1}, "returned 7;"),
    ],
    ids=[
        *("raises", "none", "pairs", "coroutine", "unknown", "ours", "stamp", "column"),
        *("computed", "identity", "number"),
    ],
)
async def test_a_function_that_fails_loses_no_result(
    application: Application, caplog: pytest.LogCaptureFixture, function: Any, said: str
) -> None:
    backend = await application.start(function)
    await store(backend, *"abc")
    await store(backend, "d")
    assert await returned(backend, *"abcd") == [*"abcd"]
    assert await application.stored("tenant", "region") == dict.fromkeys("abcd", (None, "nowhere"))
    assert sorted(errors(caplog)) == [
        f"task {i}: its result goes without its extra_values" for i in "abcd"
    ]
    assert said in caplog.text


BAD_VALUES: dict[str, dict[str, Any]] = {
    "of-no-tenant": {"tenant": "nobody"},
    "too-long": {"region": "x" * 9},
    "null": {"region": None},
    "of-another-type": {"tenant": 5.5, "count": "many"},
    "unconvertible": {"order_id": object()},
    "no-member": {"colour": "no such colour"},
    "no-json": {"details": object()},
    "too-large": {"count": 1 << 70},
    "nul": {"region": "\x00"},
    "surrogate": {"region": "\ud800"},
    "array": {"tags": [object()]},
}


@pytest.mark.parametrize("bad", BAD_VALUES.values(), ids=BAD_VALUES)
async def test_a_value_that_is_refused_costs_no_result_and_no_neighbour_its_values(
    application: Application, caplog: pytest.LogCaptureFixture, bad: dict[str, Any]
) -> None:
    good = {"tenant": "acme", "region": "north", "count": 1}
    task_ids = [f"{i:02}" for i in range(40)]
    guilty = {"03", "17", "18"}
    backend = await application.start(
        lambda task_id, _: {**good, **bad} if task_id in guilty else good
    )
    await store(backend, *task_ids)
    await store(backend, "03")
    assert await returned(backend, *task_ids) == task_ids
    assert await application.stored("tenant", "region", "count") == {
        i: (None, "nowhere", None) if i in guilty else ("acme", "north", 1) for i in task_ids
    }
    logged = errors(caplog)
    assert len(logged) == 4
    for text, task_id in zip(sorted(logged), ["03", "03", "17", "18"], strict=True):
        assert text.startswith(f"task {task_id}: its result goes without its extra_values: cannot")


async def test_where_the_table_lacks_the_column_results_are_stored_without(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """As between the deployment and the migration of an application that does not check."""
    await application.execute("ALTER TABLE taskiq_results DROP COLUMN count")
    backend = await application.start(lambda *_: {"count": 1}, check_schema="off")
    await store(backend, *"abc")
    assert await returned(backend, *"abc") == [*"abc"]
    assert len(errors(caplog)) == 3


async def test_where_the_result_itself_is_refused_the_caller_hears_of_it(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    await application.execute("ALTER TABLE taskiq_results ADD CHECK (task_id <> 'bad')")
    backend = await application.start(lambda *_: {"count": 1})
    outcomes = await asyncio.gather(
        *[backend.set_result(i, result_of(i)) for i in ("a", "bad", "b")], return_exceptions=True
    )
    assert isinstance(outcomes.pop(1), StorageError)
    assert outcomes == [None, None]
    assert await application.stored("count") == {"a": 1, "b": 1}
    assert errors(caplog) == []


@pytest.mark.parametrize("times", [1, 1000])
async def test_a_fault_that_passes_is_no_reason_to_leave_values_out(
    application: Application, caplog: pytest.LogCaptureFixture, times: int
) -> None:
    """The statement is tried again, with them; and given up with them."""
    await application.execute(
        "CREATE SEQUENCE attempts",
        "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF nextval('attempts') <= {times} THEN "
        "RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END IF; RETURN NEW; END $$",
        "CREATE TRIGGER conflict BEFORE INSERT ON taskiq_results FOR EACH ROW "
        "WHEN (NEW.count IS NOT NULL) EXECUTE FUNCTION conflict()",
    )
    retry_timeout = 30 if times == 1 else 0
    backend = await application.start(lambda *_: {"count": 1}, retry_timeout=retry_timeout)
    outcomes = await asyncio.gather(
        *[backend.set_result(i, result_of(i)) for i in "abc"], return_exceptions=True
    )
    if times == 1:
        assert outcomes == [None] * 3
        assert await application.stored("count") == dict.fromkeys("abc", 1)
    else:
        assert [getattr(outcome, "sqlstate", None) for outcome in outcomes] == ["40001"] * 3
        assert await application.stored("count") == {}
    assert errors(caplog) == []


async def test_a_required_column_that_nothing_fills_is_told_at_startup(
    application: Application,
) -> None:
    await application.execute("ALTER TABLE taskiq_results ALTER region DROP DEFAULT")
    with pytest.raises(SchemaError, match=r"results\.region is NOT NULL .* extra_values can\)"):
        await application.start(None)
    backend = await application.start(lambda *_: {"region": "north"})
    await store(backend, "a")
    assert await application.stored("region") == {"a": "north"}


async def test_without_a_value_for_a_required_column_the_result_cannot_be_stored(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    await application.execute("ALTER TABLE taskiq_results ALTER region DROP DEFAULT")
    backend = await application.start(lambda task_id, _: {"region": "x"} if task_id == "a" else 1)
    await store(backend, "a")
    with pytest.raises(StorageError, match=r"^task 'b': .*\"region\".*23502"):
        await store(backend, "b")
    assert await application.stored("region") == {"a": "x"}
    assert "must return a dict, not int" in caplog.text


async def test_a_column_of_the_model_that_the_table_lacks_is_told_at_startup(
    application: Application,
) -> None:
    await application.execute(
        "ALTER TABLE taskiq_results DROP COLUMN colour",
        "ALTER TABLE taskiq_results_progress DROP COLUMN stage",
    )
    for function in (None, lambda *_: {}):
        with pytest.raises(SchemaError) as caught:
            await application.start(function)
        assert "column taskiq_results.colour is missing (one of your model's own" in str(
            caught.value
        )
        assert "column taskiq_results_progress.stage is missing (one of" in str(caught.value)
        assert str(caught.value).count(";") == 2


async def test_the_function_runs_in_the_callers_context_once_for_each_call(
    application: Application,
) -> None:
    tenant = contextvars.ContextVar[str]("tenant")
    calls = []

    def values(task_id: str, result: Any) -> dict[str, Any]:
        calls.append((task_id, result.return_value, asyncio.current_task()))
        return {"tenant": tenant.get()}

    backend = await application.start(values)

    async def store_for(name: str, task_id: str) -> None:
        tenant.set(name)
        await backend.set_result(task_id, result_of(name))

    callers = [
        asyncio.create_task(store_for(name, task_id))
        for task_id, name in zip("abcd", ["acme", "other"] * 2, strict=True)
    ]
    await asyncio.gather(*callers)
    assert await application.stored("tenant") == dict(
        zip("abcd", ["acme", "other"] * 2, strict=True)
    )
    assert calls == [
        (task_id, name, caller)
        for task_id, name, caller in zip("abcd", ["acme", "other"] * 2, callers, strict=True)
    ]


async def test_the_last_of_two_writes_at_once_is_stored_with_its_own_values(
    application: Application,
) -> None:
    backend = await application.start(lambda _, result: {"count": result.return_value})
    await asyncio.gather(
        backend.set_result("busy", result_of(0)),
        *[backend.set_result(i, result_of(n)) for n in range(1, 4) for i in "ab"],
    )
    assert await application.stored("count") == {"busy": 0, "a": 3, "b": 3}
    assert await returned(backend, *"ab") == [3, 3]


async def test_results_that_are_read_once_come_with_their_values_and_go_with_them(
    application: Application,
) -> None:
    values = {"a": {"count": 1}, "b": {"tags": ["x"]}, "c": {}}
    backend = await application.start_with(values)
    taking = await application.start(lambda *_: {}, keep_results=False)
    await store(backend, *values)
    assert await returned(taking, *"abc") == [*"abc"]
    assert await application.stored("count") == {}


async def test_a_python_function_as_a_columns_default_is_called_for_every_row(
    database: Database, start_backend: BackendFactory
) -> None:
    """With and without extra_values, and for progress."""

    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        public_id: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4)
        tenant: Mapped[str | None]

    class Progress(ProgressMixin, Base):
        public_id: Mapped[uuid.UUID] = mapped_column(default=uuid.uuid4)

    models = Models(Result, Progress)
    engine = make_engine(database.dsn)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    options = {"engine": engine, "models": models, "run_migrations": False, "notify": False}
    plain = await start_backend(**options)
    extended = await start_backend(**options, extra_values=lambda *_: {"tenant": "acme"})
    ids = [str(i) for i in range(10)]
    await store(plain, *ids)
    await store(extended, *[f"e{i}" for i in ids])
    await asyncio.gather(*[plain.set_progress(i, progress_of(1)) for i in ids])
    for table, count in (("taskiq_results", 20), ("taskiq_results_progress", 10)):
        query = f"SELECT task_id, public_id FROM {table} ORDER BY 1"
        before = await database.fetch(query)
        assert len({row["public_id"] for row in before}) == count
        await store(plain, *ids)
        assert await database.fetch(query) == before
    await engine.dispose()


async def test_several_statements_of_a_batch_are_one_transaction(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    """Else what was stored by the first would be stored again, after it was read and deleted."""
    await application.execute(
        "CREATE TABLE writes (task_id text)",
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO writes VALUES (NEW.task_id); RETURN NEW; END $$",
        "CREATE TRIGGER note AFTER INSERT OR UPDATE ON taskiq_results FOR EACH ROW "
        "EXECUTE FUNCTION note()",
    )
    values = {i: {"count": 1} for i in "abcd"} | {i: {"region": "north"} for i in "efg"}
    backend = await application.start_with(values | {"h": {"region": "x" * 9}})
    await store(backend, *"abcdefgh")
    async with application.engine.connect() as connection:
        written = (await connection.execute(sa.text("SELECT task_id FROM writes"))).scalars().all()
    assert sorted(written) == [*"abcdefgh"]
    assert len(errors(caplog)) == 1
