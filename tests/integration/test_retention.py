"""Results that expire: missing at once, and pruned in slices that nobody has to wait for."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from taskiq import InMemoryBroker
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    Pruned,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    TaskStatus,
)
from taskiq_sa_pg.statements import Slice, begin_slice, prune_results, prune_stale
from taskiq_sa_pg.timings import Timings
from tests.conftest import BackendFactory, Database, engine_of, eventually
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

MINUTE = timedelta(minutes=1)
SMALL_SLICES = Timings(pruned_at_once=3)


async def expire(database: Database, *task_ids: str) -> None:
    """Lets time pass for these results, or for all."""
    only = "WHERE task_id = ANY($1)" if task_ids else ""
    await database.fetch(
        f"UPDATE taskiq_results SET expires_at = now() - interval '1 second' {only}",
        *([list(task_ids)] if task_ids else []),
    )


async def ids_in(database: Database, table: str = "taskiq_results") -> set[str]:
    return {row["task_id"] for row in await database.fetch(f"SELECT task_id FROM {table}")}


async def ttls_in(database: Database) -> dict[str, float | None]:
    rows = await database.fetch(
        "SELECT task_id, extract(epoch FROM expires_at - finished_at)::float AS ttl "
        "FROM taskiq_results"
    )
    return {row["task_id"]: row["ttl"] for row in rows}


async def store(backend: Backend, *task_ids: str, **fields: Any) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i, **fields)) for i in task_ids])


async def test_results_expire_by_outcome_and_label(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn, result_ttl=MINUTE, failure_ttl=7200)
    failure = {"is_err": True, "error": ValueError("no")}
    await store(backend, "success")
    await store(backend, "failure", **failure)
    await store(backend, "own", labels={"result_ttl": "0.5", "failure_ttl": 9})
    await store(backend, "own failure", **failure, labels={"result_ttl": "0.5", "failure_ttl": 9})
    await store(backend, "kept", labels={"result_ttl": None})
    # What cannot be stored is a failure, however it ended.
    await store(backend, "unstorable", return_value=lambda: None)
    assert await ttls_in(database) == {
        "success": 60,
        "failure": 7200,
        "own": 0.5,
        "own failure": 9,
        "kept": None,
        "unstorable": 7200,
    }


async def test_gathered_results_expire_each_in_its_time(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn)
    times = {f"task {n}": n if n % 3 else None for n in range(300)}
    await asyncio.gather(
        *[
            backend.set_result(i, result_of(i, labels={"result_ttl": seconds}))
            for i, seconds in times.items()
        ]
    )
    assert await ttls_in(database) == times


async def test_a_task_says_so_by_its_labels(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn=database.dsn, result_ttl=5)
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)

    @broker.task(result_ttl=3600)
    async def slow() -> None: ...

    @broker.task
    async def quick() -> None: ...

    declared = await slow.kiq()
    plain = await quick.kiq()
    own = await quick.kicker().with_labels(result_ttl=0.5).kiq()
    assert await ttls_in(database) == {declared.task_id: 3600, plain.task_id: 5, own.task_id: 0.5}


async def test_an_expired_result_is_missing_for_every_read(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(result_ttl=MINUTE)
    once = await start_backend(keep_results=False)
    await store(backend, "expired", "there")
    await expire(database, "expired")
    for reader in (backend, once):
        assert not await reader.is_result_ready("expired")
        with pytest.raises(ResultIsMissingError):
            await reader.get_result("expired")
        with pytest.raises(TaskiqResultTimeoutError):
            await reader.wait_result("expired", timeout=0.05)
        assert await reader.get_results(["expired"]) == {}
    assert await backend.is_result_ready("there")
    assert (await once.get_results(["expired", "there"])).keys() == {"there"}
    assert await ids_in(database) == {"expired"}


async def test_an_expired_result_is_in_the_way_of_none(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """Else the second run of a task, with no retry yet, would be lost."""
    backend = await start_backend(dsn)
    await store(backend, "1", "2", labels={"_retries": 3})
    await store(backend, "1", "2", labels={"_retries": 1})
    assert (await backend.get_result("1")).labels == {"_retries": 3}
    await expire(database)
    await asyncio.gather(*[backend.set_result(i, result_of(f"new {i}")) for i in "12"])
    for task_id in "12":
        result = await backend.get_result(task_id)
        assert (result.return_value, result.labels) == (f"new {task_id}", {})
    assert await ttls_in(database) == {"1": None, "2": None}


async def test_the_database_s_clock_counts(
    database: Database, start_backend: BackendFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await start_backend(result_ttl=MINUTE)
    await store(backend, "1")
    [row] = await database.fetch("SELECT now() - finished_at AS age FROM taskiq_results")
    assert row["age"] < MINUTE
    await database.fetch("UPDATE taskiq_results SET expires_at = now() + interval '1 hour'")
    assert await backend.is_result_ready("1")


async def test_prune_deletes_what_has_expired_with_its_progress(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn, timings=SMALL_SLICES)
    expired = [f"expired {n}" for n in range(10)]
    await store(backend, *expired, "there", "later", labels={"result_ttl": 3600})
    for task_id in (*expired, "there", "running"):
        await backend.set_progress(task_id, progress_of(1))
    await expire(database, *expired)
    assert await backend.prune() == Pruned(results=10, progress=0, statuses=0, is_complete=True)
    assert await ids_in(database) == {"there", "later"}
    assert await ids_in(database, "taskiq_results_progress") == {"there", "running"}
    assert await backend.prune() == Pruned(results=0, progress=0, statuses=0, is_complete=True)


async def test_prune_keeps_to_its_limits(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(dsn, progress_ttl=MINUTE, timings=SMALL_SLICES)
    await store(backend, *map(str, range(10)))
    await expire(database)
    assert await backend.prune(limit=4) == Pruned(4, 0, 0, is_complete=False)
    assert await backend.prune(time_budget=1e-9) == Pruned(0, 0, 0, is_complete=False)
    assert await backend.prune(limit=10, time_budget=MINUTE) == Pruned(6, 0, 0, is_complete=True)
    for number in range(7):
        await backend.set_progress(str(number), progress_of(number))
    await database.fetch("UPDATE taskiq_results_progress SET updated_at = now() - interval '1 h'")
    assert await backend.prune(limit=2) == Pruned(0, 2, 0, is_complete=False)
    assert await backend.prune(limit=2**40) == Pruned(0, 5, 0, is_complete=True)


@pytest.mark.parametrize("limits", [{"limit": 0}, {"limit": True}, {"time_budget": 0}], ids=str)
async def test_a_limit_that_cannot_be_is_refused(
    start_backend: BackendFactory, limits: dict[str, Any]
) -> None:
    backend = await start_backend()
    with pytest.raises(ConfigurationError, match=next(iter(limits))):
        await backend.prune(**limits)


async def test_prune_needs_a_started_backend(database: Database) -> None:
    with pytest.raises(NotStartedError):
        await Backend(database.dsn).prune()


async def test_results_of_one_moment_are_pruned_in_slices_too(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(timings=SMALL_SLICES)
    await store(backend, *map(str, range(20)))
    await expire(database)
    [row] = await database.fetch("SELECT count(DISTINCT expires_at) AS n FROM taskiq_results")
    assert row["n"] == 1
    assert await backend.prune(limit=7) == Pruned(7, 0, 0, is_complete=False)
    assert await backend.prune() == Pruned(13, 0, 0, is_complete=True)


async def test_results_of_one_moment_that_a_trigger_keeps_are_left(
    database: Database, start_backend: BackendFactory
) -> None:
    """Else their slice would be begun for ever."""
    backend = await start_backend(timings=SMALL_SLICES)
    await store(backend, *map(str, range(8)), "later")
    await expire(database)
    await database.fetch(
        "UPDATE taskiq_results SET expires_at = expires_at + interval '1 ms' "
        "WHERE task_id = 'later'"
    )
    await database.fetch(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    await database.fetch(
        "CREATE TRIGGER keep BEFORE DELETE ON taskiq_results FOR EACH ROW "
        "WHEN (OLD.task_id <> 'later') EXECUTE FUNCTION keep()"
    )
    async with asyncio.timeout(10):
        assert await backend.prune() == Pruned(1, 0, 0, is_complete=True)


async def test_a_small_limit_makes_no_small_slices_of_what_is_not_stale(
    database: Database, start_backend: BackendFactory
) -> None:
    """Each is a transaction, and there may be a million of rows to look at."""
    backend = await start_backend(progress_ttl=MINUTE)
    ids = [f"{number:03}" for number in range(200)]
    await asyncio.gather(*[backend.set_progress(i, progress_of(1)) for i in ids])
    await database.fetch(
        "UPDATE taskiq_results_progress SET updated_at = now() - interval '1 h' "
        "WHERE task_id > '190'"
    )
    begun = []

    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        begun.append("set_config" in statement)

    sa.event.listen(engine_of(backend).sync_engine, "before_cursor_execute", note)
    assert await backend.prune(limit=2) == Pruned(0, 2, 0, is_complete=False)
    assert sum(begun) <= 2  # of the results, and of the progress
    assert await backend.prune(limit=100) == Pruned(0, 7, 0, is_complete=True)


async def test_what_expires_meanwhile_does_not_break_a_limit(
    database: Database, start_backend: BackendFactory
) -> None:
    """The last slice has no end, so it may have more rows than it had as it was begun."""
    backend = await start_backend(progress_ttl=MINUTE)
    await store(backend, *map(str, range(3)))
    await expire(database, "0")

    def expire_the_rest(_: Any, __: Any, statement: str, *___: Any) -> None:
        if "DELETE" in statement:
            sa.util.await_only(expire(database))

    sa.event.listen(engine_of(backend).sync_engine, "before_cursor_execute", expire_the_rest)
    await backend.prune(limit=1)
    assert await ids_in(database) == set()


@pytest.mark.parametrize(
    ("kind", "driver"), [("VarChar", "asyncpg"), ("Text", "psycopg"), ("Uuid", "asyncpg")]
)
async def test_progress_of_tasks_that_never_finished_goes(
    database: Database, start_backend: BackendFactory, kind: str, driver: str
) -> None:
    backend = await start_backend(
        database.dsn_of(driver), field_for_task_id=kind, progress_ttl=MINUTE, timings=SMALL_SLICES
    )
    young = [f"{n:032x}" for n in range(8)]  # more than a slice looks at, and the first
    old = [f"a{n:031x}" for n in range(8)]
    finished = "e" * 32
    for task_id in (*old, *young, finished):
        await backend.set_progress(task_id, progress_of(1))
    await store(backend, finished)
    await database.fetch(
        "UPDATE taskiq_results_progress SET updated_at = now() - interval '2 h' "
        "WHERE replace(task_id::text, '-', '') <> ALL($1)",
        young,
    )
    assert await backend.prune() == Pruned(0, 8, 0, is_complete=True)
    left = {str(i).replace("-", "") for i in await ids_in(database, "taskiq_results_progress")}
    assert left == {*young, finished}


async def expire_one_after_the_other(database: Database) -> None:
    await database.fetch(
        "UPDATE taskiq_results SET expires_at = now() - interval '1 hour' "
        "+ task_id::int * interval '1 second'"
    )


async def test_a_slice_with_a_locked_row_is_left_and_the_next_ones_go(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(progress_ttl=MINUTE, command_timeout=5, timings=SMALL_SLICES)
    ids = [f"{number}" for number in range(SMALL_SLICES.pruned_at_once * 2)]
    await store(backend, *ids)
    for task_id in ids:
        await backend.set_progress(f"p{task_id}", progress_of(1))
    await expire_one_after_the_other(database)
    await database.fetch("UPDATE taskiq_results_progress SET updated_at = now() - interval '1 h'")
    half = len(ids) // 2
    async with engine_of(backend).connect() as connection:
        for table, task_id in (("taskiq_results", "0"), ("taskiq_results_progress", "p1")):
            lock = f"SELECT FROM {table} WHERE task_id = '{task_id}' FOR UPDATE"
            await connection.execute(sa.text(lock))
        assert await backend.prune() == Pruned(half, half, 0, is_complete=True)
        assert await ids_in(database) == set(ids[:half])
    assert await backend.prune() == Pruned(half, half, 0, is_complete=True)


async def test_of_results_of_one_moment_a_locked_one_keeps_all(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(command_timeout=5, timings=SMALL_SLICES)
    ids = [f"{number}" for number in range(SMALL_SLICES.pruned_at_once * 2)]
    await store(backend, *ids, "later")
    await expire(database, *ids)
    await database.fetch(
        "UPDATE taskiq_results SET expires_at = now() - interval '1 microsecond' "
        "WHERE task_id = 'later'"
    )
    async with engine_of(backend).connect() as connection:
        await connection.execute(
            sa.text("SELECT FROM taskiq_results WHERE task_id <> 'later' FOR UPDATE")
        )
        assert await backend.prune() == Pruned(1, 0, 0, is_complete=True)
    assert await backend.prune() == Pruned(len(ids), 0, 0, is_complete=True)


@pytest.mark.parametrize("other", ["progress", "status"])
async def test_a_result_stays_with_what_is_locked_of_its_task(
    dsn: str, other: str, database: Database, start_backend: BackendFactory
) -> None:
    """Else what is left of it would stay for ever."""
    backend = await start_backend(
        dsn, command_timeout=5, retry_timeout=0, timings=SMALL_SLICES, track="started"
    )
    ids = [str(number) for number in range(SMALL_SLICES.pruned_at_once)]
    await store(backend, *ids)
    for task_id in ids:
        await backend.set_progress(task_id, progress_of(1))
        await backend.set_status(TaskStatus(task_id, "started"))
    await expire(database)
    table = f"taskiq_results_{other}"
    async with engine_of(backend).connect() as connection:
        await connection.execute(sa.text(f"SELECT FROM {table} WHERE task_id = '1' FOR UPDATE"))
        assert await backend.prune() == Pruned(0, 0, 0, is_complete=True)
        assert await ids_in(database) == set(ids)
        assert await ids_in(database, "taskiq_results_progress") == set(ids)
    assert await backend.prune() == Pruned(len(ids), 0, 0, is_complete=True)
    assert await ids_in(database, table) == set()


async def test_several_prune_at_once_and_each_row_goes_once(
    database: Database, start_backend: BackendFactory
) -> None:
    backends = [await start_backend(timings=SMALL_SLICES) for _ in range(4)]
    await store(backends[0], *map(str, range(100)))
    await expire(database)
    writing = asyncio.gather(*[store(backends[1], *map(str, range(50, 75))) for _ in range(3)])
    pruned = await asyncio.gather(*[backend.prune() for backend in backends])
    await writing
    rest = await backends[0].prune()
    assert await ids_in(database) == set(map(str, range(50, 75)))
    assert 75 <= sum(p.results for p in pruned) + rest.results <= 100


async def test_the_background_prunes_as_soon_as_results_are_stored(
    database: Database, start_backend: BackendFactory
) -> None:
    asking = await start_backend(prune_interval=0.01)
    await store(await start_backend(), "old")
    await expire(database)
    assert not await asking.is_result_ready("old")
    assert not asking.runtime.pruner.is_running
    await store(asking, "new")
    assert asking.runtime.pruner.is_running

    async def is_pruned() -> bool:
        return await ids_in(database) == {"new"}

    await eventually(is_pruned)


async def test_the_background_leaves_it_to_who_is_at_it(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(prune_interval=0.01)
    await store(backend, "old")
    key = "hashtextextended('taskiq_sa_pg prune taskiq_results', 0)"
    async with engine_of(backend).connect() as connection:
        await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({key})"))
        await expire(database)
        pruned = await backend.runtime.pruner.run(is_exclusive=True)
        assert pruned == Pruned(0, 0, 0, is_complete=True)
        assert await ids_in(database) == {"old"}
        assert await backend.prune() == Pruned(1, 0, 0, is_complete=True)


async def test_the_background_goes_on_where_others_ended_it(
    database: Database, start_backend: BackendFactory
) -> None:
    """Else many processes that end each other never get to the last rows of a large table."""
    backend = await start_backend(progress_ttl=MINUTE, timings=SMALL_SLICES)
    ids = [f"{number:03}" for number in range(4 * SMALL_SLICES.pruned_at_once)]
    for task_id in ids:
        await backend.set_progress(task_id, progress_of(1))
    pruner = backend.runtime.pruner
    await pruner.run(time_budget=MINUTE.total_seconds(), is_exclusive=True)
    stale = "UPDATE taskiq_results_progress SET updated_at = now() - interval '1 h'"
    async with engine_of(backend).connect() as connection:
        limit = 2 * SMALL_SLICES.pruned_at_once

        await database.fetch(stale)
        pruned = await pruner.run(limit, is_exclusive=True)
        assert pruned == Pruned(0, limit, 0, is_complete=False)
        key = "hashtextextended('taskiq_sa_pg prune taskiq_results', 0)"
        await connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({key})"))
        assert await pruner.run(is_exclusive=True) == Pruned(0, 0, 0, is_complete=True)
    await backend.set_progress("000", progress_of(1))
    await database.fetch(stale)
    rest = len(ids) - limit
    assert await pruner.run(is_exclusive=True) == Pruned(0, rest, 0, is_complete=True)
    assert await pruner.run(is_exclusive=True) == Pruned(0, 1, 0, is_complete=True)


async def test_the_background_outlives_a_fault(
    database: Database, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await start_backend(prune_interval=0.01, retry_timeout=0)
    await store(backend, "1")
    await expire(database)
    await database.fetch("ALTER TABLE taskiq_results_progress RENAME TO hidden")

    async def is_warned() -> bool:
        return "cannot prune table" in caplog.text

    await eventually(is_warned)
    await database.fetch("ALTER TABLE hidden RENAME TO taskiq_results_progress")

    async def is_pruned() -> bool:
        return await ids_in(database) == set()

    await eventually(is_pruned)


async def test_no_slice_reads_a_whole_table(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(progress_ttl=MINUTE)
    await database.fetch(
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels, "
        "expires_at) SELECT 'task ' || n, false, '', 0.1, '{}', now() - n % 2 * interval '1 day' "
        "+ interval '1 hour' FROM generate_series(1, 10000) AS n"
    )
    await database.fetch(
        "INSERT INTO taskiq_results_progress (task_id, state, updated_at) "
        "SELECT 'progress ' || n, 's', now() - interval '1 day' FROM generate_series(1, 10000) n"
    )
    await database.fetch(
        "INSERT INTO taskiq_results_status (task_id, state, updated_at) "
        "SELECT 'status ' || n, 's', now() - interval '1 day' FROM generate_series(1, 10000) n"
    )
    await database.fetch("ANALYZE taskiq_results, taskiq_results_progress, taskiq_results_status")
    plans: list[str] = []

    @sa.event.listens_for(engine_of(backend).sync_engine, "before_cursor_execute", retval=True)
    def explain(
        _conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any
    ) -> tuple[str, Any]:
        return f"EXPLAIN {statement}", parameters

    models = backend.models
    expires_at, now = models.results_table.c.expires_at, datetime.now(UTC)
    statements: list[Any] = [
        begin_slice(expires_at, None, 100),
        begin_slice(expires_at, now, 100),
        prune_results(models, Slice(None, now, 100)),
        prune_results(models, Slice(now, now, 100)),
        prune_results(models, Slice(now, None, 100)),
    ]
    for other in models.other_tables:
        statements += [
            begin_slice(other.c.task_id, "x", 100),
            prune_stale(models, other, Slice("progress 1", "progress 2", 100)),
        ]
    for statement in statements:
        rows = await backend.runtime.database.fetch(statement, {"seconds": 60.0}, "explain")
        plans.append("\n".join(row[0] for row in rows))
    for plan in plans:
        assert "Seq Scan" not in plan, plan
    assert "taskiq_results_expires_at_idx" in plans[0]


async def test_a_limit_that_ends_in_the_last_rows_says_that_some_are_left(
    database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(track="started", progress_ttl=60)
    for number in range(3):
        await backend.set_status(TaskStatus(str(number), "started"))
    await database.fetch("UPDATE taskiq_results_status SET updated_at = now() - interval '1 h'")
    assert await backend.prune(limit=2) == Pruned(0, 0, 2, is_complete=False)
    assert await backend.prune(limit=2) == Pruned(0, 0, 1, is_complete=True)
