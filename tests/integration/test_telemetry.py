"""stats(), and what OpenTelemetry's SDK gets: figures that agree with what was done."""

import asyncio
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from taskiq_sa_pg import (
    BatchStats,
    NotStartedError,
    SQLAlchemyResultBackend,
    Stats,
    StorageError,
    TaskStatus,
)
from tests.conftest import BackendFactory, Database, engine_of, eventually
from tests.tasks import progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]

# For the whole process: providers can be set once.
READER = InMemoryMetricReader()
EXPORTER = InMemorySpanExporter()

NO_BATCHES = BatchStats(0, 0, 0, 0.0, 0.0, 0)


@pytest.fixture(scope="module", autouse=True)
def sdk() -> Iterator[None]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(provider)
    metrics.set_meter_provider(MeterProvider([READER], shutdown_on_exit=False))
    yield
    EXPORTER.shutdown()  # not the provider, which would complain of all later spans


@pytest.fixture
def table(request: pytest.FixtureRequest) -> str:
    """A name that tells this test's figures from the others'."""
    EXPORTER.clear()
    return f"t{abs(hash(request.node.nodeid)) % 10**9}"


def spans_of(table: str) -> list[ReadableSpan]:
    return [
        span
        for span in EXPORTER.get_finished_spans()
        if (span.attributes or {}).get("db.collection.name") == table
    ]


def points_of(table: str, name: str) -> dict[str, Any]:
    """The data points of a metric, by operation or by what was pruned."""
    found: dict[str, Any] = {}
    data = READER.get_metrics_data()
    assert data is not None
    for metric in (m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics):
        for point in metric.data.data_points if metric.name == name else ():
            attributes = dict(point.attributes)
            if attributes["db.collection.name"] == table:
                by = attributes.get("db.operation.name", attributes.get("taskiq_sa_pg.rows", ""))
                found[by] = point
    return found


async def test_the_figures_agree_with_what_was_done(
    table: str, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table, track="started")
    await backend.set_result("lone", result_of(1))
    await asyncio.gather(*[backend.set_result(str(i), result_of(i)) for i in range(100)])
    await asyncio.gather(*[backend.set_progress("same", progress_of(i)) for i in range(10)])
    await backend.get_result("lone")
    await asyncio.gather(*[backend.is_result_ready(str(i)) for i in range(20)])
    await backend.get_progress("same")
    await backend.set_status(TaskStatus("1", "started"))
    await backend.get_status("1")
    stats = backend.stats()
    calls = {operation: each.calls for operation, each in stats.operations.items()}
    assert calls == {
        "set_result": 101,
        "set_progress": 10,
        "is_result_ready": 20,
        "get_result": 1,
        "get_progress": 1,
        "set_status": 1,
        "get_status": 1,
    }
    for operation, each in stats.operations.items():
        size = points_of(table, "taskiq_sa_pg.batch.size")[operation]
        wait = points_of(table, "taskiq_sa_pg.queue.wait")[operation]
        assert (size.count, size.max) == (each.batches, each.largest)
        assert (wait.count, wait.max) == (each.batches, each.longest_wait)
        assert wait.sum == pytest.approx(each.waited)
        assert len([s for s in spans_of(table) if s.name == f"{operation} {table}"]) == each.batches
        assert 1 <= each.batches <= each.calls
        assert each.pending == 0
        assert 0 <= each.longest_wait <= each.waited < 60
    assert stats.operations["set_result"].batches < 20
    assert stats.operations["set_result"].largest > 10
    assert stats.operations["set_progress"].largest == 1


async def test_the_figures_outlive_the_backends_rest(
    table: str, start_backend: BackendFactory
) -> None:
    backend: Backend = SQLAlchemyResultBackend("postgresql://", table_name=table)
    assert backend.stats() == Stats(
        dict.fromkeys(backend.stats().operations, NO_BATCHES),
        0,
        {"results": 0, "progress": 0, "status": 0},
        "idle",
        0,
    )
    backend = await start_backend(table_name=table, notify=False)
    assert backend.stats().listener == "off"
    await backend.set_result("1", result_of(1))
    await backend.shutdown()
    before = backend.stats()
    with pytest.raises(NotStartedError):
        await backend.set_result("2", result_of(1))
    await backend.startup()
    await backend.set_result("2", result_of(1))
    assert before.operations["set_result"].calls == 1
    assert backend.stats().operations["set_result"].calls == 2


async def test_pending_calls_are_counted(
    table: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table)
    async with engine_of(backend).connect() as connection:
        await connection.exec_driver_sql(f"LOCK TABLE {table}")
        storing = [
            asyncio.ensure_future(backend.set_result(str(i), result_of(1))) for i in range(1000)
        ]
        await asyncio.sleep(0)
        assert backend.stats().operations["set_result"].pending == 1000
        assert points_of(table, "taskiq_sa_pg.pending")["set_result"].value == 1000
        await connection.rollback()
    await asyncio.gather(*storing)
    stats = backend.stats().operations["set_result"]
    assert stats.pending == 0
    await backend.set_result("quick", result_of(1))
    after = backend.stats().operations["set_result"]
    assert after.longest_wait == stats.longest_wait < after.waited


async def test_a_lone_calls_span_is_its_callers_child(
    table: str, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table)
    await backend.set_result("first", result_of(1))  # from now on it is known that there is an SDK
    EXPORTER.clear()
    with trace.get_tracer("test").start_as_current_span("caller") as caller:
        await backend.set_result("1", result_of(1))
        await backend.set_progress("first", progress_of(1))
        await backend.set_progress("1", progress_of(1))
    await backend.set_result("2", result_of(1))
    inside, _, progress, outside = spans_of(table)
    for span in (inside, progress):
        assert span.parent is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.links == ()
    assert outside.parent is None
    assert inside.kind is trace.SpanKind.CLIENT
    assert inside.attributes == {
        "db.system.name": "postgresql",
        "db.operation.name": "set_result",
        "db.collection.name": table,
    }


async def test_a_batchs_span_is_linked_to_its_callers(
    table: str, start_backend: BackendFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.telemetry.MAX_LINKS", 20)
    backend = await start_backend(table_name=table)
    await backend.set_result("first", result_of(1))
    EXPORTER.clear()
    callers = []

    async def call(number: int) -> None:
        with trace.get_tracer("test").start_as_current_span(f"caller {number}") as span:
            callers.append(span.get_span_context().span_id)
            await backend.set_result(str(number), result_of(1))

    await asyncio.gather(*[call(number) for number in range(200)])
    spans = spans_of(table)
    shared = [span for span in spans if (span.attributes or {}).get("db.operation.batch.size")]
    assert shared
    for span in shared:
        assert span.parent is None
        size = (span.attributes or {})["db.operation.batch.size"]
        assert len(span.links) == min(size, 20)
        assert {link.context.span_id for link in span.links} <= set(callers)
    linked = [link.context.span_id for span in shared for link in span.links]
    assert len(linked) == len(set(linked))


async def test_what_fails_is_an_error_without_values(
    table: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table, retry_timeout=0)
    await database.fetch(f"ALTER TABLE {table} ADD CHECK (execution_time < 5)")
    with pytest.raises(StorageError):
        await backend.set_result("1", result_of("geheim", execution_time=10.0))
    [span] = spans_of(table)
    assert span.status.status_code is trace.StatusCode.ERROR
    [event] = span.events
    assert "StorageError" in str((event.attributes or {})["exception.type"])
    assert "geheim" not in span.to_json()


async def test_a_statement_that_is_tried_again_counts_as_a_retry(
    table: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table)
    await backend.set_result("1", result_of(1))
    await database.fetch("CREATE SEQUENCE tries")
    await database.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END IF; "
        "RETURN NEW; END $$"
    )
    await database.fetch(
        f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    await backend.set_result("2", result_of(1))
    assert backend.stats().retries == points_of(table, "taskiq_sa_pg.retries")[""].value == 2
    assert backend.stats().operations["set_result"].batches == 2


async def test_pruned_rows_are_counted(
    table: str, database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend(table_name=table, track="started", progress_ttl=60)
    for i in range(3):
        await backend.set_result(f"r{i}", result_of(1, labels={"result_ttl": 60}))
    await backend.set_progress("p", progress_of(1))
    await backend.set_status(TaskStatus("s", "started"))
    await database.fetch(f"UPDATE {table} SET expires_at = now()")
    for name in ("progress", "status"):
        await database.fetch(f"UPDATE {table}_{name} SET updated_at = now() - interval '1 h'")
    with trace.get_tracer("test").start_as_current_span("caller") as caller:
        await backend.prune()
    await backend.prune()
    pruned = {"results": 3, "progress": 1, "status": 1}
    assert backend.stats().pruned == pruned
    points = points_of(table, "taskiq_sa_pg.pruned")
    assert {rows: point.value for rows, point in points.items()} == pruned
    first, _ = [span for span in spans_of(table) if span.name == f"prune {table}"]
    assert first.parent is not None
    assert first.parent.span_id == caller.get_span_context().span_id


async def test_the_listener_is_told(table: str, start_backend: BackendFactory) -> None:
    backend = await start_backend(table_name=table)
    assert backend.stats().listener == "idle"
    waiting = asyncio.ensure_future(backend.wait_result("1"))
    await asyncio.sleep(0)
    assert (backend.stats().listener, backend.stats().waiters) == ("connecting", 1)

    async def is_listening() -> bool:
        return backend.stats().listener == "listening"

    await eventually(is_listening)
    assert points_of(table, "taskiq_sa_pg.listener")[""].value == 1
    assert points_of(table, "taskiq_sa_pg.waiters")[""].value == 1
    await backend.set_result("1", result_of(1))
    await waiting
    assert backend.stats().waiters == 0
    await backend.shutdown()
    assert (backend.stats().listener, backend.stats().waiters) == ("idle", 0)


async def test_two_tables_never_mix(table: str, start_backend: BackendFactory) -> None:
    names = [f"{table}_{i}" for i in range(2)]
    one, two = [await start_backend(table_name=name) for name in names]
    await asyncio.gather(one.set_result("1", result_of(1)), two.set_result("1", result_of(1)))
    await two.set_result("2", result_of(1))
    counts = [points_of(name, "taskiq_sa_pg.batch.size")["set_result"].count for name in names]
    assert counts == [1, 2]
    assert [len(spans_of(name)) for name in names] == [1, 2]


def test_a_backend_that_is_gone_is_not_observed(table: str) -> None:
    backend: Backend = SQLAlchemyResultBackend("postgresql://", table_name=table)
    assert "set_result" in points_of(table, "taskiq_sa_pg.pending")
    gone = weakref.ref(backend)
    del backend
    gc.collect()
    assert gone() is None
    assert points_of(table, "taskiq_sa_pg.pending") == {}


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
import asyncio
from taskiq import TaskiqResult
from taskiq_sa_pg import SQLAlchemyResultBackend

async def main():
    backend = SQLAlchemyResultBackend(sys.argv[1], run_migrations=True, result_ttl=1)
    await backend.startup()
    result = TaskiqResult(is_err=False, return_value=1, execution_time=0.1)
    await asyncio.gather(*[backend.set_result(str(i), result) for i in range(10)])
    await backend.prune()
    print(backend.stats().operations["set_result"].calls)
    await backend.shutdown()

asyncio.run(main())
"""


async def test_without_opentelemetry_everything_works(database: Database) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WITHOUT, database.dsn), stdout=subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert (process.returncode, out) == (0, b"10\n")
