"""show, list and stats."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from taskiq import InMemoryBroker, TaskiqMessage
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskMetadataMiddleware, TaskStatus
from taskiq_sa_pg.cli.since import parse_since
from tests.cli.conftest import Cli, failure, success
from tests.conftest import NewDatabase


async def store_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_result("good", success({"a": (1, 2)}, labels={"queue": "fast"}))
    await backend.set_result("bad", failure(ValueError("no luck")))
    await backend.set_progress("good", TaskProgress(state="STARTED", meta={"percent": 50}))
    await backend.set_progress("running", TaskProgress(state="STARTED", meta=None))


@pytest.fixture(scope="module")
def stored(new_database: NewDatabase) -> Iterator[Cli]:
    """For those that only read."""
    database = new_database()
    asyncio.run(database.create())
    cli = Cli(database.dsn)
    cli.store(store_some)
    yield cli
    asyncio.run(database.drop())


def test_a_result_is_shown(stored: Cli) -> None:
    shown = stored.ok("show", "good")
    assert "return_value:   {'a': (1, 2)}\n" in shown
    assert "labels:         {'queue': 'fast'}\n" in shown
    assert "execution_time: 0.500 s\n" in shown
    assert "'percent': 50" in shown
    assert "error" not in shown


def test_a_failure_is_shown_with_its_traceback(stored: Cli) -> None:
    shown = stored.ok("show", "bad")
    assert "error:          ValueError('no luck')\n" in shown
    assert "Traceback (most recent call last):" in shown
    assert shown.endswith("ValueError: no luck\n")


def test_progress_without_a_result_is_shown(stored: Cli) -> None:
    assert stored.json("show", "running") == {
        "task_id": "running",
        "progress": {"state": "STARTED", "meta": None},
    }


def test_a_result_is_shown_to_scripts(stored: Cli) -> None:
    shown = stored.json("show", "good")
    assert shown["return_value"] == {"a": [1, 2]}
    assert shown["outcome"] == "succeeded"
    assert datetime.fromisoformat(shown["finished_at"]).tzinfo is not None
    assert stored.json("show", "bad")["error_type"] == "ValueError"


async def store_with_metadata(backend: SQLAlchemyResultBackend[Any]) -> None:
    middleware = TaskMetadataMiddleware(record_args=True, worker="worker 1")
    broker = InMemoryBroker().with_result_backend(backend)
    broker.add_middlewares(middleware)
    message = TaskiqMessage(task_id="1", task_name="add", labels={}, args=["ü"], kwargs={"b": 2})
    message = await middleware.pre_send(message)
    result = success(3)
    await middleware.post_execute(await middleware.pre_execute(message), result)
    await backend.set_result("1", result)


def test_what_is_known_of_the_task_is_shown(cli: Cli) -> None:
    cli.store(store_with_metadata)
    shown = cli.ok("show", "1")
    assert "task_name:      add\n" in shown
    assert "args:           ['ü']\n" in shown
    assert "kwargs:         {'b': 2}\n" in shown
    assert "worker:         worker 1\n" in shown
    shown_to_scripts = cli.json("show", "1", "--raw")
    assert (shown_to_scripts["args"], shown_to_scripts["kwargs"]) == (["ü"], {"b": 2})
    queued_at, started_at = (shown_to_scripts[name] for name in ("queued_at", "started_at"))
    assert datetime.fromisoformat(queued_at) <= datetime.fromisoformat(started_at)


def test_an_unknown_task_is_an_error(stored: Cli) -> None:
    assert "no result of task 'nobody'" in stored.fails("show", "nobody")


class Marker:
    """Leaves a trace when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_raw_unpickles_nothing(cli: Cli, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    cli.store(lambda backend: backend.set_result("x", success(Marker(trace))))
    assert "return_value:   b'" in cli.ok("show", "x", "--raw")
    assert not trace.exists()
    cli.ok("show", "x")
    assert trace.exists()


def test_what_cannot_be_decoded_is_said_beside_the_rest(stored: Cli) -> None:
    result = stored.run("show", "bad", "--serializer", "json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert "undecodable:" in result.stdout
    assert "ValueError: no luck" in result.stdout


def test_progress_that_cannot_be_decoded_is_said_too(cli: Cli) -> None:
    progress: TaskProgress[Any] = TaskProgress(state="STARTED", meta={1})
    cli.store(lambda backend: backend.set_progress("running", progress))
    result = cli.run("show", "running", "--serializer", "json", "--json")
    assert result.exit_code == 1
    assert "cannot decode" in json.loads(result.stdout)["progress"]["undecodable"]


def test_a_serializer_of_ones_own(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_serializer.py").write_text(
        "from taskiq.serializers import JSONSerializer\n"
        "made = JSONSerializer()\n"
        "def make(): return made\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    async def store(_: SQLAlchemyResultBackend[Any]) -> None:
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
            cli.dsn, serializer=JSONSerializer()
        )
        await backend.startup()
        await backend.set_result("x", success([1]))
        await backend.shutdown()

    cli.store(store)
    for name in ("own_serializer:made", "own_serializer:make", "json"):
        assert cli.json("show", "x", "--serializer", name)["return_value"] == [1]


def test_no_value_gives_orders_to_the_terminal(cli: Cli) -> None:
    odd = "\x1b[2J[bold]id"

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        await backend.set_result(odd, failure(ValueError("\x1b]0;title\x07[red]\u202e")))
        await backend.set_progress(odd, TaskProgress(state="\x1b[1m", meta=None))

    cli.store(store)
    for command in (["show", odd], ["list"], ["watch", odd]):
        printed = cli.run(*command).stdout
        assert not {"\x1b", "\x07", "\u202e"} & set(printed)
        assert "\\x1b[2J[bold]id" in printed


FORGED = "x\nforged:         1\r\u2028"


async def store_forged(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_status(TaskStatus(FORGED, "started", FORGED, 0, None, None, FORGED))
    await backend.set_progress(FORGED, TaskProgress(state=FORGED, meta=FORGED))
    await backend.set_status(TaskStatus("2", "started", "other", 1))


class Forging:
    def __repr__(self) -> str:
        return FORGED


def test_no_value_makes_a_row_of_its_own(cli: Cli) -> None:
    cli.store(store_forged, track="started")
    printed = [cli.ok(*command) for command in (["running"], ["status", FORGED])]
    cli.store(lambda backend: backend.set_result(FORGED, success(Forging())))
    cli.execute("UPDATE taskiq_results SET task_name = E'x\\nforged', worker = E'x\\nforged'")
    printed += [cli.ok(*command) for command in (["list"], ["show", FORGED], ["watch", FORGED])]
    for text in printed:
        assert "forged" in text
        assert not [line for line in text.splitlines() if line.startswith("forged")]


def test_a_traceback_is_the_last_that_is_shown(cli: Cli) -> None:
    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        await backend.set_result("x", failure(ValueError("no luck\nreturn_value:   1")))
        await backend.set_progress("x", TaskProgress(state="STARTED", meta=None))

    cli.store(store)
    fields, _, traceback = cli.ok("show", "x").partition("\n\n")
    assert "progress:" in fields
    assert "\nreturn_value:   1" not in fields
    assert traceback.endswith("ValueError: no luck\nreturn_value:   1\n")


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


class WithoutRepr:
    def __repr__(self) -> str:
        raise LookupError("no repr")


def store_all(*values: Any) -> Callable[[SQLAlchemyResultBackend[Any]], Awaitable[None]]:
    """By their number."""

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        for number, value in enumerate(values):
            await backend.set_result(str(number), success(value))

    return store


def test_what_json_cannot_hold_is_shown_to_scripts_all_the_same(cli: Cli) -> None:
    values, shown = zip(
        ([1.5, float("nan"), {"x": float("-inf")}], [1.5, "NaN", {"x": "-Infinity"}]),
        (CYCLE, "[[...]]"),
        ({frozenset([1]): 2}, "{frozenset({1}): 2}"),
        ({"good": [1], "bad": CYCLE}, {"good": [1], "bad": "[[...]]"}),
        ("\udc80", "\udc80"),
        strict=True,
    )
    cli.store(store_all(*values))

    def value_in(line: str) -> Any:
        return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
            "return_value"
        ]

    task_ids = [str(number) for number in range(len(values))]
    lines = [cli.ok("show", task_id, "--json") for task_id in task_ids]
    assert tuple(map(value_in, lines)) == shown
    lines = cli.ok("watch", *task_ids, "--json").splitlines()
    assert sorted(map(repr, map(value_in, lines))) == sorted(map(repr, shown))


@pytest.mark.parametrize("command", ["show", "watch"])
def test_a_value_that_cannot_be_shown_is_said(cli: Cli, command: str) -> None:
    cli.store(store_all(WithoutRepr(), 10**5000))
    for task_id, name in (("0", "WithoutRepr"), ("1", "int")):
        for options in ([], ["--json"]):
            assert f"<{name} that cannot be shown: " in cli.ok(command, task_id, *options)


def test_the_latest_are_listed_first(stored: Cli) -> None:
    assert [row["task_id"] for row in stored.json("list")["results"]] == ["bad", "good"]
    page = stored.json("list", "--limit", "1")
    assert [row["task_id"] for row in page["results"]] == ["bad"]
    page = stored.json("list", "--limit", "1", "--after", page["next"])
    assert ([row["task_id"] for row in page["results"]], page["next"]) == (["good"], None)
    header, *lines = stored.ok("list").splitlines()
    assert header.split() == ["finished", "at", "outcome", "seconds", "task", "task", "id", "error"]
    assert [line.split()[2:] for line in lines] == [
        ["failed", "1.250", "bad", "ValueError"],
        ["succeeded", "0.500", "good"],
    ]


def test_a_time_is_an_age_or_a_date() -> None:
    now = datetime.now(UTC)
    for text, age in [("90s", 90), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("1w", 604_800)]:
        assert abs(now - timedelta(seconds=age) - parse_since(text)) < timedelta(seconds=30)
    assert parse_since("2026-11-23T08:30+01:00") == datetime(2026, 11, 23, 7, 30, tzinfo=UTC)
    assert parse_since("2026-11-23").tzinfo is not None


@pytest.mark.parametrize("text", ["", "yesterday", "3x", "99999999999w", "-1h"])
def test_other_times_are_refused(cli: Cli, text: str) -> None:
    assert "use 30s" in cli.fails("list", f"--since={text}", status=2)


def test_tables_are_counted_and_measured(stored: Cli) -> None:
    shown = stored.json("stats")
    assert [shown[name] for name in ("results", "successes", "failures", "progress")] == [
        2,
        1,
        1,
        2,
    ]
    assert shown["oldest"] < shown["newest"]
    assert min(shown["bytes"].values()) > 0
    assert set(shown["bytes"]) == {
        "taskiq_results",
        "taskiq_results_progress",
        "taskiq_results_status",
        "taskiq_results_workers",
    }
    assert "failures:       1\n" in stored.ok("stats")


def test_a_partitioned_table_is_as_large_as_its_partitions(stored: Cli) -> None:
    before = stored.json("stats")["bytes"]
    stored.execute(
        "ALTER TABLE taskiq_results RENAME TO before; "
        "CREATE TABLE taskiq_results (LIKE before INCLUDING DEFAULTS, PRIMARY KEY (task_id)) "
        "PARTITION BY HASH (task_id); "
        "CREATE TABLE part PARTITION OF taskiq_results FOR VALUES WITH (MODULUS 1, REMAINDER 0); "
        "INSERT INTO taskiq_results SELECT * FROM before"
    )
    after = stored.json("stats")["bytes"]
    # Without the two other indexes.
    assert 0 < after.pop("taskiq_results") < before.pop("taskiq_results")
    assert after == before


def test_empty_tables_are_counted_too(cli: Cli) -> None:
    cli.ok("upgrade")
    shown = cli.json("stats")
    assert (shown["results"], shown["oldest"], shown["newest"]) == (0, None, None)
    assert cli.json("list") == {"results": [], "next": None}
