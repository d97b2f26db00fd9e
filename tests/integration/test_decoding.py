"""backend.decode() of rows of real selects, and the model's hybrid properties."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, defer, mapped_column

from taskiq_sa_pg import (
    MissingColumnsError,
    Models,
    ProgressMixin,
    ResultMixin,
    SQLAlchemyResultBackend,
    TableConfig,
    build_models,
)
from taskiq_sa_pg.database import parse_dsn
from tests.conftest import BackendFactory, Database
from tests.integration.engines import make
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]

VALUES: dict[str, Any] = {
    "wrapped": ["a\x00", {"$serialized": "x"}, 1e300],
    "null": None,
    "text": '"quoted" ünï 🙂',
    "floats": [0.1, 1.0, -0.0, 5e-324, 123456789.123456789],
    "integers": [2**53 + 1, -(2**63), 0],
    "document": {"b": {"z": 1, "a": [True, None]}, "a": "100%"},
}
LABELS = {
    "tenant": "ünï",
    "raw": b"\x00\xff",
    "n": 2**60,
    "x": 0.1,
    "when": datetime(2026, 1, 1, tzinfo=UTC),
}


@pytest.fixture
async def engine(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[AsyncEngine]:
    engine = make(database.dsn_of(getattr(request, "param", "asyncpg")))
    yield engine
    await engine.dispose()


@pytest.fixture
async def backend(request: pytest.FixtureRequest, start_backend: BackendFactory) -> Backend:
    payload = getattr(request, "param", "Bytea")
    backend: Backend = await start_backend(field_for_payload=payload)
    return backend


each_driver = pytest.mark.parametrize("engine", ["asyncpg", "psycopg"], indirect=True)
each_payload = pytest.mark.parametrize("backend", ["Bytea", "Jsonb"], indirect=True)


async def store(backend: Backend) -> None:
    for name, value in VALUES.items():
        await backend.set_result(name, result_of(value, labels=LABELS, log="said"))
    error = LookupError("ünï", 5)
    await backend.set_result("error", result_of(None, is_err=True, error=error))


async def assert_same(backend: Backend, decoded: dict[str, Any]) -> None:
    """As get_results() gives them."""
    own = await backend.get_results([*VALUES, "error"])
    assert {i: repr(result) for i, result in decoded.items()} == {
        i: repr(result) for i, result in own.items()
    }


def selects_of(model: Any) -> dict[str, sa.Select[Any]]:
    """Ways to ask for a result; the task id is the first column."""
    columns = [
        *(model.task_id, model.is_err, model.return_value, model.error),
        *(model.execution_time, model.labels, model.log),
    ]
    other = aliased(model)
    return {
        "an entity": sa.select(model.task_id, model),
        "columns": sa.select(*columns),
        "an entity beside others": sa.select(model.task_id, sa.literal(1).label("error"), model),
        "columns of an alias": sa.select(*(getattr(other, column.key) for column in columns)),
        "columns beside others of their names": sa.select(
            *(model.task_id, sa.literal("x").label("is_err"), other.error, *columns[1:])
        ).where(other.task_id == model.task_id),
        "columns of a subquery": sa.select(sa.select(*columns).subquery()),
        "columns of the table": sa.select(*[model.__table__.c[c.key] for c in columns]),
    }


@each_driver
@each_payload
async def test_rows_of_any_select_decode(backend: Backend, engine: AsyncEngine) -> None:
    await store(backend)
    async with AsyncSession(engine) as session:
        for name, statement in selects_of(backend.models.Result).items():
            rows = (await session.execute(statement)).all()
            await assert_same(backend, {row[0]: backend.decode(row) for row in rows})
            assert backend.decode(rows[0], with_logs=True).log in {"said", None}
            if name != "columns beside others of their names":  # where these stand for several
                mappings = [row._mapping for row in rows]
                for found in (mappings, map(dict, mappings)):
                    await assert_same(backend, {m["task_id"]: backend.decode(m) for m in found})


@each_driver
@each_payload
async def test_rows_of_core_decode(backend: Backend, engine: AsyncEngine) -> None:
    await store(backend)
    foreign = build_models(field_for_payload=backend.models.config.field_for_payload)
    async with engine.connect() as connection:
        for model in (backend.models.Result, foreign.Result):
            rows = (await connection.execute(sa.select(model))).all()
            await assert_same(backend, {row.task_id: backend.decode(row) for row in rows})


async def test_columns_of_two_results_are_refused(backend: Backend, engine: AsyncEngine) -> None:
    await store(backend)
    one, other = aliased(backend.models.Result), aliased(backend.models.Result)
    pairs = sa.select(one, other).join(other, one.task_id == other.task_id)
    tables = [backend.models.results_table.alias() for _ in range(2)]
    labels = [*tables[0].c, tables[1].c.labels]
    both = {
        "the row has 2 results": pairs,
        "the row has several columns named labels": (
            sa.select(*labels)
            .set_label_style(sa.LABEL_STYLE_NONE)
            .where(tables[0].c.task_id == tables[1].c.task_id)
        ),
        "the row has several columns named is_err": (
            sa.select(*[each.c.is_err for each in tables])
            .set_label_style(sa.LABEL_STYLE_NONE)
            .where(tables[0].c.task_id == tables[1].c.task_id)
        ),
    }
    async with AsyncSession(engine) as session:
        for said, statement in both.items():
            row = (await session.execute(statement)).first()
            with pytest.raises(TypeError, match=said):
                backend.decode(row)


async def test_rows_of_an_application_s_own_json_decode(
    database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(field_for_payload="Jsonb")
    await store(backend)
    for driver in ("asyncpg", "psycopg"):
        engine = make(database.dsn_of(driver), json_deserializer=orjson.loads)
        async with AsyncSession(engine) as session:
            found = await session.scalars(sa.select(backend.models.Result))
            await assert_same(backend, {row.task_id: backend.decode(row) for row in found})
        await engine.dispose()


@pytest.mark.parametrize("kind", ["VarChar", "Text", "Uuid"])
async def test_a_synchronous_session_s_rows_decode_in_a_backend_that_is_not_started(
    database: Database, start_backend: BackendFactory, kind: Any
) -> None:
    """Of every type of task id."""
    task_id = new_id()
    backend: Backend = await start_backend(field_for_task_id=kind)
    await backend.set_result(task_id, result_of((1, "two"), labels=LABELS))
    unstarted = Backend("postgresql://nowhere", field_for_task_id=kind)
    Result = unstarted.models.Result  # noqa: N806 - it is a class
    engine = sa.create_engine(make(database.psycopg_dsn).url, connect_args=_arguments(database))
    with Session(engine) as session:
        [row] = session.scalars(sa.select(Result)).all()
        assert unstarted.decode(row).return_value == (1, "two")
        [columns] = session.execute(
            sa.select(Result.is_err, Result.return_value, Result.error, Result.execution_time)
        ).all()
        assert unstarted.decode(columns).return_value == (1, "two")
        session.commit()
        with pytest.raises(MissingColumnsError, match="expired by a commit"):
            unstarted.decode(row)
        session.refresh(row)
        assert unstarted.decode(row).labels == (await backend.get_result(task_id)).labels
        row.return_value = b"garbage"
        with pytest.raises(Exception, match=str(row.task_id)):
            unstarted.decode(row)
        session.rollback()
    engine.dispose()


def _arguments(database: Database) -> dict[str, Any]:
    return parse_dsn(database.psycopg_dsn).connect_arguments()


async def test_deferred_columns_are_named(backend: Backend, engine: AsyncEngine) -> None:
    await store(backend)
    Result = backend.models.Result  # noqa: N806 - it is a class
    async with AsyncSession(engine) as session:
        row = (await session.scalars(sa.select(Result).options(defer(Result.error)))).first()
        with pytest.raises(MissingColumnsError, match="has no error of"):
            backend.decode(row)


async def test_an_outer_join_without_a_result_says_so(
    backend: Backend, engine: AsyncEngine
) -> None:
    Result = backend.models.Result  # noqa: N806 - it is a class
    one = sa.select(sa.literal("1").label("id")).subquery()
    outer = sa.select(one.c.id, Result).outerjoin(Result, Result.task_id == one.c.id)
    async with AsyncSession(engine) as session:
        row = (await session.execute(outer)).one()
        with pytest.raises(MissingColumnsError, match="if there is no result"):
            backend.decode(row)


class Base(DeclarativeBase): ...


class OwnResult(ResultMixin, Base):
    __table_config__ = TableConfig('Odd "résults" 100%', "Uuid", "Jsonb")
    tenant: Mapped[str | None]


class OwnProgress(ProgressMixin, Base):
    __table_config__ = OwnResult.__table_config__


@each_driver
@pytest.mark.parametrize(
    "models", [build_models(), Models(OwnResult, OwnProgress)], ids=["built", "own"]
)
async def test_hybrid_properties_are_the_same_in_python_and_in_sql(
    models: Models, engine: AsyncEngine, start_backend: BackendFactory
) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    backend: Backend = await start_backend(engine=engine, models=models, run_migrations=False)
    Result = models.Result  # noqa: N806 - it is a class
    ids = {name: new_id() for name in ("kept", "live", "gone")}
    for name, task_id in ids.items():
        labels = {"result_ttl": None if name == "kept" else 3600}
        await backend.set_result(
            task_id, result_of(1, labels=labels, execution_time=1.5 * len(ids))
        )
    at = datetime(2026, 11, 23, tzinfo=UTC)
    async with AsyncSession(engine) as session:
        gone = sa.update(Result).where(Result.task_id == ids["gone"])
        await session.execute(gone.values(expires_at=sa.func.now() - timedelta(seconds=1)))
        kept = sa.update(Result).where(Result.task_id == ids["kept"])
        await session.execute(
            kept.values(queued_at=at, started_at=at + timedelta(seconds=2), execution_time=90.25)
        )
        await session.commit()
        rows = (
            await session.execute(
                sa.select(Result, Result.is_expired, Result.duration, Result.waited).order_by(
                    Result.duration.desc(), Result.is_expired
                )
            )
        ).all()
        assert [str(row[0].task_id).replace("-", "") for row in rows] == list(ids.values())
        for row, *in_sql in rows:
            assert [row.is_expired, row.duration, row.waited] == in_sql
        assert rows[0][1:] == (False, timedelta(seconds=90.25), timedelta(seconds=2))
        assert rows[1][1:] == (False, timedelta(seconds=4.5), None)
        assert rows[2][1:] == (True, timedelta(seconds=4.5), None)
        live = sa.select(sa.func.count()).where(~Result.is_expired)
        assert await session.scalar(live) == 2
        slow = sa.select(sa.func.count()).where(Result.duration > timedelta(minutes=1))
        assert await session.scalar(slow) == 1
        waited = sa.select(sa.func.count()).where(Result.waited >= timedelta(seconds=2))
        assert await session.scalar(waited) == 1


async def test_columns_of_the_application_s_may_have_the_names_of_our_properties(
    engine: AsyncEngine, start_backend: BackendFactory
) -> None:
    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        duration: Mapped[int | None]  # type: ignore[assignment]  # theirs was there first
        waited: Mapped[str] = mapped_column("Waited", server_default="long")  # type: ignore[assignment]

    class Progress(ProgressMixin, Base): ...

    models = Models(Result, Progress)
    async with engine.begin() as connection:
        await connection.run_sync(models.metadata.create_all)
    backend: Backend = await start_backend(
        engine=engine,
        models=models,
        run_migrations=False,
        extra_values=lambda *_: {"duration": 5},
    )
    await backend.set_result("1", result_of(7))
    async with AsyncSession(engine) as session:
        row = (await session.scalars(sa.select(Result).where(Result.duration == 5))).one()
        assert (row.duration, row.waited, row.is_expired) == (5, "long", False)
        assert backend.decode(row).return_value == 7
