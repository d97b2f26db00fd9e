"""Concurrent reads share statements; each caller gets an answer of its own, or the only one."""

import asyncio
import random
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from taskiq import TaskiqResult

from taskiq_sa_pg import (
    ResultDecodeError,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    StorageError,
)
from tests.conftest import BackendFactory, Database, assert_nothing_in_use, eventually
from tests.integration.databases import Log
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

# What the statements that ask the tables have in common.
READS = 'FROM "taskiq_results'

MANY = [f"{i:03}" for i in range(200)]


@pytest.fixture
async def backend(log: Log, database: Database, start_backend: BackendFactory) -> Backend:
    """A backend that keeps what it reads, and whose statements are logged."""
    backend: Backend = await start_backend(
        database.dsn, notify=False, pool_events=[(log.attach, "connect")]
    )
    return backend


@pytest.fixture(params=["asyncpg", "psycopg"])
async def once(
    request: pytest.FixtureRequest, database: Database, start_backend: BackendFactory
) -> Backend:
    """A backend that deletes what it reads."""
    dsn = database.dsn_of(request.param)
    backend: Backend = await start_backend(
        f"{dsn}&application_name=once", keep_results=False, notify=False
    )
    return backend


def logged(value: Any) -> TaskiqResult[Any]:
    return result_of(value, log=str(value))


async def store(backend: Backend, task_ids: Iterable[str]) -> None:
    """Stores for each id a result and progress."""
    await asyncio.gather(*[backend.set_progress(i, progress_of([i])) for i in task_ids])
    await asyncio.gather(*[backend.set_result(i, logged([i])) for i in task_ids])


async def outcomes_of(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def stored_ids(database: Database) -> set[str]:
    return {row["task_id"] for row in await database.fetch("SELECT task_id FROM taskiq_results")}


async def is_waiting_for_a_lock(database: Database) -> bool:
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'once'"
    return "Lock" in [row["wait_event_type"] for row in await database.fetch(query)]


@pytest.mark.parametrize("operation", ["is_result_ready", "get_result", "get_progress"])
async def test_concurrent_reads_are_few_statements(
    operation: str, backend: Backend, log: Log
) -> None:
    await store(backend, MANY[::2])
    await outcomes_of([getattr(backend, operation)(i) for i in "abc"])  # now none goes alone
    await asyncio.sleep(0)  # the last one's log
    log.queries.clear()
    answers = await outcomes_of([getattr(backend, operation)(i) for i in MANY])
    await asyncio.sleep(0)
    assert 1 <= log.count(READS) <= 3
    for task_id, answer, is_stored in zip(MANY, answers, [True, False] * 100, strict=True):
        if operation == "is_result_ready":
            assert answer is is_stored
        elif operation == "get_progress":
            assert answer == (progress_of([task_id]) if is_stored else None)
        elif is_stored:
            assert answer.return_value == [task_id]
        else:
            assert isinstance(answer, ResultIsMissingError)
            assert repr(task_id) in str(answer)


@pytest.mark.parametrize("operation", ["is_result_ready", "get_result", "get_progress"])
async def test_an_id_that_many_ask_for_is_asked_for_once(
    operation: str, backend: Backend, log: Log
) -> None:
    await store(backend, ["a", "b"])
    await asyncio.sleep(0)
    log.queries.clear()
    answers = await asyncio.gather(*[getattr(backend, operation)("ab"[i % 2]) for i in range(600)])
    await asyncio.sleep(0)
    # The first alone, "b" beside it, and "a" again for those who came after the first.
    assert 1 <= log.count(READS) <= 3
    assert answers[2:] == answers[:2] * 299


async def test_each_caller_gets_a_result_of_its_own_with_its_log_or_without(
    backend: Backend,
) -> None:
    await store(backend, ["task"])
    results = await asyncio.gather(
        *[backend.get_result("task", with_logs=i % 2 == 0) for i in range(50)]
    )
    for i, result in enumerate(results):
        assert (result.return_value, result.labels) == (["task"], {})
        assert result.log == ("['task']" if i % 2 == 0 else None)
        result.return_value.append("spoilt")
        result.labels["spoilt"] = True
    progresses = await asyncio.gather(*[backend.get_progress("task") for _ in range(10)])
    for progress in progresses:
        assert progress == progress_of(["task"])
        progress.meta.append("spoilt")


async def test_what_cannot_be_decoded_fails_its_own_readers(
    backend: Backend, database: Database
) -> None:
    await store(backend, MANY)
    await spoil(database, MANY[7])
    outcomes = await outcomes_of([backend.get_result(i) for i in MANY])
    assert isinstance(outcomes.pop(7), ResultDecodeError)
    assert all(isinstance(outcome, TaskiqResult) for outcome in outcomes)


async def spoil(database: Database, task_id: str) -> None:
    query = "UPDATE taskiq_results SET return_value = 'garbage' WHERE task_id = $1"
    await database.fetch(query, task_id)


async def test_an_error_names_the_task_of_each_reader(backend: Backend, database: Database) -> None:
    await database.fetch("ALTER TABLE taskiq_results RENAME TO elsewhere")
    for operation in (backend.is_result_ready, backend.get_result):
        for task_id, outcome in zip(
            MANY, await outcomes_of([operation(i) for i in MANY]), strict=True
        ):
            assert isinstance(outcome, StorageError)
            assert str(outcome).startswith(f"task {task_id!r}: ")


async def test_of_many_readers_of_many_results_each_result_goes_to_one(
    once: Backend, database: Database
) -> None:
    await store(once, MANY)
    calls = [(i, once.get_result(i, with_logs=n % 2 == 0)) for n in range(50) for i in MANY[:40]]
    outcomes = await outcomes_of([call for _, call in calls])
    got = []
    for (task_id, _), outcome in zip(calls, outcomes, strict=True):
        if isinstance(outcome, TaskiqResult):
            assert outcome.return_value == [task_id]
            assert outcome.log in {f"['{task_id}']", None}
            got.append(task_id)
        else:
            assert isinstance(outcome, ResultIsMissingError)
    assert sorted(got) == MANY[:40]
    assert await stored_ids(database) == set(MANY[40:])


async def test_who_takes_a_result_gets_its_log_if_it_wants_it(once: Backend) -> None:
    await store(once, MANY)
    calls = [once.get_result(i, with_logs=n % 2 == 0) for n, i in enumerate(MANY)]
    for n, result in enumerate(await asyncio.gather(*calls)):
        assert result.log == (f"['{MANY[n]}']" if n % 2 == 0 else None)


async def test_what_cannot_be_decoded_stays_and_those_taken_with_it_are_handed_out(
    once: Backend, database: Database
) -> None:
    await store(once, MANY)
    spoilt = {MANY[7], MANY[77]}
    for task_id in spoilt:
        await spoil(database, task_id)
    outcomes = await outcomes_of([once.get_result(i) for i in MANY[:100]])
    for task_id, outcome in zip(MANY, outcomes, strict=False):
        if task_id in spoilt:
            assert isinstance(outcome, ResultDecodeError)
            assert repr(task_id) in str(outcome)
        else:
            assert outcome.return_value == [task_id]
    assert await stored_ids(database) == spoilt | set(MANY[100:])


@pytest.mark.parametrize("position", [0, 1, 15], ids=["alone", "first", "amid"])
async def test_the_result_of_a_reader_who_goes_while_it_is_taken_stays(
    position: int, once: Backend, database: Database
) -> None:
    task_ids = MANY[:30]  # so few that all but the first go together
    await store(once, task_ids)
    other = await asyncpg.connect(database.direct_dsn)
    async with other.transaction():
        # All of a batch but one are deleted, and wait for this one.
        locked = task_ids[-1] if position else task_ids[0]
        await other.execute("SELECT 1 FROM taskiq_results WHERE task_id = $1 FOR UPDATE", locked)
        readers = [asyncio.create_task(once.get_result(i)) for i in task_ids]
        await eventually(lambda: is_waiting_for_a_lock(database))
        readers[position].cancel()
    await other.close()
    outcomes = await outcomes_of(readers)
    assert isinstance(outcomes.pop(position), asyncio.CancelledError)
    assert [o.return_value for o in outcomes] == [[i] for i in task_ids if i != task_ids[position]]
    assert await stored_ids(database) == {task_ids[position]}
    assert await once.get_progress(task_ids[position]) is not None
    assert (await once.get_result(task_ids[position])).return_value == [task_ids[position]]


async def test_where_all_readers_go_while_their_results_are_taken_all_stay(
    once: Backend, database: Database
) -> None:
    await store(once, MANY)
    other = await asyncpg.connect(database.direct_dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM taskiq_results FOR UPDATE")
        readers = [asyncio.create_task(once.get_result(i)) for i in MANY]
        await eventually(lambda: is_waiting_for_a_lock(database))
        for reader in readers:
            reader.cancel()
    await other.close()
    await outcomes_of(readers)
    assert await once.is_result_ready(MANY[0])
    await once.shutdown()
    assert await stored_ids(database) == set(MANY)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_another_reader_of_the_same_gets_what_a_cancelled_one_does_not(
    once: Backend, database: Database
) -> None:
    await store(once, ["first", "task"])
    other = await asyncpg.connect(database.direct_dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM taskiq_results WHERE task_id = 'task' FOR UPDATE")
        readers = [asyncio.create_task(once.get_result(i)) for i in ("first", "task", "task")]
        await eventually(lambda: is_waiting_for_a_lock(database))
        readers[1].cancel()
    await other.close()
    assert (await readers[2]).return_value == ["task"]
    await outcomes_of(readers)


async def test_readers_cancelled_at_any_time_keep_no_result_from_the_others(
    once: Backend, database: Database
) -> None:
    chance = random.Random(7)
    task_ids = [str(i) for i in range(400)]
    await store(once, task_ids)
    readers = []
    for task_id in task_ids:
        readers.append(asyncio.create_task(once.get_result(task_id)))
        if chance.random() < 0.3:
            await asyncio.sleep(0)
        if len(readers) % 2 == 0:
            chance.choice(readers[-100:]).cancel()
    async with asyncio.timeout(30):
        outcomes = await outcomes_of(readers)
    left = await stored_ids(database)
    for task_id, outcome in zip(task_ids, outcomes, strict=True):
        if isinstance(outcome, asyncio.CancelledError):
            continue  # gone, if it came after the commit
        assert outcome.return_value == [task_id]
        assert task_id not in left
    assert sum(reader.cancelled() for reader in readers) > 50
    assert_nothing_in_use(once)


async def test_writing_and_deleting_reads_of_two_backends_lose_nothing(
    once: Backend, start_backend: BackendFactory, database: Database
) -> None:
    chance = random.Random(7)
    other: Backend = await start_backend(keep_results=False, notify=False)
    task_ids = [*MANY[:100], *[i.replace("0", "a") + "B" for i in MANY[:100]]]
    read: dict[str, list[Any]] = {i: [] for i in task_ids}

    async def write(backend: Backend, task_id: str, value: int) -> None:
        await backend.set_progress(task_id, progress_of(value))
        await backend.set_result(task_id, logged(value))

    async def take(backend: Backend, task_id: str) -> None:
        with suppress(ResultIsMissingError):
            read[task_id].append((await backend.get_result(task_id)).return_value)

    began_at = asyncio.get_running_loop().time()
    for value in range(4):
        calls = [
            operation
            for backend in (once, other)
            for task_id in chance.sample(task_ids, len(task_ids))
            for operation in (write(backend, task_id, value), take(backend, task_id))
        ]
        chance.shuffle(calls)
        await asyncio.gather(*calls)
    assert asyncio.get_running_loop().time() - began_at < 30
    left = await other.get_results(task_ids)
    for task_id, result in left.items():
        read[task_id].append(result.return_value)
    for values in read.values():
        # Each round's two writes are read once or twice, and in their order.
        assert values == sorted(values)
        assert values[-1] == 3
        assert all(values.count(value) <= 2 for value in values)
