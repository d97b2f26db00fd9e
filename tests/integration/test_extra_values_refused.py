"""Where values for columns of the application's own fail, or are refused: no result is lost."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa

from taskiq_sa_pg import (
    SchemaError,
    StorageError,
)
from tests.conftest import BackendFactory, Database
from tests.integration.extra_columns import (
    NOW,
    Application,
    each_driver,
    errors,
    open_application,
    returned,
    store,
)
from tests.tasks import result_of


@pytest.fixture
async def application(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> AsyncIterator[Application]:
    driver = getattr(request, "param", "asyncpg")
    application = await open_application(database, driver, start_backend)
    yield application
    await application.engine.dispose()


class Raising:
    def __call__(self, *_: Any) -> Any:
        raise LookupError("no tenant\nfor you")


async def forgotten_coroutine() -> dict[str, Any]:
    raise AssertionError("nobody awaits it")


FAILING: dict[str, tuple[Any, str]] = {
    "raises": (Raising(), "no tenant"),
    "none": (lambda *_: None, "must return a dict, not NoneType"),
    "pairs": (lambda *_: [("tenant", "acme")], "must return a dict, not list"),
    "coroutine": (lambda *_: forgotten_coroutine(), "must return a dict, not coroutine"),
    "unknown": (
        lambda *_: {"tenant": "acme", "tennant": 1},
        "'tennant', but can only fill",
    ),
    "ours": (lambda *_: {"tenant": "acme", "is_err": True}, "'is_err'"),
    "stamp": (lambda *_: {"tenant": "acme", "finished_at": NOW}, "'finished_at'"),
    "column": (lambda *_: {'Tenant "Ä" (100%) :x': "acme"}, "tenant, region, colour"),
    "computed": (lambda *_: {"tenant": "acme", "size": 1}, "'size'"),
    "identity": (lambda *_: {"tenant": "acme", "number": 1}, "'number'"),
    "number": (lambda *_: {"tenant": "acme", 7: 1}, "returned 7,"),
}


async def test_a_function_that_fails_loses_no_result(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await application.start(lambda task_id, result: FAILING[task_id][0](task_id, result))
    await store(backend, *FAILING)
    for task_id, (_, said) in FAILING.items():
        caplog.clear()
        await store(backend, task_id)
        assert errors(caplog) == [f"task {task_id}: its result is stored without extra_values"]
        assert said in caplog.text
    assert await returned(backend, *FAILING) == [*FAILING]
    assert await application.stored("tenant", "region") == dict.fromkeys(FAILING, (None, "nowhere"))


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


@each_driver
async def test_a_value_that_is_refused_costs_no_result_and_no_neighbour_its_values(
    application: Application, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"tenant": "acme", "region": "north", "count": 1}
    guilty: dict[str, Any] = {}
    backend = await application.start(lambda task_id, _: {**good, **guilty.get(task_id, {})})
    for name, bad in BAD_VALUES.items():
        task_ids = [f"{name} {i:02}" for i in range(12)]
        guilty = dict.fromkeys([task_ids[3], task_ids[7], task_ids[8]], bad)
        caplog.clear()
        await store(backend, *task_ids)
        await store(backend, task_ids[3])
        assert await returned(backend, *task_ids) == task_ids
        stored = await application.stored("tenant", "region", "count")
        assert {i: stored[i] for i in task_ids} == {
            i: (None, "nowhere", None) if i in guilty else ("acme", "north", 1) for i in task_ids
        }
        told = [text.partition(": cannot")[0] for text in errors(caplog)]
        assert sorted(told) == [
            f"task {i}: its result is stored without extra_values"
            for i in sorted([task_ids[3], *guilty])
        ]


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


@each_driver
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
    with pytest.raises(SchemaError, match=r"\.region is NOT NULL .* fill it with extra_values\)"):
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
        assert "column taskiq_results.colour is missing (your model adds it" in str(caught.value)
        assert "column taskiq_results_progress.stage is missing (your model adds" in str(
            caught.value
        )
        assert str(caught.value).count(";") == 1


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
