"""prune."""

from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.cli.conftest import Cli, failure, success
from tests.tasks import progress_of


async def store_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    for task_id in ("there", "expired 1", "expired 2"):
        await backend.set_result(task_id, success(1))
    await backend.set_result("expired 3", failure(ValueError("no")))
    for task_id in ("expired 1", "running", "left behind"):
        await backend.set_progress(task_id, progress_of(1))


@pytest.fixture
def expired(cli: Cli) -> Cli:
    cli.store(store_some)
    cli.execute(
        "UPDATE taskiq_results SET expires_at = now() - interval '1 s' WHERE task_id ~ 'expired';"
        "UPDATE taskiq_results_progress SET updated_at = now() - interval '1 h' "
        "WHERE task_id ~ 'left'",
    )
    return cli


def test_what_has_expired_is_counted_and_deleted(expired: Cli) -> None:
    assert expired.ok("prune", "--dry-run") == (
        "3 expired results, 0 stale progress and 0 stale status rows would be deleted\n"
    )
    assert expired.json("prune", "--dry-run", "--progress-ttl", "60") == {
        "results": 3,
        "progress": 1,
        "statuses": 0,
        "is_complete": True,
        "is_dry_run": True,
    }
    assert expired.json("stats")["expired"] == 3
    assert (
        expired.ok("prune")
        == "3 expired results, 0 stale progress and 0 stale status rows deleted\n"
    )
    shown = expired.json("stats")
    assert (shown["results"], shown["expired"], shown["progress"]) == (1, 0, 2)
    assert expired.ok("prune", env={"TASKIQ_SA_PG_PROGRESS_TTL": "60"}) == (
        "0 expired results, 1 stale progress and 0 stale status rows deleted\n"
    )


def test_a_limit_leaves_some(expired: Cli) -> None:
    assert expired.ok("prune", "--limit", "2") == (
        "2 expired results, 0 stale progress and 0 stale status rows deleted\n"
        "there may be more: run the command again\n"
    )
    pruned = expired.json("prune", "--time-budget", "60")
    assert (pruned["results"], pruned["is_dry_run"]) == (1, False)


def test_expired_results_are_shown_no_more(expired: Cli) -> None:
    assert "expired 1" in expired.fails("show", "expired 2").replace("expired 2", "expired 1")
    assert [row["task_id"] for row in expired.json("list")["results"]] == ["there"]
    shown = expired.json("stats")
    assert (shown["results"], shown["failures"], shown["expired"]) == (1, 0, 3)
    assert shown["oldest"] == shown["newest"]


@pytest.mark.parametrize("option", ["--time-budget", "--progress-ttl"])
def test_a_time_that_cannot_be_is_told(expired: Cli, option: str) -> None:
    assert f"{option} must be" in expired.fails("prune", option, "0", status=2)
