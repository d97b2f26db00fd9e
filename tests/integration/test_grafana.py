"""The queries of docs/grafana, as Grafana's PostgreSQL source completes them, on real tables."""

import json
import re
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from taskiq_sa_pg import SQLAlchemyBroker
from tests.conftest import BackendFactory, Database

DIRECTORY: Final = Path(__file__).parents[2] / "docs" / "grafana"
PAGE: Final = DIRECTORY.parent / "how-to" / "other-screens.md"

FILL: Final = """
    INSERT INTO taskiq_results (
        task_id, is_err, return_value, error_type, execution_time, labels, task_name, worker,
        finished_at, queued_at, started_at
    )
    SELECT
        n, n % 5 = 0, '', CASE WHEN n % 5 = 0 THEN 'ValueError' END, n, '{}', 'task', 'w',
        now() - n * interval '1 second', now() - n * interval '1 second' - interval '3 seconds',
        now() - n * interval '1 second' - interval '2 seconds'
    FROM generate_series(1, 100) AS n;
    INSERT INTO taskiq_results_queue (task_id, task_name, message, available_at) VALUES
        ('waiting', 'task', '', now() - interval '90 seconds'),
        ('delayed', 'task', '', now() + interval '1 hour'),
        ('parked', 'task', '', 'infinity');
    -- Where the models have no such table.
    CREATE TABLE IF NOT EXISTS taskiq_results_workers (
        worker text PRIMARY KEY, started_at timestamptz DEFAULT now(),
        seen_at timestamptz DEFAULT now()
    );
    INSERT INTO taskiq_results_workers (worker, seen_at)
    VALUES ('alive', now()), ('gone', now() - interval '5 minutes');
"""


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DIRECTORY / "dashboard.json").read_text("utf-8"))
    return loaded


def completed(text: str) -> str:
    """The query as Grafana sends it, for the last hour and points of one minute.

    https://grafana.com/docs/grafana/latest/datasources/postgres/#macros
    """
    for variable in dashboard()["templating"]["list"]:
        text = text.replace(f"${{{variable['name']}}}", variable["query"])
    text = text.replace("$__interval_ms", "60000").replace("$__interval", "1m")
    text = re.sub(
        r"\$__timeFilter\((\w+)\)", r"\1 BETWEEN now() - interval '1 hour' AND now()", text
    )
    text = re.sub(
        r"\$__timeGroupAlias\((\w+), 1m\)",
        r'floor(extract(epoch FROM \1) / 60) * 60 AS "time"',
        text,
    )
    assert "$" not in text, f"a macro that nobody completes: {text}"
    return text


@pytest.fixture
async def connection(database: Database, start_backend: BackendFactory) -> Any:
    """As the role of the guide, which may not read any payload; all is rolled back."""
    await start_backend()
    broker = SQLAlchemyBroker(database.dsn, run_migrations=True)
    await broker.startup()
    await broker.shutdown()
    connection = await asyncpg.connect(database.direct_dsn)
    await connection.execute(FILL)
    transaction = connection.transaction()
    await transaction.start()
    [grants] = re.findall(
        r"```sql\n(CREATE ROLE grafana.+?)```", PAGE.read_text("utf-8"), re.DOTALL
    )
    role = f"grafana_{database.schema}"
    await connection.execute(re.sub(r"\bgrafana\b", role, grants))
    await connection.execute(f"GRANT USAGE ON SCHEMA {database.schema} TO {role}")
    await connection.execute(f"SET LOCAL ROLE {role}")
    yield connection
    await transaction.rollback()
    await connection.close()


async def test_every_panel_shows_something(connection: asyncpg.Connection) -> None:
    shown = {}
    for panel in dashboard()["panels"]:
        [target] = panel["targets"]
        rows = await connection.fetch(completed(target["rawSql"]))
        assert rows, panel["title"]
        if target["format"] == "time_series":
            assert "time" in dict(rows[0]), panel["title"]
        shown[panel["title"]] = [tuple(row) for row in rows]
    assert shown["Waiting"] == [(1,)]
    assert 90 <= shown["Oldest waiting"][0][0] < 600
    assert shown["Parked"] == [(1,)]
    assert shown["Workers alive"] == [(1,)]
    per_minute = shown["Finished tasks per minute"]
    counts = {
        metric: sum(row[2] for row in per_minute if row[1] == metric)
        for metric in ("failed", "succeeded")
    }
    assert counts == {"failed": 20, "succeeded": 80}
    assert all(p50 <= p95 for _, p50, p95 in shown["Execution time"])
    assert {row[1:] for row in shown["Waiting time"]} == {(1.0, 1.0)}
    [failures] = shown["Failures by task"]
    assert failures[:3] == ("task", "ValueError", 20)
    assert len(shown["Latest failures"]) == 20


async def test_every_rule_tells_one_number(connection: asyncpg.Connection) -> None:
    file = json.loads((DIRECTORY / "alerts.json").read_text("utf-8"))
    [group] = file["groups"]
    found = {}
    for rule in group["rules"]:
        query, threshold = rule["data"]
        assert rule["condition"] == threshold["refId"]
        assert threshold["model"]["expression"] == query["refId"]
        [row] = await connection.fetch(completed(query["model"]["rawSql"]))
        [found[rule["uid"]]] = row
    assert found["taskiq-failures"] == 20.0
    assert found["taskiq-waiting"] >= 90
    assert (found["taskiq-parked"], found["taskiq-workers"]) == (1.0, 1.0)


async def test_the_role_of_the_guide_reads_no_payload(connection: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.fetch("SELECT return_value FROM taskiq_results")


def test_no_two_panels_share_a_place() -> None:
    panels = dashboard()["panels"]
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert len({p["id"] for p in panels}) == len(panels)
