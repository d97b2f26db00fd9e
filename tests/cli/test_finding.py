"""list: which results it finds, how it prints them, and how it follows new ones."""

import asyncio
import csv
import io
import json
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.cli.conftest import Cli, failure, success
from tests.conftest import Database, NewDatabase, eventually

StartBackend = Callable[..., Awaitable[SQLAlchemyResultBackend[Any]]]


async def store_some(backend: SQLAlchemyResultBackend[Any]) -> None:
    await backend.set_result("good", success(1, labels={"user": 42, "tenant": "a=b"}))
    await backend.set_result("bad", failure(ValueError("no luck")))


DETAILS = """
    UPDATE taskiq_results SET task_name = 'pack', worker = 'w1', args = '[42, "x"]',
        kwargs = '{"order_id": 7}', finished_at = now() - interval '3 hours' WHERE task_id = 'good'
"""


@pytest.fixture(scope="module")
def stored(new_database: NewDatabase) -> Iterator[Cli]:
    """For those that only read."""
    database = new_database()
    asyncio.run(database.create())
    cli = Cli(database.dsn)
    cli.store(store_some)
    cli.execute(DETAILS)
    yield cli
    asyncio.run(database.drop())


BOTH = ["bad", "good"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ((), BOTH),
        (("--errors",), ["bad"]),
        (("--since", "2h"), ["bad"]),
        (("--since", "1d"), BOTH),
        (("--since", "2020-01-01"), BOTH),
        (("--since", "2999-01-01"), []),
        (("--task-name", "pack"), ["good"]),
        (("--task-name", "pack", "--errors"), []),
        (("--worker", "w1"), ["good"]),
        (("--label", "user=42"), ["good"]),
        (("--label", "user=42", "--label", "tenant=a=b"), ["good"]),
        (("--label", "user=42", "--label", "tenant=a"), []),
        (("--arg", "x"), ["good"]),
        (("--arg", "7"), ["good"]),
        (("--arg", "=7"), ["good"]),
        (("--arg", "order_id=7"), ["good"]),
        (("--arg", "0=42", "--arg", "order_id=7"), ["good"]),
        (("--arg", "1=42"), []),
        (("--arg", "-1=x"), ["good"]),
    ],
)
def test_lists_are_filtered(stored: Cli, options: tuple[str, ...], found: list[str]) -> None:
    page = stored.json("list", *options)
    assert ([row["task_id"] for row in page["results"]], page["next"]) == (found, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--label", "user"), "--label user: use KEY=VALUE"),
        (("--label", "=42"), "--label =42: use KEY=VALUE"),
        (("--arg", "x", "--arg", "y"), "--arg x: use KEY=VALUE"),
        (("--arg", "0=1", "--arg", "0=2"), "--arg 0=2: 0 was given already"),
        (("--label", "a=1", "--label", "a=2"), "--label a=2: a was given already"),
        (("--after", "x"), "after must be the `next` of a page"),
        (("--json", "--csv"), "choose one"),
        (("--follow", "--json"), "try --jsonl"),
        (("--follow", "--after", "x"), "try --jsonl"),
        (("--since", "yesterday"), "use 30s"),
    ],
)
def test_what_cannot_be_is_refused(cli: Cli, options: tuple[str, ...], said: str) -> None:
    assert said in cli.fails("list", *options, status=2)


def test_pages_follow_each_other(stored: Cli) -> None:
    result = stored.run("list", "--limit", "1")
    [_, line] = result.stdout.splitlines()
    assert line.endswith("ValueError")
    _, _, after = result.stderr.rstrip().partition("there are more: --after ")
    page = stored.json("list", "--limit", "1", "--after", after)
    assert [row["task_id"] for row in page["results"]] == ["good"]
    assert page["next"] is None


def test_every_field_is_for_scripts(stored: Cli) -> None:
    lines = stored.ok("list", "--jsonl").splitlines()
    records = stored.json("list")["results"]
    assert list(map(json.loads, lines)) == records
    _, good = records
    assert (good["outcome"], good["task_name"], good["worker"]) == ("succeeded", "pack", "w1")
    assert good["labels"] == {"user": 42, "tenant": "a=b"}
    assert datetime.fromisoformat(good["finished_at"]).tzinfo == UTC
    bad, good_row = csv.DictReader(io.StringIO(stored.ok("list", "--csv")))
    assert (bad["error_type"], bad["task_name"], bad["outcome"]) == ("ValueError", "", "failed")
    assert list(good_row) == list(good)
    assert json.loads(good_row["labels"]) == good["labels"]
    assert good_row["finished_at"] == records[1]["finished_at"].replace("Z", "+00:00")


def test_no_name_makes_a_line_of_its_own(cli: Cli) -> None:
    cli.store(lambda backend: backend.set_result('x\n"\x1b[2J,y', success(1)))
    for option, lines in (("--csv", 2), ("--jsonl", 1)):
        printed = cli.ok("list", option)
        assert "\x1b" not in printed
        assert len(printed.splitlines()) == lines
    [row] = csv.DictReader(io.StringIO(cli.ok("list", "--csv")))
    assert row["task_id"] == r'x\n"\x1b[2J,y'


def test_no_cell_is_a_formula(cli: Cli) -> None:
    """A task id that only begins like one is left alone."""
    formulas = ["=cmd|' /C calc'!A0", '@SUM("x")', "-1+HYPERLINK(A1)", "+\n=f()"]
    names = ["-V1StGXR8_Z5", "f(x)", "=", "1-2!"]

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        for task_id in formulas + names:
            await backend.set_result(task_id, success(1))

    cli.store(store)
    rows = csv.DictReader(io.StringIO(cli.ok("list", "--csv")))
    expected = ["'" + text.replace("\n", "\\n") for text in formulas] + names
    assert sorted(row["task_id"] for row in rows) == sorted(expected)


class Following:
    """A `list --follow` in a process of its own."""

    def __init__(self, cli: Cli, *options: str) -> None:
        self.process: subprocess.Popen[str] = cli.start("list", "-f", "--jsonl", *options)

    def next(self) -> str:
        """The task of the line that it prints next."""
        assert self.process.stdout is not None
        task_id: str = json.loads(self.process.stdout.readline())["task_id"]
        return task_id

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.communicate(timeout=30) == ("", "")
        assert self.process.returncode == 130


async def test_new_results_are_followed(
    cli: Cli, database: Database, start_backend: StartBackend
) -> None:
    """Each comes once, those that were committed late too; and nothing is said of Ctrl-C."""
    backend = await start_backend()
    for number in range(3):
        await backend.set_result(f"old {number}", success(1))
    late = await asyncpg.connect(database.direct_dsn)
    transaction = late.transaction()
    await transaction.start()
    await late.execute(
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels) "
        "VALUES ('late', false, '', 1, '{}')"
    )
    following = Following(cli, "--limit", "2")
    assert [following.next() for _ in range(2)] == ["old 1", "old 2"]
    await backend.set_result("new", success(1))
    assert await asyncio.to_thread(following.next) == "new"
    await transaction.commit()
    await late.close()
    assert await asyncio.to_thread(following.next) == "late"
    # As one is that has waited for a lock.
    await database.fetch(
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels, "
        "finished_at) VALUES ('locked', false, '', 1, '{}', now() - interval '30 seconds')"
    )
    await backend.set_result("bad", failure(ValueError("no luck")))
    await backend.set_result("new", success(2))
    found = [await asyncio.to_thread(following.next) for _ in range(3)]
    assert found == ["locked", "bad", "new"]
    following.interrupt()


async def test_only_what_is_sought_is_followed(
    cli: Cli, database: Database, start_backend: StartBackend
) -> None:
    """With a listening connection to where --listen-dsn leads."""
    backend = await start_backend()
    await backend.set_result("other", success(1))
    await backend.set_result("first", success(1, labels={"user": 42}))
    listen_dsn = f"{database.direct_dsn}&application_name=listening"
    following = Following(cli, "--label", "user=42", "--listen-dsn", listen_dsn)
    assert await asyncio.to_thread(following.next) == "first"

    async def is_listening() -> bool:
        return await database.sessions("listening") != []

    await eventually(is_listening)
    await backend.set_result("another", success(1))
    await backend.set_result("second", success(1, labels={"user": "42"}))
    assert await asyncio.to_thread(following.next) == "second"
    following.interrupt()


def test_a_closed_pipe_ends_it_though_nothing_is_stored(cli: Cli) -> None:
    cli.store(store_some)
    process = cli.start("list", "--follow")
    assert process.stdout is not None
    assert [process.stdout.readline().split()[2:] for _ in range(2)] == [
        ["succeeded", "0.500", "good"],
        ["failed", "1.250", "bad", "ValueError"],
    ]
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 141
