"""How the command ends when it cannot do what was asked."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import taskiq_sa_pg
from tests.cli.conftest import PROGRAM, Cli, success

COMMANDS = ["upgrade", "current", "check", "list", "stats", "show x", "watch x", "downgrade base"]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_database_the_remedy_is_told(cli: Cli, command: str) -> None:
    line = cli.fails(*command.split(), env={"TASKIQ_SA_PG_DSN": ""}, status=2)
    assert line == (
        "taskiq-sa-pg: no database: set TASKIQ_SA_PG_DSN, or pass --dsn postgresql://..."
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_no_password_is_shown(cli: Cli, command: str) -> None:
    dsn = "postgresql://user:se-cret@127.0.0.1:1/database"
    result = cli.run(*command.split(), "--dsn", dsn)
    assert result.exit_code == 1
    assert "no connection to PostgreSQL" in result.stderr
    assert "se-cret" not in result.output


@pytest.mark.parametrize("command", ["list", "stats", "show x", "watch x"])
def test_tables_that_are_missing_are_named_with_the_remedy(cli: Cli, command: str) -> None:
    line = cli.fails(*command.split())
    assert "create the tables of this name and schema with `alembic upgrade head` or " in line
    assert " or `taskiq-sa-pg upgrade`; the broker's with " in line
    assert line.endswith("`alembic -x queue=true upgrade head` or `taskiq-sa-pg upgrade --queue`")


def test_a_name_that_cannot_work_is_refused(cli: Cli) -> None:
    assert "PostgreSQL truncates names to 63" in cli.fails(
        "upgrade", "--table-name", "x" * 64, status=2
    )


def test_an_unknown_serializer_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    cli.store(lambda backend: backend.set_result("x", success(1)))
    for name, reason in {
        "nonsense": "the serializers are pickle, json",
        "no.such.module:serializer": "No module named",
        "json:nothing": "has no attribute",
        "os:getcwd": "is not a TaskiqSerializer",
        "os:path": "is not callable",
        "json:loads": "missing 1 required positional argument",
        ".relative:name": "relative import",
    }.items():
        assert reason in cli.fails("show", "x", "--serializer", name, status=2)


def test_a_wrong_command_line_has_another_status(cli: Cli) -> None:
    assert cli.run("show").exit_code == 2
    assert cli.run("list", "--limit", "0").exit_code == 2
    assert cli.run("upgrade", "--field-for-task-id", "Serial").exit_code == 2
    for command in ("show", "status", "watch"):
        no_uuid = cli.fails(command, "x", "--field-for-task-id", "Uuid", status=2)
        assert "task id 'x' is not a UUID" in no_uuid
    assert "dsn cannot be parsed" in cli.fails("check", "--dsn", "nonsense", status=2)


def test_no_error_gives_orders_to_the_terminal(cli: Cli) -> None:
    line = cli.fails("list", "--schema", "\x1b[2J")
    assert '"\\x1b[2J' in line
    assert "\x1b" not in line


def test_no_warning_gives_orders_to_the_terminal(cli: Cli, tmp_path: Path) -> None:
    cli.store(lambda backend: backend.set_result("x", success(1)))
    (tmp_path / "odd.py").write_text(
        "import logging\n"
        "from taskiq.serializers import PickleSerializer as make\n"
        "logging.getLogger('taskiq_sa_pg').warning('it said %s', '\x1b[2J')\n"
    )
    process = cli.start("show", "x", "--serializer", "odd:make", cwd=tmp_path)
    assert process.communicate(timeout=30)[1] == "taskiq-sa-pg: it said \\x1b[2J\n"
    assert process.returncode == 0


def test_without_a_standard_output_the_remedy_is_told(cli: Cli) -> None:
    outcome = subprocess.run(
        ["sh", "-c", f"exec '{PROGRAM}' check --json >&-"],
        env={**os.environ, **cli.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr == (
        "taskiq-sa-pg: standard output is closed: redirect it to /dev/null if you do not need it\n"
    )


def test_an_interruption_is_quiet(cli: Cli) -> None:
    cli.store(lambda backend: backend.set_result("x", success(1)))
    process = cli.start("watch", "x", "unfinished")
    assert process.stdout is not None
    assert process.stdout.readline() == "x: success in 0.500 s: 1\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_closed_pipe_is_quiet_and_ends_a_watch(cli: Cli) -> None:
    # More than a pipe holds, of which nothing is read.
    cli.store(lambda backend: backend.set_result("x", success("x" * 1_000_000)))
    process = cli.start("watch", "x", "unfinished")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_full_disk_is_told_in_one_line(cli: Cli) -> None:
    cli.store(lambda backend: backend.set_result("x", success(1)))
    with Path("/dev/full").open("w") as full:
        process = cli.start("list", stdout=full.fileno())
        assert process.communicate(timeout=30)[1] == "taskiq-sa-pg: No space left on device\n"
    assert process.returncode == 1


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_remedy_is_told(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = f"raise ModuleNotFoundError('no {missing}', name='{missing}')"
    (tmp_path / f"{missing}.py").write_text(absent)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(taskiq_sa_pg, "cli", taskiq_sa_pg.cli)
    for name in [name for name in sys.modules if name.startswith(("taskiq_sa_pg.cli", missing))]:
        monkeypatch.delitem(sys.modules, name)
    cli = importlib.import_module("taskiq_sa_pg.cli")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (
        "taskiq-sa-pg needs the extra `cli`: pip install 'taskiq-sa-pg[cli]'"
    )


def test_help_lists_the_commands(cli: Cli) -> None:
    printed = cli.ok("--help", env={"COLUMNS": "80"})
    usage, *lines = printed.splitlines()
    assert usage.endswith("...")
    assert not [line for line in lines if line.endswith("...")]
    commands = "upgrade downgrade current check sql show list stats status running prune watch "
    commands += "import-results forget wait"
    for command in commands.split():
        assert f"  {command} " in printed


WITHOUT_THE_REST = """
import sys
sys.argv = ["taskiq-sa-pg", "{option}"]
from taskiq_sa_pg.__main__ import main
try:
    main()
finally:
    slow = {{"alembic", "asyncpg", "sqlalchemy", "taskiq"}} & sys.modules.keys()
    assert not slow, slow
"""


def test_help_imports_nothing_that_is_slow() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_REST.format(option="--help")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_package_is_a_command_too() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "taskiq_sa_pg", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == f"taskiq-sa-pg {taskiq_sa_pg.__version__}\n"


def test_a_number_that_postgresql_cannot_hold_is_refused(cli: Cli) -> None:
    for command in ("running", "prune", "queue", "parked"):
        result = cli.run(command, "--limit", "2147483648")
        assert result.exit_code == 2
        assert "Invalid value for '--limit'" in result.stderr
