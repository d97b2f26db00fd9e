"""What an application has set up on its engine has its effect on our statements."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from itertools import product
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from taskiq_sa_pg import SchemaError, StorageError, build_models
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database, engine_of
from tests.integration.databases import PROGRESS, Backend
from tests.integration.waiters import SOON, heard_by, until_waiting
from tests.tasks import new_id, result_of


@pytest.fixture
async def application(dsn: str) -> AsyncIterator[Callable[..., AsyncEngine]]:
    """Makes engines of an application's."""
    made: list[AsyncEngine] = []

    def make(**kwargs: Any) -> AsyncEngine:
        made.append(make_engine(dsn, **kwargs))
        return made[-1]

    yield make
    for engine in made:
        await engine.dispose()


EVENTS = (
    "before_execute",
    "after_execute",
    "before_cursor_execute",
    "after_cursor_execute",
    "begin",
    "do_execute",
)


async def test_who_listens_to_statements_hears_of_each(
    application: Callable[..., AsyncEngine], start_backend: BackendFactory
) -> None:
    """Be it to this engine or to every engine, and from the moment in which he does."""
    engine = application()
    backend: Backend = await start_backend(engine=engine, notify=False)
    await backend.set_result("before", result_of(1))
    heard: list[Any] = []

    def hear(*_: Any) -> None:
        heard.append(_)

    for name, target in product(EVENTS, (engine.sync_engine, sa.Engine)):
        event.listen(target, name, hear)
        try:
            for call in (
                backend.set_result("1", result_of(1)),
                backend.is_result_ready("1"),
                backend.get_result("1"),
                backend.get_results(["1"]),
                backend.set_progress("1", PROGRESS),
                backend.get_progress("1"),
            ):
                heard.clear()
                await call
                assert (name, target, len(heard)) == (name, target, 1)
        finally:
            event.remove(target, name, hear)


async def test_statements_are_logged_for_who_wants_to_see_them(
    application: Callable[..., AsyncEngine],
    start_backend: BackendFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for means in ("echo", "logging"):
        if means == "logging":
            caplog.set_level(logging.INFO, "sqlalchemy.engine")
        backend: Backend = await start_backend(engine=application(echo=means == "echo"))
        caplog.clear()
        await backend.set_result(means, result_of(1))
        assert "INSERT INTO" in caplog.text, means
        assert "taskiq_results" in caplog.text, means


@pytest.fixture
async def other_schema(database: Database) -> AsyncIterator[str]:
    """Another schema than the search_path's."""
    name = f"{database.schema}_other"
    await database.fetch(f"CREATE SCHEMA {name}")
    yield name
    await database.fetch(f"DROP SCHEMA {name} CASCADE")


async def test_a_schema_translate_map_leads_to_the_other_tables(
    application: Callable[..., AsyncEngine],
    database: Database,
    other_schema: str,
    start_backend: BackendFactory,
) -> None:
    await start_backend()
    await start_backend(schema=other_schema)
    engine = application().execution_options(schema_translate_map={None: other_schema})
    translated: Backend = await start_backend(
        engine=engine, run_migrations=False, check_schema="off", keep_results=False
    )
    await translated.set_result("1", result_of(1))
    await translated.set_progress("1", PROGRESS)
    assert await database.fetch("SELECT FROM taskiq_results") == []
    assert await database.fetch("SELECT FROM taskiq_results_progress") == []
    assert len(await database.fetch(f"SELECT FROM {other_schema}.taskiq_results")) == 1
    assert await translated.is_result_ready("1")
    assert await translated.get_progress("1") == PROGRESS
    assert (await translated.get_result("1")).return_value == 1
    assert await database.fetch(f"SELECT FROM {other_schema}.taskiq_results") == []


async def test_a_backend_starts_where_a_schema_translate_map_leads(
    application: Callable[..., AsyncEngine],
    database: Database,
    other_schema: str,
    start_backend: BackendFactory,
) -> None:
    """Its tables are looked for and made there, whatever is in the search_path."""
    engine = application(execution_options={"schema_translate_map": {None: other_schema}})
    await database.fetch("CREATE TABLE taskiq_results (something_else int)")
    with pytest.raises(SchemaError) as caught:
        await start_backend(engine=engine, run_migrations=False)
    assert f"{other_schema}.taskiq_results" in str(caught.value)
    assert f"schema={other_schema}" in str(caught.value)
    for run_migrations in (True, True, False):
        backend: Backend = await start_backend(engine=engine, run_migrations=run_migrations)
    await start_backend(schema=other_schema)  # who names the schema finds them up to date
    await backend.set_result("1", result_of(1))
    assert len(await database.fetch(f"SELECT FROM {other_schema}.taskiq_results")) == 1
    assert await database.fetch("SELECT FROM taskiq_results") == []
    found = await database.fetch("SELECT to_regclass('taskiq_results_version')::text AS name")
    assert found[0]["name"] is None


@pytest.mark.usefixtures("blind")
async def test_a_waiter_hears_of_what_was_stored_through_a_schema_translate_map(
    application: Callable[..., AsyncEngine],
    database: Database,
    other_schema: str,
    start_backend: BackendFactory,
) -> None:
    """In whichever way the two of them name the schema."""
    names = {"table_name": f"translated_{database.schema[-20:]}"}
    listen_dsn = database.direct_dsn if database.is_deaf else None
    named = await start_backend(schema=other_schema, listen_dsn=listen_dsn, **names)
    engine = application().execution_options(schema_translate_map={None: other_schema})
    translated = await start_backend(engine=engine, listen_dsn=listen_dsn, **names)
    for waiting, storing in ((named, translated), (translated, named)):
        task_id = new_id()
        async with heard_by(waiting):
            waiter = asyncio.create_task(waiting.wait_result(task_id, timeout=SOON))
            await until_waiting(waiting, 2)
            await storing.set_result(task_id, result_of("heard"))
            assert (await waiter).return_value == "heard"


async def test_who_handles_errors_hears_of_them(
    application: Callable[..., AsyncEngine], database: Database, start_backend: BackendFactory
) -> None:
    engine = application()
    heard: list[Any] = []
    event.listen(engine.sync_engine, "handle_error", heard.append)
    backend: Backend = await start_backend(engine=engine)
    await database.fetch("DROP TABLE taskiq_results")
    with pytest.raises(StorageError, match="create the tables"):
        await backend.set_result("1", result_of(1))
    assert len(heard) == 1


@pytest.mark.parametrize("name", ["connect", "checkout"])
async def test_a_transaction_that_a_pools_listener_left_open_swallows_no_write(
    name: str, database: Database, start_backend: BackendFactory
) -> None:
    """With asyncpg; psycopg itself refuses to leave such a transaction for AUTOCOMMIT."""
    await start_backend()
    engine = make_engine(database.dsn)

    @event.listens_for(engine.sync_engine, name)
    def set_something(dbapi_connection: Any, *_: Any) -> None:
        cursor = dbapi_connection.cursor()
        cursor.execute("SET extra_float_digits = 2")  # which opens a transaction
        cursor.close()

    backend: Backend = await start_backend(engine=engine, run_migrations=False)
    for task_id in "abc":
        await backend.set_result(task_id, result_of(1))
        await backend.set_progress(task_id, PROGRESS)
    assert len(await database.fetch("SELECT FROM taskiq_results")) == 3
    assert len(await database.fetch("SELECT FROM taskiq_results_progress")) == 3
    await backend.shutdown()
    await engine.dispose()


async def test_a_default_of_your_own_column_is_worked_out(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """By SQLAlchemy, for rows that are stored alone and together."""
    backend: Backend = await start_backend(dsn)
    await database.fetch("ALTER TABLE taskiq_results ADD COLUMN tenant text NOT NULL")
    models = build_models()
    models.results_table.append_column(sa.Column("tenant", sa.Text, nullable=False, default="all"))
    for source in ({"dsn": dsn}, {"engine": engine_of(backend)}):
        own: Backend = await start_backend(**source, models=models, run_migrations=False)
        await own.set_result("alone", result_of(1))
        await asyncio.gather(*[own.set_result(i, result_of(i)) for i in "abc"])
        assert await own.is_result_ready("alone")
        rows = await database.fetch("DELETE FROM taskiq_results RETURNING tenant")
        assert [row["tenant"] for row in rows] == ["all"] * 4
