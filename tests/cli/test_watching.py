"""watch: what it prints while tasks run, and how it ends."""

import asyncio
import contextlib
import io
import json
import os
import pty
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from rich.console import Console
from taskiq.depends.progress_tracker import TaskProgress

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.cli import watching
from taskiq_sa_pg.cli.outcomes import Event
from taskiq_sa_pg.cli.watching import fraction_of, message_of
from tests.cli.conftest import Cli, failure, success
from tests.conftest import Database

StartBackend = Callable[..., Awaitable[SQLAlchemyResultBackend[Any]]]


async def test_changes_are_told_as_they_come(cli: Cli, start_backend: StartBackend) -> None:
    backend = await start_backend()
    meta = {"current": 1, "total": 4}
    await backend.set_progress("a", TaskProgress(state="STARTED", meta=meta))
    process = cli.start("watch", "a", "b", "a", "--json")

    def next_event() -> Any:
        assert process.stdout is not None
        return json.loads(process.stdout.readline())

    started = {"task_id": "a", "event": "progress", "state": "STARTED", "meta": meta}
    assert next_event() == started
    await backend.set_result("a", success((1, 2)))
    ended = {"task_id": "a", "event": "success", "return_value": [1, 2], "error": None}
    assert next_event() == ended
    await backend.set_result("b", failure(ValueError("no luck")))
    last = next_event()
    assert (last["task_id"], last["event"]) == ("b", "failure")
    assert "no luck" in str(last["error"])
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 1


def test_the_status_tells_of_success(cli: Cli) -> None:
    cli.store(lambda backend: backend.set_result("x", success(1)))
    assert cli.ok("watch", "x") == "x: success in 0.500 s: 1\n"


async def test_columns_of_the_applications_own_are_not_in_the_way(
    cli: Cli, start_backend: StartBackend, database: Database
) -> None:
    backend = await start_backend()
    await backend.set_result("x", success(1))
    await database.fetch("ALTER TABLE taskiq_results ADD tenant int NOT NULL DEFAULT 1")
    await database.fetch("ALTER TABLE taskiq_results ALTER tenant DROP DEFAULT")
    assert await asyncio.to_thread(cli.ok, "watch", "x") == "x: success in 0.500 s: 1\n"


def test_a_timeout_is_told(cli: Cli) -> None:
    cli.ok("upgrade")
    result = cli.run("watch", "x", "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (1, "x: not finished in time\n")
    result = cli.run("watch", "x", "--timeout", "0", "--json")
    assert json.loads(result.stdout) == {
        "task_id": "x",
        "event": "timeout",
        "reason": "not finished in time",
    }


def test_what_cannot_be_read_back_is_told(cli: Cli) -> None:
    cli.store(lambda backend: backend.set_result("x", success(1)))
    result = cli.run("watch", "x", "--serializer", "json")
    assert result.exit_code == 1
    assert "x: cannot decode the result of task 'x'" in result.stdout
    result = cli.run("watch", "x", "--json", "--serializer", "json")
    assert json.loads(result.stdout)["event"] == "trouble"


async def test_a_terminal_shows_bars(cli: Cli, start_backend: StartBackend) -> None:
    backend = await start_backend()
    await backend.set_progress(
        "half", TaskProgress(state="STARTED", meta={"percent": 50, "message": "packing"})
    )
    controller, terminal = pty.openpty()
    process = cli.start("watch", "half", "bad", stdout=terminal)
    os.close(terminal)
    screen = ""
    while "50%" not in screen:
        screen += os.read(controller, 10_000).decode(errors="replace")
    await backend.set_result("half", success(1))
    await backend.set_result("bad", failure(ValueError("no luck")))
    with contextlib.suppress(OSError):  # the end of a terminal, on Linux
        while chunk := os.read(controller, 10_000):
            screen += chunk.decode(errors="replace")
    os.close(controller)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 1
    assert "waiting" in screen, "from the start, each task has a row"
    assert "100%" in screen
    assert "packing" in screen
    assert "no luck" in screen


def test_a_failed_task_keeps_the_percentage_that_it_has_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If it has reported none, there is none, and no estimate in any case."""
    printed = io.StringIO()
    drawing = Console(file=printed, force_terminal=True, width=100)
    monkeypatch.setattr(watching, "console", lambda: drawing)
    with watching.rows_of(["half", "none", "whole"]) as show:
        for percent in (25, 50):
            fields = {"state": "STARTED", "meta": {"percent": percent}}
            show(Event("half", "progress", "", fields))
        for task_id, kind in (("half", "failure"), ("none", "timeout"), ("whole", "success")):
            show(Event(task_id, kind, kind))
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", printed.getvalue())
    rows = [line.split() for line in shown.splitlines()[-3:]]
    # Without the bars and the elapsed times.
    assert [[word for word in row if not re.search("[━:]", word)] for row in rows] == [
        ["half", "50%", "failed"],
        ["none", "timed", "out"],
        ["whole", "100%", "succeeded"],
    ]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"message": "packing", "percent": 50}, "packing"),
        ("packing", "packing"),
        ({"message": 5}, ""),
        ({"percent": 50}, ""),
        (None, ""),
    ],
)
def test_metadata_has_a_message(meta: Any, message: str) -> None:
    assert message_of(meta) == message


@pytest.mark.parametrize(
    ("meta", "fraction"),
    [
        ({"percent": 50}, 0.5),
        ({"percent": 250}, 1.0),
        ({"percent": -1}, 0.0),
        ({"current": 1, "total": 4, "unit": "rows"}, 0.25),
        ({"current": 1, "total": 0}, None),
        ({"current": "1", "total": 4}, None),
        ({"percent": "50"}, None),
        ({"percent": float("nan")}, None),
        (None, None),
        ([1, 2], None),
    ],
)
def test_metadata_fills_a_bar(meta: Any, fraction: float | None) -> None:
    assert fraction_of(meta) == fraction
