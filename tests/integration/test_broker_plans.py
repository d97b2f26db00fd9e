"""How PostgreSQL executes the queue's statements: by indexes, however many tasks there are."""

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from sqlalchemy.dialects import postgresql

from taskiq_sa_pg.statements import (
    QueueRow,
    acknowledge_claims,
    claim_tasks,
    count_tasks,
    enqueue_tasks,
    park_claims,
    release_claims,
    release_parked,
    renew_claims,
    select_next_due,
    select_parked,
)
from tests.integration.brokers import Brokers, models_of

# Of each kind. With ten times as many the plans are the same, and there is more to lose by reading
# the whole table.
ROWS = 30_000

# Blocks that a statement for one row reads at most, and one for fifty: some twenty for each row
# that is changed. The table has a thousand, and its indexes as many.
MOST = {"claim 1": 100, "next due": 100}
MOST_OF_FIFTY = 1000

FILL = """
    INSERT INTO {queue} (task_id, queue_name, priority, available_at, task_name, message)
    SELECT to_char(i, 'FM0000000') || name, name, i % 10,
        now() + sign * interval '1 s' * i, 'task', ''
    FROM (VALUES ('waiting', -1), ('delayed', 1)) AS kinds (name, sign), generate_series(1, $1) AS i
"""


def statements(
    queue_name: str, held: list[asyncpg.Record]
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The statements of senders, workers and people, with their parameters."""
    queue = models_of().queue_table
    assert queue is not None
    claims = {
        "given_task_id": [row["task_id"] for row in held],
        "given_claim": [row["claim"] for row in held],
    }
    pairs = {
        "given_queue_name": [queue_name] * 10,
        "given_priority": list(range(9, -1, -1)),
        "given_unknown": ["unknown"],
    }
    claiming = {**pairs, "lease": 60.0, "given_worker": "me"}
    sent = [QueueRow(f"new-{i}", "default", 0, 0.0, 0, "task", b"") for i in range(50)]
    [(sending, rows)] = enqueue_tasks(queue).of(sent)
    chosen = {"given_queue_name": queue_name, "given_task_name": "task"}
    return {
        "claim 1": (claim_tasks(queue), {**claiming, "size": 1}),
        "claim 50": (claim_tasks(queue), {**claiming, "size": 50}),
        "next due": (select_next_due(queue), pairs),
        "renew": (renew_claims(queue), {**claims, "lease": 60.0}),
        "release": (release_claims(queue), {**claims, "delay": 0.0, "undelivered": 1}),
        "park": (park_claims(queue), claims),
        "acknowledge": (acknowledge_claims(queue), claims),
        "send": (sending, rows),
        "count": (count_tasks(queue), {"size": 20}),
        "parked": (select_parked(queue), {**chosen, "size": 20, "most": 50}),
        "release parked": (release_parked(queue), {**chosen, "size": 50}),
    }


def literal(value: Any) -> str:
    """As text, which PostgreSQL makes what the parameter is."""
    if isinstance(value, list | tuple):
        texts = (each.decode() if isinstance(each, bytes) else each for each in value)
        return "'{" + ",".join(f'"{each}"' for each in texts) + "}'"
    return f"'{value}'"


async def plan_of(
    connection: asyncpg.Connection, statement: Any, parameters: dict[str, Any], mode: str
) -> dict[str, Any]:
    """What a prepared statement does; it is rolled back."""
    compiled: Any = statement.compile(dialect=postgresql.asyncpg.dialect())  # type: ignore[no-untyped-call]
    given = {**compiled.params, **parameters}
    values = ", ".join(literal(given[name]) for name in compiled.positiontup)
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(f"SET LOCAL plan_cache_mode = {mode}")
        await connection.execute(f"PREPARE it AS {compiled}")
        explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE it"
        rows = await connection.fetch(f"{explain} ({values})")
        await connection.execute("DEALLOCATE it")
    finally:
        await transaction.rollback()
    plan: dict[str, Any] = json.loads(rows[0][0])[0]["Plan"]
    return plan


def scans_of(plan: dict[str, Any]) -> list[str]:
    """How tables are read: kind and table of each node that reads one."""
    own = [f"{plan['Node Type']} {plan['Relation Name']}"] if "Relation Name" in plan else []
    return own + [scan for child in plan.get("Plans", []) for scan in scans_of(child)]


@pytest.fixture
async def filled(brokers: Brokers) -> AsyncIterator[asyncpg.Connection]:
    """A connection; the table was last analysed when it was empty."""
    connection = await asyncpg.connect(brokers.database.direct_dsn)
    await connection.execute(f"ALTER TABLE {brokers.queue} SET (autovacuum_enabled = off)")
    await connection.execute(f"VACUUM ANALYZE {brokers.queue}")
    await connection.execute("SET synchronous_commit = off")
    await connection.fetch(FILL.format(queue=brokers.queue), ROWS)
    yield connection
    await connection.execute(f"TRUNCATE {brokers.queue}")
    await connection.execute(f"ALTER TABLE {brokers.queue} RESET (autovacuum_enabled)")
    await connection.close()


async def test_each_statement_reads_what_it_needs(
    filled: asyncpg.Connection, brokers: Brokers
) -> None:
    """With plans for its parameters and with generic ones, with statistics and without."""
    found = []
    for is_analysed in (False, True):
        if is_analysed:
            await filled.execute(f"ANALYZE {brokers.queue}")
        for mode in ("force_custom_plan", "force_generic_plan"):
            for queue_name in ("waiting", "delayed"):
                held = await filled.fetch(
                    f"SELECT task_id, claim FROM {brokers.queue} WHERE queue_name = $1 LIMIT 50",
                    queue_name,
                )
                for name, (statement, parameters) in statements(queue_name, held).items():
                    plan = await plan_of(filled, statement, parameters, mode)
                    read = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
                    case = f"{name}, {queue_name}, {mode}, analysed: {is_analysed}"
                    found.append((case, read, scans_of(plan)))
    for case, read, scans in found:
        assert not any(scan.startswith("Seq") for scan in scans), (case, scans)
        assert read <= MOST.get(case.partition(",")[0], MOST_OF_FIFTY), (case, read, scans)
