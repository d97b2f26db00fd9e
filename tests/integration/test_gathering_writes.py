"""Concurrent writes share statements, and each caller gets an answer of its own."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from taskiq.serializers import PickleSerializer

from taskiq_sa_pg import (
    InvalidTaskIdError,
    NotStartedError,
    ResultSerializationError,
    SQLAlchemyResultBackend,
    StorageError,
    TaskStatus,
)
from taskiq_sa_pg.codec import TaskMetadata, attach
from tests.conftest import BackendFactory, Database, assert_nothing_in_use, eventually
from tests.integration.databases import Log
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


@pytest.fixture
async def backend(log: Log, database: Database, start_backend: BackendFactory) -> Backend:
    """A backend whose statements are logged."""
    backend: Backend = await start_backend(
        f"{database.dsn}&application_name=writes",
        notify=False,
        pool_events=[(log.attach, "connect")],
    )
    return backend


async def store(backend: Backend, task_ids: Iterable[str]) -> list[Any]:
    """Stores a result for each id at once, and returns what became of the calls."""
    return await outcomes_of([backend.set_result(i, result_of(i)) for i in task_ids])


async def outcomes_of(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def values_of(backend: Backend, task_ids: Iterable[str]) -> dict[str, Any]:
    return {i: r.return_value for i, r in (await backend.get_results(task_ids)).items()}


async def turns_of_the_loop(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def is_waiting_for_locks(database: Database, number: int) -> bool:
    query = "SELECT wait_event_type FROM pg_stat_activity WHERE application_name = 'writes'"
    waits = [row["wait_event_type"] for row in await database.fetch(query)]
    return waits.count("Lock") >= number


MANY = [f"{i:03}" for i in range(500)]


async def test_concurrent_writes_are_few_statements(backend: Backend, log: Log) -> None:
    await store(backend, "abc")  # from now on none goes alone
    await asyncio.gather(*[backend.set_progress(i, progress_of(i)) for i in "abc"])
    await turns_of_the_loop(2)
    log.queries.clear()
    assert await store(backend, MANY) == [None] * 500
    await asyncio.gather(*[backend.set_progress(i, progress_of(i)) for i in MANY])
    await turns_of_the_loop(2)
    assert 2 <= log.count("INSERT") <= 6
    assert await values_of(backend, MANY) == {i: i for i in MANY}
    for task_id in MANY:
        assert await backend.get_progress(task_id) == progress_of(task_id)


WRITES: dict[str, Callable[[Backend, str], Coroutine[Any, Any, None]]] = {
    "set_result": lambda backend, task_id: backend.set_result(task_id, result_of(task_id)),
    "set_progress": lambda backend, task_id: backend.set_progress(task_id, progress_of(task_id)),
    "set_status": lambda backend, task_id: backend.set_status(TaskStatus(task_id, "queued")),
}


@pytest.mark.parametrize("name", WRITES)
async def test_a_quick_stream_of_tasks_that_write_once_shares_statements(
    name: str, start_backend: BackendFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a worker. The window lasts as long as they come."""
    # On a clock so slow that a machine which stands still now and then does not end the stream.
    loop = asyncio.get_running_loop()
    time, now = loop.time, loop.time()
    monkeypatch.setattr(loop, "time", lambda: now + (time() - now) / 20)
    backend: Backend = await start_backend(track="started", gather_window=60, notify=False)
    writing = []
    for task_id in MANY:
        writing.append(asyncio.create_task(WRITES[name](backend, task_id)))
        # A way to PostgreSQL and back: without the window, a statement takes few with it.
        await backend.is_result_ready("unknown")
    # Who reads does not wait for it.
    assert await backend.is_result_ready("unknown") is False
    await asyncio.gather(*writing)
    counts = backend.stats().operations[name]
    assert counts.calls == len(MANY)
    assert counts.batches < len(MANY) / 10


async def test_large_results_go_in_several_statements(backend: Backend, log: Log) -> None:
    await store(backend, MANY)  # from now on none goes alone
    large = "x" * 450_000
    results = {
        "value": result_of(large),
        "error": result_of(None, is_err=True, error=ValueError(large)),
        "label": result_of(None, labels={"label": large}),
        "log": result_of(None, log=large),
    }
    for name, result in results.items():
        await turns_of_the_loop(2)
        log.queries.clear()
        await asyncio.gather(*[backend.set_result(f"{name} {i}", result) for i in range(20)])
        await turns_of_the_loop(2)
        assert log.count("INSERT") >= 2, name


async def test_the_last_of_the_latest_attempt_is_stored(backend: Backend) -> None:
    written = [(0, "a"), (2, "b"), (None, "c"), (2, "d"), ("1", "e"), (0, "f")]
    results = [
        result_of(value, labels={} if attempt is None else {"_retries": attempt})
        for attempt, value in written
    ]
    await asyncio.gather(
        *[backend.set_result(i, result) for result in results for i in ("x", "y", "z")],
        *[backend.set_progress("x", progress_of(value)) for _, value in written],
    )
    assert await values_of(backend, ["x", "y", "z"]) == {"x": "d", "y": "d", "z": "d"}
    assert await backend.get_progress("x") == progress_of("f")


async def test_in_one_batch_a_later_message_goes_before_a_later_attempt(backend: Backend) -> None:
    """Of a task id that is used again, as in the table."""
    before, now = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    earlier_run = result_of("earlier run", labels={"_retries": 2})
    later_run = result_of("later run")
    attach(earlier_run, TaskMetadata(queued_at=before))
    attach(later_run, TaskMetadata(queued_at=now))
    await store(backend, "abc")  # from now on none goes alone
    await asyncio.gather(
        backend.set_result("x", later_run),
        backend.set_result("x", earlier_run),
        backend.set_result("y", earlier_run),
        backend.set_result("y", later_run),
    )
    assert await values_of(backend, ["x", "y"]) == {"x": "later run", "y": "later run"}


REFUSALS = {
    "check": """ALTER TABLE taskiq_results ADD CHECK
        (task_id NOT LIKE 'bad%' AND execution_time < 100)""",
    "trigger": """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'refused: %', NEW.task_id; END $$;
        CREATE TRIGGER refuse BEFORE INSERT ON taskiq_results FOR EACH ROW
            WHEN (NEW.task_id LIKE 'bad%' OR NEW.execution_time >= 100)
            EXECUTE FUNCTION refuse()""",
}


async def execute(database: Database, script: str) -> None:
    connection = await asyncpg.connect(database.direct_dsn)
    await connection.execute(script)
    await connection.close()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_of_a_refused_batch_only_the_guilty_fail(
    refusal: str, driver: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(database.dsn_of(driver))
    await execute(database, REFUSALS[refusal])
    task_ids = [f"bad {i}" if n in {2, 77, 78, 300, 499} else i for n, i in enumerate(MANY)]
    outcomes = dict(zip(task_ids, await store(backend, task_ids), strict=True))
    for task_id, outcome in outcomes.items():
        if task_id.startswith("bad"):
            assert isinstance(outcome, StorageError)
            assert str(outcome).startswith(f"task {task_id!r}: cannot store its result")
            assert outcome.sqlstate in {"23514", "P0001"}
        else:
            assert outcome is None
    good = [i for i in task_ids if not i.startswith("bad")]
    assert await values_of(backend, task_ids) == {i: i for i in good}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_where_the_later_of_two_writes_is_refused_the_earlier_is_stored(
    refusal: str, backend: Backend, database: Database
) -> None:
    await execute(database, REFUSALS[refusal])
    outcomes = await outcomes_of(
        [
            backend.set_result("first", result_of(0)),
            backend.set_result("task", result_of("earlier")),
            backend.set_result("other", result_of(1)),
            backend.set_result("task", result_of("later", execution_time=100)),
        ]
    )
    assert isinstance(outcomes.pop(), StorageError)
    assert outcomes == [None] * 3
    assert await values_of(backend, ["task", "other"]) == {"task": "earlier", "other": 1}


async def test_an_error_that_blames_no_row_costs_few_statements(
    backend: Backend, database: Database, log: Log
) -> None:
    await store(backend, MANY)
    await database.fetch("ALTER TABLE taskiq_results RENAME TO elsewhere")
    await turns_of_the_loop(2)
    log.queries.clear()
    outcomes = await store(backend, MANY)
    assert {type(outcome) for outcome in outcomes} == {StorageError}
    for task_id, outcome in zip(MANY, outcomes, strict=True):
        assert outcome.sqlstate == "42P01"
        assert str(outcome).startswith(f"task {task_id!r}: ")
    await turns_of_the_loop(2)
    assert 1 <= log.count("INSERT") <= 3


class Unloadable:
    """A value that no serializer holds."""

    def __reduce__(self) -> str:
        raise ValueError("not me")


async def test_what_cannot_be_encoded_fails_its_own_caller(backend: Backend) -> None:
    metas = [1, Unloadable(), 2, Unloadable(), 3]
    calls = [backend.set_progress(str(i), progress_of(meta)) for i, meta in enumerate(metas)]
    outcomes = await outcomes_of(calls)
    assert [type(o) for o in outcomes[1::2]] == [ResultSerializationError] * 2
    assert outcomes[::2] == [None] * 3
    assert [await backend.get_progress(i) for i in "024"] == [progress_of(i) for i in (1, 2, 3)]


async def test_what_is_no_result_fails_its_own_caller(backend: Backend) -> None:
    given: list[Any] = [result_of(0), result_of(1), "no result", result_of(2)]
    async with asyncio.timeout(10):
        outcomes = await outcomes_of(
            [backend.set_result(i, g) for i, g in zip("abbc", given, strict=True)]
        )
    assert isinstance(outcomes.pop(2), AttributeError)
    assert outcomes == [None] * 3
    assert await values_of(backend, ["a", "b", "c"]) == {"a": 0, "b": 1, "c": 2}


async def test_an_invalid_id_among_others_is_refused_before_any_statement(
    backend: Backend, log: Log
) -> None:
    [outcome] = await store(backend, ["a\x00b"])
    assert isinstance(outcome, InvalidTaskIdError)
    assert log.count("INSERT") == 0
    outcomes = await store(backend, ["1", "a\x00b", "2"])
    assert isinstance(outcomes.pop(1), InvalidTaskIdError)
    assert outcomes == [None, None]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_cancelling_half_of_the_callers_touches_no_other(
    driver: str, database: Database, start_backend: BackendFactory
) -> None:
    chance = random.Random(7)
    dsn = database.dsn_of(driver)
    backend: Backend = await start_backend(dsn, notify=False)
    task_ids = [str(i) for i in range(600)]
    calls = []
    for task_id in task_ids:
        calls.append(asyncio.create_task(backend.set_result(task_id, result_of(task_id))))
        if chance.random() < 0.3:
            await turns_of_the_loop(chance.randrange(4))
        if len(calls) % 2 == 0:
            chance.choice(calls[-100:]).cancel()
    async with asyncio.timeout(30):
        outcomes = await outcomes_of(calls)
    stored = await values_of(backend, task_ids)
    for task_id, outcome in zip(task_ids, outcomes, strict=True):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        if outcome is None:
            assert stored[task_id] == task_id
    assert sum(call.cancelled() for call in calls) > 30
    assert_nothing_in_use(backend)
    await backend.shutdown()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_cancelling_the_lone_caller_leaves_the_next_one_alone(
    backend: Backend, database: Database
) -> None:
    await backend.set_result("task", result_of(0))
    other = await asyncpg.connect(database.direct_dsn)
    async with other.transaction():
        await other.execute("SELECT 1 FROM taskiq_results FOR UPDATE")
        lone, *others = [
            asyncio.create_task(backend.set_result("task", result_of(i))) for i in range(1, 4)
        ]
        await eventually(lambda: is_waiting_for_locks(database, 1))
        lone.cancel()
    await other.close()
    outcomes = await outcomes_of([lone, *others])
    assert isinstance(outcomes.pop(0), asyncio.CancelledError)
    assert outcomes == [None, None]
    assert await values_of(backend, ["task"]) == {"task": 3}


@pytest.mark.parametrize("turns", [1, 5, 50])
async def test_when_all_tasks_are_cancelled_nobody_waits_and_the_next_call_works(
    turns: int, backend: Backend
) -> None:
    calls = [asyncio.create_task(backend.set_result(i, result_of(i))) for i in MANY]
    await turns_of_the_loop(turns)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    async with asyncio.timeout(10):
        await outcomes_of(calls)
        assert await store(backend, MANY) == [None] * 500
    assert await values_of(backend, MANY) == {i: i for i in MANY}


@pytest.mark.parametrize("number", [1, 500])
@pytest.mark.parametrize("turns", [1, 3])
async def test_shutdown_stores_what_was_accepted_and_refuses_the_rest(
    number: int, turns: int, backend: Backend, database: Database
) -> None:
    calls = [asyncio.create_task(backend.set_result(i, result_of(i))) for i in MANY[:number]]
    await turns_of_the_loop(turns)
    closing = asyncio.create_task(backend.shutdown())
    await turns_of_the_loop(1)
    with pytest.raises(NotStartedError):
        await backend.set_result("late", result_of(1))
    await closing
    rows = await database.fetch("SELECT task_id FROM taskiq_results ORDER BY task_id")
    assert [row["task_id"] for row in rows] == MANY[:number]
    assert await asyncio.gather(*calls) == [None] * number


async def test_what_was_stored_is_committed_when_its_caller_returns(
    backend: Backend, database: Database
) -> None:
    lookers: asyncio.Queue[asyncpg.Connection] = asyncio.Queue()
    for _ in range(4):
        lookers.put_nowait(await asyncpg.connect(database.direct_dsn))
    query = "SELECT count(*) FROM taskiq_results WHERE task_id = $1"

    async def write_and_look(task_id: str) -> int:
        await backend.set_result(task_id, result_of(1))
        looker = await lookers.get()
        count: int = await looker.fetchval(query, task_id)
        lookers.put_nowait(looker)
        return count

    async def write_many(start: int) -> list[int]:
        return [await write_and_look(f"{start} {i}") for i in range(10)]

    counts = await asyncio.gather(*map(write_many, range(30)))
    assert counts == [[1] * 10] * 30
    while not lookers.empty():
        await lookers.get_nowait().close()


class Counting(PickleSerializer):
    """Counts what it serializes."""

    dumped = 0

    def dumpb(self, value: Any) -> bytes:
        self.dumped += 1
        return super().dumpb(value)


async def test_of_many_pending_writes_few_are_encoded_before_their_turn(
    start_backend: BackendFactory, database: Database
) -> None:
    serializer = Counting()
    backend: Backend = await start_backend(serializer=serializer, notify=False)
    returned, most = 0, 0

    async def write(number: int) -> None:
        nonlocal returned, most
        await backend.set_result(str(number), result_of(number))
        returned += 1
        most = max(most, serializer.dumped - returned)

    await asyncio.gather(*map(write, range(5_000)))
    [row] = await database.fetch("SELECT count(*) FROM taskiq_results")
    assert (row["count"], serializer.dumped) == (5_000, 5_000)
    # Two lanes with 500 rows each; and as many whose callers have yet to return.
    assert most <= 2 * 2 * 500
