"""workers and retry."""

import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from taskiq import InMemoryBroker

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware, TaskStatus
from tests.cli.conftest import Cli, success

INSERT = (
    "INSERT INTO taskiq_results_workers (worker, started_at, seen_at) VALUES "
    "('host:1', now() - interval '2 days', now() - interval '{0} s'), "
    "(E'us\\x1b[1m', now() - interval '2 days', now() - interval '{0} s')"
)


async def start_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_status(TaskStatus("1", "started", worker="host:1"))
    await backend.set_status(TaskStatus("2", "started", worker="gone"))


@pytest.fixture
def tracked(cli: Cli) -> Cli:
    cli.store(start_some, track="started")
    return cli


def test_workers_are_listed_and_the_status_says_whether_one_is_alive(tracked: Cli) -> None:
    result = tracked.run("workers")
    assert result.exit_code == 1
    assert 'track="started"' in result.stderr
    tracked.execute(INSERT.format(30))
    head, first, second = tracked.ok("workers").splitlines()
    assert head.split("  ")[0] == "worker"
    name, state, day, time, *_, running = first.split()
    assert (name, state, running) == ("host:1", "alive", "1")
    seen_at = datetime.fromisoformat(f"{day} {time}")
    assert timedelta(seconds=29) <= datetime.now(UTC) - seen_at < timedelta(seconds=60)
    assert second.split()[:2] == ["us\\x1b[1m", "alive"]
    worker, _ = tracked.json("workers")
    assert {**worker, "started_at": "", "seen_at": ""} == {
        "worker": "host:1",
        "started_at": "",
        "seen_at": "",
        "is_alive": True,
        "running": 1,
    }
    assert datetime.fromisoformat(worker["seen_at"]) > datetime.now(UTC) - timedelta(seconds=90)
    late = tracked.run("workers", "--max-age", "20")
    assert (late.exit_code, late.stdout.count(" silent ")) == (1, 2)
    tracked.execute("UPDATE taskiq_results_workers SET seen_at = now() - interval '61 s'")
    assert tracked.run("workers", "--json").exit_code == 1
    assert tracked.ok("workers", "--max-age", "120").count(" alive ") == 2
    assert tracked.run("workers", "--max-age", "1e300").exit_code == 2, "not that none is alive"


def test_lost_tasks_are_shown_as_such(tracked: Cli) -> None:
    tracked.execute(INSERT.format(0))
    tracked.execute("UPDATE taskiq_results_status SET updated_at = now() - interval '2 min'")
    assert tracked.json("status", "1")["state"] == "started"
    assert tracked.json("status", "2")["state"] == "lost"
    assert [each["state"] for each in tracked.json("running")] == ["started", "lost"]
    assert " lost " in tracked.ok("running")


def test_without_the_table_there_are_no_workers(tracked: Cli) -> None:
    tracked.execute("DROP TABLE taskiq_results_workers")
    assert tracked.run("workers", "--json").exit_code == 1
    assert tracked.json("status", "2")["state"] == "started"
    assert len(tracked.json("running")) == 2


BROKER = """
from taskiq import InMemoryBroker, TaskiqMiddleware
from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware

backend = SQLAlchemyResultBackend({dsn!r})
broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
broker.add_middlewares(TaskMetadataMiddleware(record_args=True))
no_broker = 42


@broker.task(task_name="add")
async def add(one, two):
    return one + two


class Down(InMemoryBroker):
    async def kick(self, message):
        raise ConnectionRefusedError("nobody listens")


class Away(InMemoryBroker):
    async def startup(self):
        raise ConnectionRefusedError("nobody listens")


class Nowhere(InMemoryBroker):
    async def kick(self, message):
        pass


class Refuses(TaskiqMiddleware):
    def pre_send(self, message):
        if message.labels["rerun_of"] == "task 2":
            raise PermissionError("not today")
        return message


down, away = Down(), Away()
picky = Nowhere().with_middlewares(Refuses())
"""


async def finish_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))

    @broker.task(task_name="add")
    async def add(one: int, two: int) -> int:
        raise ValueError

    for number in (1, 2):
        await add.kicker().with_task_id(f"task {number}").kiq(number, two=3)
    await backend.set_result("bare", success(1))


@pytest.fixture
def finished(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """With an application in the current folder."""
    cli.store(finish_some)
    (tmp_path / "app_to_retry.py").write_text(BROKER.format(dsn=cli.dsn))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "app_to_retry", raising=False)
    return cli


@pytest.mark.parametrize("env", [{}, {"TASKIQ_SA_PG_DSN": ""}], ids=["named", "the broker's"])
def test_tasks_are_sent_again_and_the_new_ids_are_printed(
    finished: Cli, env: dict[str, str]
) -> None:
    retry = "retry", "--broker", "app_to_retry:broker"
    new_ids = finished.ok(*retry, "task 1", "task 2", "task 1", env=env).splitlines()
    assert len(new_ids) == 2
    found = [finished.json("show", new_id) for new_id in new_ids]
    assert [(each["return_value"], each["labels"]) for each in found] == [
        (4, {"rerun_of": "task 1"}),
        (5, {"rerun_of": "task 2"}),
    ]
    result = finished.run(*retry, "task 1", "bare", "none", env=env)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    bare, none = result.stderr.splitlines()
    assert bare.startswith("taskiq-sa-pg: task 'bare' cannot be sent again: its name was not")
    assert none == "taskiq-sa-pg: no result of task 'none' in table taskiq_results"
    assert list(finished.json(*retry, "task 1", env=env)["sent"]) == ["task 1"]


def test_a_middleware_that_fails_hides_no_id_that_was_sent(finished: Cli) -> None:
    result = finished.run("retry", "--broker", "app_to_retry:picky", "task 1", "task 2", "--json")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    told = json.loads(result.stdout)
    assert list(told["sent"]) == ["task 1"]
    reason = "task 'task 2' could not be sent: PermissionError('not today')"
    assert told["failed"] == {"task 2": reason}


@pytest.mark.parametrize(
    ("broker", "status", "reason"),
    [
        ("nonsense", 2, "--broker nonsense: use module:attribute"),
        ("no_such_module:broker", 2, "No module named 'no_such_module'"),
        ("app_to_retry:nobody", 2, "has no attribute 'nobody'"),
        ("app_to_retry:no_broker", 2, "--broker app_to_retry:no_broker is not a taskiq broker: 42"),
        ("app_to_retry:down", 1, "'task 1' could not be sent: ConnectionRefusedError"),
        ("app_to_retry:away", 1, "could not be started: ConnectionRefusedError('nobody listens')"),
    ],
)
def test_a_broker_that_cannot_be_is_told(
    finished: Cli, broker: str, status: int, reason: str
) -> None:
    assert reason in finished.fails("retry", "task 1", "--broker", broker, status=status)
