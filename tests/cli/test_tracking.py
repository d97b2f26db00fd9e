"""status and running."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskStatus
from tests.cli.conftest import Cli, failure, success

STARTED_AT = datetime.now(UTC) - timedelta(hours=1)


async def store_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_result("good", success(1))
    await backend.set_result("bad", failure(ValueError("no")))
    await backend.set_status(TaskStatus("waits", "queued", "build", 0, STARTED_AT))
    times = STARTED_AT, STARTED_AT + timedelta(seconds=1)
    await backend.set_status(TaskStatus("second", "started", "build", 1, *times, "us\x1b[1m"))
    await backend.set_status(TaskStatus("first", "started", None, 0, None, STARTED_AT))


@pytest.fixture
def tracked(cli: Cli) -> Cli:
    cli.store(store_some, track="started")
    return cli


def test_the_status_of_a_task_is_shown(tracked: Cli) -> None:
    states = {
        task_id: tracked.json("status", task_id)["state"]
        for task_id in ("good", "bad", "waits", "second", "nothing")
    }
    assert states == {
        "good": "succeeded",
        "bad": "failed",
        "waits": "queued",
        "second": "started",
        "nothing": "unknown",
    }
    assert tracked.ok("status", "waits").splitlines() == [
        "task_id:        waits",
        "state:          queued",
        "task_name:      build",
        "attempt:        0",
        f"queued_at:      {STARTED_AT}",
    ]
    assert tracked.json("status", "waits")["worker"] is None


def test_what_runs_is_listed(tracked: Cli) -> None:
    assert [each["task_id"] for each in tracked.json("running")] == ["first", "second"]
    assert [each["task_id"] for each in tracked.json("running", "--limit", "1")] == ["first"]
    head, first, second = tracked.ok("running").splitlines()
    assert head.split("  ")[0] == "started at"
    assert first.split()[-1] == "first"
    day, time, seconds, *cells = second.split()
    assert cells == ["1", "started", "build", "us\\x1b[1m", "second"]
    assert datetime.fromisoformat(f"{day} {time}") == times_of_second()
    assert 3599 <= float(seconds) < 7200


def times_of_second() -> datetime:
    return (STARTED_AT + timedelta(seconds=1)).replace(microsecond=0)


def test_without_the_table_results_are_known(tracked: Cli) -> None:
    """An application whose models have no StatusMixin has none, and the commands do not know."""
    tracked.execute("DROP TABLE taskiq_results_status")
    assert tracked.json("status", "good")["state"] == "succeeded"
    assert tracked.json("status", "waits")["state"] == "unknown"
    assert tracked.json("running") == []
    assert tracked.json("prune")["statuses"] == 0
