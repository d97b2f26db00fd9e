"""find(): one keyset page of finished tasks, the latest first, that reads no payload."""

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa

from taskiq_sa_pg import (
    ConfigurationError,
    NotStartedError,
    Page,
    ResultDecodeError,
    ResultIsMissingError,
    SQLAlchemyResultBackend,
    StorageError,
    TaskRecord,
    build_models,
)
from tests.conftest import BackendFactory, Database
from tests.integration.databases import address
from tests.tasks import new_id, result_of

Backend = SQLAlchemyResultBackend[Any]


async def fill(database: Database, rows: int, **columns: str) -> None:
    """Stores successes, numbered from 1 on, each a minute older than the one before."""
    values = {
        "task_id": "to_char(n, 'FM000000')",
        "return_value": r"'\x80054e2e'",
        "finished_at": "now() - n * interval '1 minute'",
        "labels": "'{}'",
        **columns,
    }
    await database.fetch(
        f"INSERT INTO taskiq_results (is_err, execution_time, {', '.join(values)}) "
        f"SELECT n % 10 = 0, n, {', '.join(values.values())} FROM generate_series(1, {rows}) n"
    )


def numbers(page: Page) -> list[int]:
    return [int(record.task_id) for record in page.records]


async def every(backend: Backend, **arguments: Any) -> list[int]:
    """The numbers of all pages."""
    page = await backend.find(**arguments)
    found = numbers(page)
    while page.next is not None:
        page = await backend.find(**arguments, after=page.next)
        assert page.records, "an empty page was promised"
        found += numbers(page)
        assert len(set(found)) == len(found), "a task came twice"
    return found


@pytest.mark.parametrize(
    ("kind", "payload"), [("VarChar", "Bytea"), ("Text", "Jsonb"), ("Uuid", "Jsonb")]
)
async def test_a_record_is_what_is_stored(
    dsn: str, database: Database, start_backend: BackendFactory, kind: str, payload: str
) -> None:
    backend: Backend = await start_backend(
        dsn, field_for_task_id=kind, field_for_payload=payload, failure_ttl=3600
    )
    good, bad = new_id(), new_id()
    labels = {"user": 42, "bytes": b"\x00", "big": 2**80, "text": "ünï\x00"}
    await backend.set_result(good, result_of("value", labels=labels))
    error = LookupError("ünï")
    await backend.set_result(bad, result_of(None, is_err=True, error=error))
    await database.fetch(
        "UPDATE taskiq_results SET task_name = 'add', worker = 'w', attempt = 2, "
        "queued_at = '2026-01-01 12:00+02', started_at = '2026-01-01 12:01+02' WHERE NOT is_err"
    )
    page = await backend.find()
    failed, succeeded = page.records
    assert page.next is None
    first = await backend.find(limit=1)
    assert first.records == [failed]
    assert (await backend.find(limit=1, after=first.next)).records == [succeeded]
    assert [failed.task_id.replace("-", ""), succeeded.task_id.replace("-", "")] == [bad, good]
    assert (failed.outcome, failed.error_type) == ("failed", "LookupError")
    assert failed.expires_at is not None
    assert failed.expires_at - failed.finished_at == timedelta(hours=1)
    assert (succeeded.outcome, succeeded.task_name, succeeded.worker) == ("succeeded", "add", "w")
    assert (succeeded.attempt, succeeded.execution_time) == (2, 0.25)
    assert succeeded.queued_at == datetime(2026, 1, 1, 10, tzinfo=UTC)
    assert succeeded.started_at == datetime(2026, 1, 1, 10, 1, tzinfo=UTC)
    times = [getattr(failed, f.name) for f in fields(TaskRecord) if f.name.endswith("_at")]
    assert {time.tzinfo for time in times if time is not None} == {UTC}
    # Only a serializer could read a text with NUL, and it might execute what it reads.
    result = await backend.get_result(good)
    assert succeeded.labels == result.labels | {"text": "(serialized)"}
    details = await backend.get_details(good, with_result=True)
    assert (details.record, details.undecodable) == (succeeded, None)
    assert repr(details.result) == repr(result)
    details = await backend.get_details(bad)
    assert (details.record, details.result) == (failed, None)
    assert details.traceback is not None
    assert details.traceback.endswith("LookupError: ünï\n")


async def test_pages_skip_nothing_and_repeat_nothing(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """Though many finish in the same instant, in an order that is not that of their storage."""
    backend: Backend = await start_backend(dsn)
    instant = "date_trunc('hour', now()) - (n % 3) * interval '90 minutes'"
    await fill(database, 60, finished_at=instant, task_id="to_char((n * 77) % 211, 'FM000000')")
    ordered = [
        int(row[0])
        for row in await database.fetch(
            "SELECT task_id FROM taskiq_results ORDER BY finished_at DESC, task_id DESC"
        )
    ]
    for limit in (1, 7, 20, 59, 60, 61):
        assert await every(backend, limit=limit) == ordered
    first = await backend.find(limit=30)
    assert first.next is not None
    await database.fetch("DELETE FROM taskiq_results WHERE task_id = $1", first.records[-1].task_id)
    assert numbers(await backend.find(after=first.next, limit=30)) == ordered[30:]


async def test_the_search_widens_until_the_page_is_full_or_the_window_ends(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 33, finished_at="now() - power(2, n) * interval '1 second'")
    assert await every(backend, limit=7) == list(range(1, 31)), "2 ** 31 s ago is before 1970"
    assert await every(backend, window=3600) == list(range(1, 12))
    assert await every(backend, window=timedelta(hours=1), limit=3) == list(range(1, 12))
    assert await every(backend, window=1) == []
    assert await every(backend, window=1e12) == list(range(1, 31))
    page = await backend.find(window=3600, limit=11)
    assert (numbers(page), page.next) == (list(range(1, 12)), None)


async def test_nothing_is_lost_between_two_slices(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """The first ends a minute before the task after which the page begins."""
    backend: Backend = await start_backend(dsn)
    boundary = "'2026-01-01 11:59+00'::timestamptz"
    await fill(database, 5, finished_at=f"{boundary} + (3 - n) * interval '1 microsecond'")
    assert await every(backend, after="2026-01-01T12:00:00.000000Z_x") == [1, 2, 3, 4, 5]


async def test_a_page_may_begin_before_its_window(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 20)
    page = await backend.find(limit=10)
    assert await backend.find(after=page.next, window=60) == Page([], None)


async def test_what_finished_in_the_future_is_found_first(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    """As after a failover to a server whose clock goes after the old one's."""
    backend: Backend = await start_backend(dsn)
    await fill(database, 6, finished_at="now() + (3 - n) * interval '40 days'")
    assert await every(backend, limit=2) == [1, 2, 3, 4, 5, 6]
    assert await every(backend, limit=2, window=60) == [1, 2, 3]
    assert await every(backend, after="9000-01-01T00:00:00.000000Z_x") == [1, 2, 3, 4, 5, 6]


async def test_conditions(dsn: str, database: Database, start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(
        database,
        30,
        task_name="'task ' || n % 3",
        worker="'worker ' || n % 2",
        labels="jsonb_build_object('user', n, 'text', n::text, 'odd', n % 2 = 1, 'none', NULL)",
        args="CASE WHEN n < 20 THEN jsonb_build_array(n, 'a', jsonb_build_array(7)) END",
        kwargs="CASE WHEN n < 25 THEN jsonb_build_object('order_id', n * 100, 'x', 0.5) END",
    )
    Result = backend.models.Result  # noqa: N806 - it is a class
    under = Result.execution_time < 10
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"outcome": "failed"}, [10, 20, 30]),
        ({"outcome": "succeeded", "where": under}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"name": "task 1", "where": [under, Result.execution_time > 1]}, [4, 7]),
        ({"name": "task"}, []),
        ({"worker": "worker 1", "name": "task 0", "where": under}, [3, 9]),
        ({"where": sa.text("execution_time = 5")}, [5]),
        ({"label": {"user": 7}}, [7]),
        ({"label": {"user": "7"}}, [7]),
        ({"label": {"user": 7.0}}, [7]),
        ({"label": {"text": 7}}, [7]),
        ({"label": {"text": "7"}}, [7]),
        ({"label": {"text": "7", "user": "8"}}, []),
        ({"label": {"odd": True}, "where": under}, [1, 3, 5, 7, 9]),
        ({"label": {"odd": "false"}, "where": under}, [2, 4, 6, 8]),
        ({"label": {"none": None}, "where": under}, list(range(1, 10))),
        ({"label": {"other": None}}, []),
        ({"label": {}, "where": under}, list(range(1, 10))),
        ({"argument": {0: 7}}, [7]),
        ({"argument": {0: "7"}}, [7]),
        ({"argument": {1: "a", 0: 7}}, [7]),
        ({"argument": {1: 7}}, []),
        ({"argument": {"order_id": 700}}, [7]),
        ({"argument": {"order_id": "700", 0: 7}}, [7]),
        ({"argument": {"x": "0.5"}, "where": under}, list(range(1, 10))),
        ({"argument": 7}, [7]),
        ({"argument": "700"}, [7]),
        ({"argument": 2300}, [23]),
        ({"argument": "order_id"}, []),
        ({"argument": "'; --", "label": {"'": '"'}}, []),
    ]
    for arguments, found in cases:
        assert await every(backend, **arguments, limit=4) == found, arguments


async def test_expired_results_are_not_found(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 9, expires_at="now() + (n - 5) * interval '1 hour'")
    assert await every(backend) == [6, 7, 8, 9]
    with pytest.raises(ResultIsMissingError):
        await backend.get_details("000005")


async def test_nothing_is_deleted_where_reading_deletes(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn, keep_results=False)
    await fill(database, 3)
    for _ in range(2):
        assert await every(backend) == [1, 2, 3]
        assert (await backend.get_details("000001", with_result=True)).result is not None


async def test_the_details_are_everything(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    await fill(database, 2, args="'[1, null]'", kwargs="""'{"a": {"b": "ü"}}'""", traceback="'T'")
    details = await backend.get_details("000001")
    assert details.record == (await backend.find(limit=1)).records[0]
    assert (details.args, details.kwargs) == ([1, None], {"a": {"b": "ü"}})
    assert (details.traceback, details.result, details.undecodable) == ("T", None, None)
    await database.fetch("UPDATE taskiq_results SET return_value = 'garbage'")
    details = await backend.get_details("000001", with_result=True)
    assert details.result is None
    with pytest.raises(ResultDecodeError) as caught:
        await backend.get_result("000001")
    assert details.undecodable == str(caught.value)
    with pytest.raises(ResultIsMissingError, match="'nobody'"):
        await backend.get_details("nobody")


class Marker:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


async def test_nothing_is_unpickled(
    dsn: str, start_backend: BackendFactory, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    backend: Backend = await start_backend(dsn)
    marker = Marker(trace)
    await backend.set_result("x", result_of(marker, labels={"label": marker}))
    trace.unlink(missing_ok=True)  # what is stored has been loaded to see whether it can be
    [record] = (await backend.find()).records
    assert (record.labels, (await backend.get_details("x")).record) == (
        {"label": "(serialized)"},
        record,
    )
    assert not trace.exists()
    await backend.get_details("x", with_result=True)
    assert trace.exists()


HOSTILE = ["a\x00b", "\ud800", "x" * 1_000_000, "<b>", "'", '"', "%s", ":x", "\\", "{}", "1e999"]


async def test_any_text_is_sought_or_refused(dsn: str, start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(dsn)
    for text in HOSTILE:
        with pytest.raises(ConfigurationError, match="after must be the `next`") as refused:
            await backend.find(after=text)
        assert len(str(refused.value)) < 1000
        each: dict[str, Any] = {
            "name": text,
            "worker": text,
            "label": {text: text},
            "argument": {text: text},
        }
        if text not in HOSTILE[:2]:
            assert await backend.find(**each) == await backend.find(argument=text) == Page([], None)
            continue
        for name, value in each.items():
            arguments: dict[str, Any] = {name: value}
            with pytest.raises(ConfigurationError, match=f"{name} has NUL or lone surrogates"):
                await backend.find(**arguments)


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "a window of nothing": ({"window": 0}, "window must be .* not 0"),
    "a window in the future": ({"window": timedelta(-1)}, "window must be .* not "),
    "a window that is NaN": ({"window": float("nan")}, "window must be .* not nan"),
    "a window that is a text": ({"window": "1h"}, "window must be .* not '1h'"),
    "no limit": ({"limit": 0}, "limit must be .* not 0"),
    "a limit of None": ({"limit": None}, "limit must be .* not None"),
    "a limit that is too high": ({"limit": 1001}, "limit must be at most 1000, not 1001"),
    "a bool": ({"limit": True}, "limit must be .* not True"),
    "another outcome": ({"outcome": "success"}, "outcome must be .* 'failed', .* not 'success'"),
    "an outcome that is a list": ({"outcome": []}, r"outcome must be .* not \[\]"),
    "a name that is none": ({"name": 1}, "name must be a str or None, not 1"),
    "a worker that is none": ({"worker": b"w"}, "worker must be a str or None, not b'w'"),
    "a label without a value": ({"label": "user"}, "label must be a dict .* not 'user'"),
    "a label without a name": ({"label": {1: 2}}, "label must be a dict .* not {1: 2}"),
    "a label that is a list": ({"label": {"a": [1]}}, "label must have values .* this list"),
    "a label that is NaN": ({"label": {"a": float("nan")}}, "label must have values .* this float"),
    "an argument that is a list": ({"argument": [1]}, "argument must have values .* this list"),
    "an argument too large": ({"argument": 2**20_000}, "argument must have values"),
    "a position that is none": ({"argument": {True: 1}}, "argument must be .*: True is neither"),
    "a position far away": ({"argument": {2**31: 1}}, "argument must be .* is neither"),
    "a cursor that is none": ({"after": "x"}, "after must be the `next` .* not 'x'"),
    "a cursor of another type": ({"after": 1}, "after must be the `next` .* not 1"),
    "a cursor without a time": ({"after": "2026-13-01T00:00:00.000000Z_x"}, "after must be"),
    "a cursor without an id": ({"after": "2026-11-01T00:00:00.000000Z_\x00"}, "after must be"),
}


@pytest.mark.parametrize("unfit", UNFIT)
async def test_an_argument_that_cannot_be_is_named(unfit: str) -> None:
    arguments, said = UNFIT[unfit]
    with pytest.raises(ConfigurationError, match=said):
        await Backend("postgresql://nowhere").find(**arguments)


async def test_a_cursor_of_other_ids_is_refused() -> None:
    backend = Backend("postgresql://nowhere", field_for_task_id="Uuid")
    with pytest.raises(ConfigurationError, match="after must be the `next`"):
        await backend.find(after="2026-11-01T00:00:00.000000Z_x")


async def test_what_is_no_condition_is_refused() -> None:
    with pytest.raises(TypeError, match=r"where takes .* not True"):
        await Backend("postgresql://nowhere").find(True)  # type: ignore[arg-type]
    other = build_models().Result
    with pytest.raises(ConfigurationError, match=r"where .* must refer to backend\.models"):
        await Backend("postgresql://nowhere").find(other.is_err)


async def test_it_needs_a_started_backend() -> None:
    with pytest.raises(NotStartedError):
        await Backend("postgresql://nowhere").find()
    with pytest.raises(NotStartedError):
        await Backend("postgresql://nowhere").get_details("x")


async def test_what_postgresql_refuses_is_said(dsn: str, start_backend: BackendFactory) -> None:
    backend: Backend = await start_backend(dsn)
    with pytest.raises(StorageError, match="cannot find results in table taskiq_results: "):
        await backend.find(sa.text("nothing = 1"))
    assert (await backend.find()).records == []


async def test_a_search_that_takes_too_long_is_no_outage(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn, command_timeout=1.5)
    await fill(database, 1)
    with pytest.raises(StorageError, match=r"canceled, .* after 0\.5 s, .* pass window=") as caught:
        await backend.find(sa.text("pg_sleep(60) IS NOT NULL"))
    assert caught.value.sqlstate == "57014"
    assert backend.stats().retries == 0
    assert numbers(await backend.find()) == [1]
    # A connection keeps the usual limit.
    assert numbers(await backend.find(sa.text("pg_sleep(0.3) IS NOT NULL"))) == [1]


async def test_a_cursor_is_a_text_for_an_address(
    dsn: str, database: Database, start_backend: BackendFactory
) -> None:
    backend: Backend = await start_backend(dsn)
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    await fill(database, 2, finished_at=f"'{at.isoformat()}'::timestamptz")
    assert (await backend.find(limit=1)).next == "2026-01-02T01:04:05.000000Z_000002"


PAYLOAD = {"return_value", "error", "log", "traceback", "args", "kwargs"}
ROWS = 300_000


async def plans(
    connection: asyncpg.Connection, statements: list[tuple[str, Any]]
) -> list[tuple[str, dict[str, Any]]]:
    """The statements, and how the server executes them."""
    found = []
    for text, parameters in statements:
        if "finished_at" in text:
            explain = f"EXPLAIN (ANALYZE, VERBOSE, BUFFERS, FORMAT JSON) {text}"
            rows = await connection.fetch(explain, *parameters)
            found.append((text, json.loads(rows[0][0])[0]["Plan"]))
    return found


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


async def test_no_statement_scans_the_table(
    database: Database, start_backend: BackendFactory
) -> None:
    """Of 300,000 rows, spread over 30 days: not before statistics are there, either."""
    backend: Backend = await start_backend(address(database, "asyncpg"))
    connection = await asyncpg.connect(database.direct_dsn)
    await connection.execute("ALTER TABLE taskiq_results SET (autovacuum_enabled = off)")
    await connection.execute("SET synchronous_commit = off")
    await fill(
        database,
        ROWS,
        # As they come, the latest last.
        finished_at=f"now() - interval '30 days' * (1 - n / {ROWS + 1}.0)",
    )
    await connection.execute(
        "SELECT brin_summarize_new_values('taskiq_results_finished_at_idx'::regclass)"
    )
    [[pages]] = await connection.fetch(
        "SELECT pg_relation_size('taskiq_results') / current_setting('block_size')::int"
    )
    statements: list[tuple[str, Any]] = []
    engine = backend.runtime.database.engine.sync_engine

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(_: Any, __: Any, text: str, parameters: Any, *___: Any) -> None:
        statements.append((text, parameters))

    try:
        for is_analysed in (False, True):
            if is_analysed:
                await connection.execute("ANALYZE taskiq_results")
            page = await backend.find()
            for _ in range(3):
                assert len(page.records) == 50
                assert page.next is not None
                page = await backend.find(after=page.next)
            middle = datetime.now(UTC) - timedelta(days=15)
            after = f"{middle:%Y-%m-%dT%H:%M:%S.%f}Z_x"
            assert len((await backend.find(after=after, window=timedelta(days=16))).records) == 50
            assert len((await backend.find(limit=1000)).records) == 1000
        executed = await plans(connection, statements)
    finally:
        await connection.close()
    assert len(executed) > 10
    for text, plan in executed:
        kinds = [node["Node Type"] for node in nodes(plan)]
        assert "Seq Scan" not in kinds, (text, kinds)
        outputs = {name.split(".")[-1] for node in nodes(plan) for name in node.get("Output", [])}
        assert not PAYLOAD & outputs, text
        read = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        assert read < pages / 5, (text, read, pages)
