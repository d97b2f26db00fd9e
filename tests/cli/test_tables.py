"""How tables and fields look on a terminal, and in a pipe."""

import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta

import pytest

from taskiq_sa_pg.cli.tables import Cell, ago, say_fields, say_row, say_table
from tests.cli.conftest import Cli

HEADERS = ["finished at", "outcome", "seconds", "task", "task id", "error"]
NOW = datetime.now(UTC)
IDS = ["6f1c9a5266d94e2f8d1b7d0b7e44d1aa", "8f14e45f-ceea-467f-a34e-7a4b9c1f2d3e"]
ROWS: list[Sequence[Cell]] = [
    (NOW - timedelta(hours=3, minutes=9), "failed", "1.250", "shop.tasks:charge", IDS[0], "Oops"),
    (NOW - timedelta(days=2), "succeeded", "0.500", "shop.tasks:charge", IDS[1], None),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def on_terminal(draw: Callable[[], None]) -> str:
    with redirect_stdout(Terminal()) as shown:
        draw()
    return shown.getvalue()


def table(rows: Sequence[Sequence[Cell]] = ROWS) -> str:
    return on_terminal(lambda: say_table(HEADERS, rows, "nothing"))


@pytest.mark.parametrize("columns", [20, 60, 80])
def test_task_ids_are_never_cut_and_other_columns_yield(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    head, *lines = table().splitlines()
    assert "seconds" not in head
    assert len(lines) == 2
    for task_id, line in zip(IDS, lines, strict=True):
        assert f" {task_id} " in line
        assert "charge" not in line
    assert "shop." in lines[0] or columns < 80


def test_all_columns_with_values_are_shown_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    head, line = table(ROWS[1:]).splitlines()
    assert "seconds" in head
    assert "error" not in head, "there is none"
    assert "2 d ago" in line
    assert "shop.tasks:charge" in line


def test_outcomes_have_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[31mfailed" in table()
    assert "\x1b[32msucceeded" in table()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not {"\x1b[31m", "\x1b[32m"} & set(re.findall("\x1b\\[[0-9;]*m", table()))


def test_fields_have_exact_times_and_ages() -> None:
    fields = {"outcome": "failed", "finished_at": ROWS[0][0], "labels": {}, "worker": None}
    outcome, finished_at = on_terminal(lambda: say_fields(fields)).splitlines()
    assert outcome == "outcome:        \x1b[31mfailed\x1b[0m"
    assert finished_at.startswith(f"finished_at:    {NOW - timedelta(hours=3, minutes=9):%Y-%m-}")
    assert finished_at.endswith("+00:00 (3 h ago)")


def test_lines_that_follow_have_exact_times() -> None:
    at = ROWS[1][0]
    assert isinstance(at, datetime)
    line = on_terminal(lambda: say_row(HEADERS, ROWS[1]))
    assert line.startswith(at.isoformat(sep=" ", timespec="seconds"))


def test_in_a_pipe_everything_is_exact_and_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    say_table(HEADERS, ROWS, "nothing")
    say_fields({"finished_at": NOW, "outcome": "failed"})
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "ago" not in printed
    assert printed.count("shop.tasks:charge") == 2
    assert f"finished_at:    {NOW}\n" in printed


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "just now"),
        (1, "1 s ago"),
        (59.9, "59 s ago"),
        (60, "1 min ago"),
        (3_599, "59 min ago"),
        (7_200, "2 h ago"),
        (86_400 * 1_200, "1,200 d ago"),
        (-90, "in 1 min"),
    ],
)
def test_ages(seconds: float, words: str) -> None:
    assert ago(NOW - timedelta(seconds=seconds), NOW) == words


def test_where_there_is_nothing_a_pipe_stays_empty(cli: Cli) -> None:
    cli.ok("upgrade", "--queue")
    notes = {"list": "no results", "running": "nothing is running", "parked": "no parked tasks"}
    for command, text in notes.items():
        result = cli.run(command)
        assert (result.exit_code, result.stdout, result.stderr) == (0, "", f"{text}\n")
    assert cli.json("running") == []
    assert cli.json("parked") == []
