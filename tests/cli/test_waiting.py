"""wait and forget."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.cli.conftest import Cli, failure, success

StartBackend = Callable[..., Awaitable[SQLAlchemyResultBackend[Any]]]


async def store_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_result("good", success(1))
    await backend.set_result("bad", failure(ValueError("no luck")))
    await backend.set_progress("good", TaskProgress(state="STARTED", meta=None))


async def test_results_are_printed_when_they_are_stored(
    cli: Cli, start_backend: StartBackend
) -> None:
    backend = await start_backend()
    await backend.set_result("x", success(1))
    process = cli.start("wait", "y", "x", "x")
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "x: success in 0.500 s: 1\n"
    await backend.set_result("y", success("two"))
    assert await asyncio.to_thread(process.communicate) == ("y: success in 0.500 s: 'two'\n", "")
    assert process.returncode == 0
    assert await backend.is_result_ready("x")


def test_the_status_tells_failures_from_timeouts(cli: Cli) -> None:
    cli.store(store_some)
    in_no_time = "--timeout", "0"
    result = cli.run("wait", "bad", "good", *in_no_time)
    assert result.exit_code == 1
    assert "bad: failure after 1.250 s: ValueError('no luck')\n" in result.stdout
    result = cli.run("wait", "good", "none", *in_no_time)
    assert result.exit_code == 124
    assert "none: not finished in time\n" in result.stdout
    assert cli.run("wait", "bad", "none", *in_no_time).exit_code == 1
    assert cli.run("wait", "good", "--serializer", "json").exit_code == 1
    assert json.loads(cli.ok("wait", "good", "--json")) == {
        "task_id": "good",
        "event": "success",
        "return_value": 1,
        "error": None,
    }


def test_results_are_forgotten(cli: Cli) -> None:
    cli.store(store_some)
    assert cli.ok("forget", "good", "nobody", "good") == "1 result deleted\n"
    assert [each["task_id"] for each in cli.json("list")["results"]] == ["bad"]
    assert cli.json("stats")["progress"] == 0
    assert cli.json("forget", "good", "bad") == {"deleted": 1}
    assert "is not a UUID" in cli.fails("forget", "x", "--field-for-task-id", "Uuid", status=2)


def test_without_the_table_of_statuses_results_are_forgotten(cli: Cli) -> None:
    cli.store(store_some)
    cli.execute("DROP TABLE taskiq_results_status")
    assert cli.ok("forget", "good", "bad") == "2 results deleted\n"
