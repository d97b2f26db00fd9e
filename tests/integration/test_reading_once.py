"""keep_results=False: one reader gets the result, and what cannot be handed out is not deleted."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import await_only
from taskiq import TaskiqResult

from taskiq_sa_pg import (
    ResultDecodeError,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    StorageError,
)
from taskiq_sa_pg.database import make_engine
from tests.conftest import BackendFactory, Database, assert_comes_to_rest, eventually
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

READERS = 20


@pytest.fixture(params=["asyncpg", "psycopg"])
async def once(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    """A backend that deletes what it reads."""
    dsn = database.dsn_of(request.param)
    backend: Backend = await start_backend(f"{dsn}&application_name=once", keep_results=False)
    return backend


async def store(backend: Backend, *task_ids: str, progress: bool = True) -> None:
    for task_id in task_ids:
        await backend.set_result(task_id, result_of(task_id))
        if progress:
            await backend.set_progress(task_id, progress_of(None))


async def spoil(database: Database, task_id: str) -> None:
    """Makes a stored result one that cannot be read back."""
    spoilt = await database.fetch(
        "UPDATE taskiq_results SET return_value = 'garbage' WHERE task_id = $1 RETURNING 1", task_id
    )
    assert len(spoilt) == 1


async def stored_ids(database: Database) -> set[str]:
    return {row["task_id"] for row in await database.fetch("SELECT task_id FROM taskiq_results")}


async def ids_with_progress(database: Database) -> set[str]:
    rows = await database.fetch("SELECT task_id FROM taskiq_results_progress")
    return {row["task_id"] for row in rows}


async def assert_one_got_it(readers: Sequence[Awaitable[TaskiqResult[Any]]], task_id: str) -> None:
    outcomes = await asyncio.gather(*readers, return_exceptions=True)
    handed_out = [o.return_value for o in outcomes if isinstance(o, TaskiqResult)]
    missed = [o for o in outcomes if isinstance(o, ResultIsMissingError)]
    assert handed_out == [task_id]
    assert len(missed) == len(readers) - 1


async def test_of_many_readers_exactly_one_gets_the_result(
    once: Backend, database: Database
) -> None:
    """Be the first of them alone or, as after several at once, in one batch with the others."""
    for task_id, others in (("a", 0), ("b", 3)):
        await store(once, task_id)
        missing = [once.get_result(f"missing {i}") for i in range(others)]
        await asyncio.gather(*missing, return_exceptions=True)
        await assert_one_got_it([once.get_result(task_id) for _ in range(READERS)], task_id)
    assert await stored_ids(database) == set()
    assert await ids_with_progress(database) == set()


async def test_of_readers_in_two_backends_exactly_one_gets_the_result(
    once: Backend, start_backend: BackendFactory
) -> None:
    other: Backend = await start_backend(keep_results=False, pool_size=10)
    for task_id in "abc":
        await store(once, task_id)
        readers = [b.get_result(task_id) for _ in range(READERS // 2) for b in (once, other)]
        await assert_one_got_it(readers, task_id)


async def test_of_readers_of_several_results_each_result_goes_to_one(
    once: Backend, start_backend: BackendFactory
) -> None:
    other: Backend = await start_backend(keep_results=False)
    task_ids = [str(i) for i in range(50)]
    await store(once, *task_ids, progress=False)
    got = await asyncio.gather(
        *[b.get_results(task_ids[i:]) for i in range(5) for b in (once, other)]
    )
    assert sorted(i for results in got for i in results) == sorted(task_ids)


async def test_a_reader_who_meets_a_later_attempt_gets_that(
    once: Backend, database: Database
) -> None:
    await store(once, "task")
    writer = make_engine(database.dsn)
    async with writer.connect() as connection, connection.begin():
        # The row is locked, so the reader waits and then sees what was written meanwhile.
        await connection.exec_driver_sql("UPDATE taskiq_results SET attempt = 0")
        reading = asyncio.create_task(once.get_result("task"))
        await eventually(lambda: is_waiting_for_a_lock(database))
        await connection.exec_driver_sql("UPDATE taskiq_results SET is_err = true, attempt = 1")
    assert (await reading).is_err is True
    await once.set_result("task", result_of("later", labels={"_retries": 1}))
    assert (await once.get_result("task")).return_value == "later"
    await writer.dispose()


async def is_waiting_for_a_lock(database: Database) -> bool:
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'once'"
    return "Lock" in [row["wait_event_type"] for row in await database.fetch(query)]


async def test_progress_goes_with_its_result_and_not_without(
    once: Backend, database: Database
) -> None:
    await store(once, "read", "unread")
    await once.set_progress("running", progress_of(None))
    await once.get_results(["read", "running", "unknown"])
    with pytest.raises(ResultIsMissingError):
        await once.get_result("running")
    assert await ids_with_progress(database) == {"unread", "running"}
    assert await once.get_progress("read") is None


async def test_a_result_that_cannot_be_decoded_stays(once: Backend, database: Database) -> None:
    await store(once, "task")
    await spoil(database, "task")
    for _ in range(2):
        with pytest.raises(ResultDecodeError, match=r"'task'.*was not deleted"):
            await once.get_result("task")
    assert await once.is_result_ready("task")
    assert await ids_with_progress(database) == {"task"}


async def test_what_postgresql_refuses_to_commit_is_not_handed_out(
    once: Backend, database: Database
) -> None:
    """That is for a COMMIT of which nobody can know whether it was carried out."""
    await store(once, "task")
    await database.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN RAISE 'refused at the end'; END $$"
    )
    await database.fetch(
        "CREATE CONSTRAINT TRIGGER refuse AFTER DELETE ON taskiq_results "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    with pytest.raises(StorageError, match="refused at the end"):
        await once.get_result("task")
    assert await stored_ids(database) == {"task"}


async def test_of_many_readers_of_what_cannot_be_decoded_none_deletes_it(
    once: Backend, database: Database
) -> None:
    await store(once, "task")
    await spoil(database, "task")
    readers = [once.get_result("task") for _ in range(READERS)]
    outcomes = await asyncio.gather(*readers, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ResultDecodeError}
    assert await stored_ids(database) == {"task"}


async def test_results_that_cannot_be_decoded_stay_and_the_others_are_taken(
    once: Backend, database: Database
) -> None:
    task_ids = [f"{i:03}" for i in range(450)]
    spoilt = {"000", "200", "449"}
    await asyncio.gather(*[store(once, i, progress=False) for i in task_ids])
    for task_id in spoilt:
        await spoil(database, task_id)
    results = await once.get_results(task_ids)
    assert set(results) == set(task_ids)
    assert {i for i, result in results.items() if result.is_err} == spoilt
    for task_id in spoilt:
        assert isinstance(results[task_id].error, ResultDecodeError)
        assert repr(task_id) in str(results[task_id].error)
    assert await stored_ids(database) == spoilt
    assert set(await once.get_results(task_ids)) == spoilt


async def test_a_task_that_has_failed_to_decode_something_is_taken(
    once: Backend, database: Database
) -> None:
    """It can be read back; its error is only of the same class."""
    error = ResultDecodeError("a result", "other", "why")
    await once.set_result("task", result_of(None, is_err=True, error=error))
    assert str((await once.get_results(["task"]))["task"].error) == str(error)
    assert await stored_ids(database) == set()


async def test_cancelling_a_reader_loses_nothing(once: Backend, database: Database) -> None:
    outcomes = set()
    for turns in [*range(0, 80, 4), 10_000]:
        task_id = uuid.uuid4().hex
        await store(once, task_id)
        reading = asyncio.create_task(once.get_result(task_id))
        await turns_of_the_loop(turns)
        reading.cancel()
        [outcome] = await asyncio.gather(reading, return_exceptions=True)
        outcomes.add(type(outcome))
        if isinstance(outcome, TaskiqResult):
            assert not await once.is_result_ready(task_id)
            assert await once.get_progress(task_id) is None
        else:
            assert isinstance(outcome, asyncio.CancelledError)
            # It may have been on its way back.
            assert (await once.wait_result(task_id, timeout=10)).return_value == task_id
    assert outcomes == {TaskiqResult, asyncio.CancelledError}
    await assert_at_rest(once, database)


READINGS: dict[str, Callable[[Backend, str], Coroutine[Any, Any, Any]]] = {
    "get_result": lambda backend, task_id: backend.get_result(task_id),
    "get_results": lambda backend, task_id: backend.get_results([task_id, "unknown"]),
    "wait_result": lambda backend, task_id: backend.wait_result(task_id),
    "wait_results": lambda backend, task_id: backend.wait_results([task_id]),
    "as_completed": lambda backend, task_id: anext(backend.as_completed([task_id])),  # type: ignore[arg-type,return-value]
}


@pytest.fixture(params=["asyncpg", "psycopg"])
async def engine(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(database.dsn_of(request.param))
    yield engine
    await engine.dispose()


@pytest.mark.parametrize("payload", ["Bytea", "Jsonb"])
@pytest.mark.parametrize("reading", READINGS)
async def test_what_is_taken_for_a_reader_who_has_gone_goes_back_whole(
    reading: str,
    payload: str,
    engine: AsyncEngine,
    database: Database,
    start_backend: BackendFactory,
) -> None:
    """He is cancelled when it is too late to leave the result where it is: in the COMMIT."""
    backend: Backend = await start_backend(
        engine=engine, keep_results=False, field_for_payload=payload, result_ttl=3600
    )
    labels = {"a": "b", "c": [1, None]}
    await backend.set_result("task", result_of({"x": [1]}, labels=labels, log="log", is_err=True))
    await backend.set_progress("task", progress_of({"step": 1}))
    await database.fetch(
        "UPDATE taskiq_results SET traceback = 'traceback', error_type = 'E', task_name = 'name', "
        "attempt = 3, args = '[1]', kwargs = '{\"k\": null}', worker = 'w', queued_at = now(), "
        "started_at = now(), finished_at = now() - interval '1 hour'"
    )
    tables = "SELECT * FROM taskiq_results JOIN taskiq_results_progress USING (task_id)"
    [before] = await database.fetch(tables)
    stored_by = "SELECT xmin::text FROM taskiq_results"
    first = await database.fetch(stored_by)
    tasks: list[asyncio.Task[Any]] = []

    @event.listens_for(engine.sync_engine, "commit")
    def cancel(_connection: Any) -> None:
        for task in tasks:
            task.cancel()

    tasks.append(asyncio.create_task(READINGS[reading](backend, "task")))
    [outcome] = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError)
    tasks.clear()

    async def is_back() -> bool:
        # The COMMIT that deletes it may still be under way.
        is_another = await database.fetch(stored_by) != first
        return is_another and await database.fetch(tables) == [before]

    await eventually(is_back)
    taken = await backend.get_result("task", with_logs=True)
    assert (taken.return_value, taken.labels, taken.log) == ({"x": [1]}, labels, "log")
    with pytest.raises(ResultIsMissingError):
        await backend.get_result("task")


@pytest.mark.parametrize("reading", ["get_result", "get_results"])
async def test_a_shutdown_after_the_reader_has_gone_loses_nothing(
    reading: str, database: Database, start_backend: BackendFactory
) -> None:
    """It waits for the COMMIT in which he has gone, and for what goes back."""
    backend: Backend = await start_backend(keep_results=False)
    await store(backend, "task")
    await database.fetch(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql "
        "AS $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NULL; END $$"
    )
    await database.fetch(
        "CREATE CONSTRAINT TRIGGER dawdle AFTER DELETE ON taskiq_results "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION dawdle()"
    )
    blocker = await asyncpg.connect(database.direct_dsn)
    await blocker.execute("SELECT pg_advisory_lock(7)")
    task = asyncio.create_task(READINGS[reading](backend, "task"))

    async def is_committing() -> bool:
        query = "SELECT FROM pg_stat_activity WHERE wait_event = 'advisory' AND query = 'COMMIT;'"
        return bool(await database.fetch(query))

    await eventually(is_committing)
    task.cancel()
    await asyncio.wait([task])
    ending = asyncio.create_task(backend.shutdown())
    await turns_of_the_loop(20)
    await blocker.close()
    await ending
    assert await stored_ids(database) == {"task"} == await ids_with_progress(database)


async def test_of_many_readers_who_are_cancelled_in_any_moment_none_loses_a_result(
    once: Backend, database: Database
) -> None:
    chance = random.Random(3)
    task_ids = [f"task {i}" for i in range(150)]
    await asyncio.gather(*[store(once, i, progress=False) for i in task_ids])
    readings = {i: asyncio.create_task(once.get_result(i)) for i in task_ids}
    for task_id in chance.sample(task_ids, len(task_ids)):
        await turns_of_the_loop(chance.randrange(4))
        readings[task_id].cancel()
    outcomes = await asyncio.gather(*readings.values(), return_exceptions=True)
    got = {o.return_value for o in outcomes if isinstance(o, TaskiqResult)}
    assert all(isinstance(o, TaskiqResult | asyncio.CancelledError) for o in outcomes)

    async def is_nothing_lost() -> bool:
        return got | await stored_ids(database) == set(task_ids)

    await eventually(is_nothing_lost)
    assert not got & await stored_ids(database)


async def test_a_later_result_is_not_replaced_by_what_goes_back(
    engine: AsyncEngine, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(engine=engine, keep_results=False)
    writer: Backend = await start_backend()
    await writer.set_result("task", result_of("earlier"))
    reading: list[asyncio.Task[Any]] = []

    @event.listens_for(engine.sync_engine, "commit")
    def cancel(_connection: Any) -> None:
        for task in reading:
            task.cancel()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def hold_back(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT"):
            await_only(writer.set_result("task", result_of("later")))

    reading.append(asyncio.create_task(backend.get_result("task")))
    await asyncio.wait(reading)
    reading.clear()
    await assert_comes_to_rest(backend)
    await backend.shutdown()  # which waits for what goes back
    assert (await writer.get_result("task")).return_value == "later"


async def test_waiting_for_several_takes_none_where_one_was_taken(
    once: Backend, database: Database, start_backend: BackendFactory
) -> None:
    """Between the moment when all were there and the reading."""
    await store(once, "a", "b")
    both = once.wait_results(["a", "b"])
    thief: Backend = await start_backend(keep_results=False)
    find_ready = once.runtime.reader.find_ready

    async def find_and_lose(column_ids: Collection[Any]) -> set[Any]:
        found = await find_ready(column_ids)
        await thief.get_result("b")
        return found

    once.runtime.reader.find_ready = find_and_lose  # type: ignore[method-assign]
    with pytest.raises(ResultIsMissingError, match="'b'"):
        await both

    async def is_back() -> bool:
        return await stored_ids(database) == {"a"} == await ids_with_progress(database)

    await eventually(is_back)


async def test_cancelling_callers_leaks_no_connection(once: Backend, database: Database) -> None:
    chance = random.Random(7)
    await store(once, "kept")
    for _ in range(12):
        calls: list[asyncio.Task[Any]] = [
            asyncio.create_task(call)
            for call in (
                once.is_result_ready("kept"),
                store(once, "other"),
                once.get_progress("kept"),
                once.get_result("unknown"),
                once.get_results(["unknown", "other"]),
                store(once, "another"),
                once.is_result_ready("other"),
            )
        ]
        for call in chance.sample(calls, len(calls)):
            await turns_of_the_loop(chance.randrange(20))
            call.cancel()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            unwanted = isinstance(outcome, Exception) and not isinstance(
                outcome, ResultIsMissingError
            )
            assert not unwanted, outcome
    await assert_at_rest(once, database)
    assert (await once.get_result("kept")).return_value == "kept"


async def turns_of_the_loop(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def assert_at_rest(backend: Backend, database: Database) -> None:
    """No connection is in use, and no session has a transaction open."""

    async def is_at_rest() -> bool:
        return set(await database.sessions("once")) <= {"idle"}

    await eventually(is_at_rest)
    await assert_comes_to_rest(backend)
