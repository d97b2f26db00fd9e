"""The overview's buckets: each has its place and its length, and the newest has only begun."""

from datetime import UTC, datetime, timedelta

import pytest

from taskiq_sa_pg.statements import Bucket, select_buckets
from taskiq_sa_pg.ui.overview import WINDOWS, Figures, read_figures
from taskiq_sa_pg.ui.site import Site
from tests.conftest import Database
from tests.ui.conftest import Backend, store

NOW = datetime(2030, 1, 2, 3, 30, tzinfo=UTC)


@pytest.mark.parametrize(("minutes", "counted"), [(600, 120), (30, 30), (0.2, 1)])
def test_a_rate_is_that_of_the_time_that_has_passed(minutes: float, counted: float) -> None:
    bucket = Bucket(NOW - timedelta(minutes=minutes), 5, 0, None, None)
    figures = Figures(WINDOWS["7d"], NOW, NOW, [bucket], bucket)
    assert figures.minutes_of(bucket) == counted


@pytest.mark.parametrize("name", WINDOWS)
async def test_buckets_follow_each_other_and_hold_what_finished_in_them(
    backend: Backend, tables: Database, name: str
) -> None:
    window = WINDOWS[name]
    ages = [timedelta(0), window.length / 2, window.length * 2]
    for age in ages:
        task_id = await store(backend, 1, execution_time=2.0, waited=4)
        await tables.fetch(
            "UPDATE taskiq_results SET finished_at = finished_at - $2::interval WHERE task_id = $1",
            *(task_id, age),
        )
    figures = await read_figures(Site(backend, None, False, "Tasks"), window)
    starts = [bucket.start for bucket in figures.buckets]
    assert starts == [figures.since + n * window.width for n in range(len(starts))]
    assert len(starts) * window.width == window.length
    assert starts[-1] is not None
    assert starts[-1] <= figures.now < starts[-1] + window.width
    assert figures.total.succeeded == sum(bucket.succeeded for bucket in figures.buckets) == 2
    assert figures.total.execution == [2.0, 2.0]
    assert figures.total.waiting == pytest.approx([4.0, 4.0])
    found = [n for n, bucket in enumerate(figures.buckets) if bucket.succeeded]
    assert len(starts) / 2 - 2 <= found[0] <= len(starts) / 2 + 1
    assert found[-1] >= len(starts) - 2


async def test_expired_results_and_empty_tables_count_nothing(
    backend: Backend, tables: Database
) -> None:
    await store(backend, 1)
    await tables.fetch("UPDATE taskiq_results SET expires_at = now() - interval '1 s'")
    figures = await read_figures(Site(backend, None, False, "Tasks"), WINDOWS["1h"])
    assert figures.total == Bucket(None, 0, 0, None, None)


async def test_the_statement_reads_the_window_alone(backend: Backend, tables: Database) -> None:
    await tables.fetch(
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels, "
        "finished_at) SELECT n::text, false, to_jsonb(repeat('x', 500)), 1, '{}', "
        "now() - interval '1 minute' * (60000 - n) FROM generate_series(1, 60000) n"
    )
    await tables.fetch("VACUUM (ANALYZE) taskiq_results")
    window = WINDOWS["6h"]
    parameters = {"since": NOW - window.length, "until": NOW, "width": window.width}
    async with backend.database.engine.connect() as connection:
        statement = select_buckets(backend.models)
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        compiled = statement.compile(connection.sync_engine)
        order = compiled.positiontup or []
        plan = await raw.driver_connection.fetch(
            f"EXPLAIN {compiled}", *(parameters[name] for name in order)
        )
    lines = " ".join(row[0] for row in plan)
    assert "taskiq_results_finished_at_idx" in lines
    assert "Seq Scan" not in lines
