"""import-results: what comes over, what it tells of it, and that it may be ended at any moment."""

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import SQLAlchemyResultBackend
from tests.cli.conftest import Cli
from tests.conftest import Database, eventually
from tests.integration.old_tables import Old, assert_same, fill, fill_plainly, old_backend

StartBackend = Callable[..., Awaitable[SQLAlchemyResultBackend[Any]]]

IMPORT = ("import-results", "--from-table", "old")


def in_old(dsn: str, work: Callable[[Old], Awaitable[Any]], **options: Any) -> Any:
    """Makes a table of taskiq-postgres, and does something with its own backend on it."""

    async def do() -> Any:
        async with old_backend(dsn, **options) as old:
            return await work(old)

    return asyncio.run(do())


def report(rows: int, *, is_dry_run: bool = False, **counts: int) -> dict[str, int]:
    none = {"results": 0, "progress": 0, "already_there": 0, "unreadable": 0}
    return {"rows": rows, "is_dry_run": is_dry_run, **none, **counts}


@pytest.mark.parametrize("serializer", ["pickle", "json"])
async def test_everything_comes_over_once(
    serializer: str, cli: Cli, database: Database, start_backend: StartBackend
) -> None:
    ours = await start_backend()
    options = {"serializer": JSONSerializer()} if serializer == "json" else {}
    async with old_backend(database.dsn, **options) as old:
        with_result, with_progress = await fill(old)
        arguments = (*IMPORT, "--serializer", serializer)
        results, progress = len(with_result), len(with_progress)
        rows = len({*with_result, *with_progress})
        assert await asyncio.to_thread(cli.ok, *arguments, "--batch-size", "7") == (
            f"{rows:,} rows read: {results:,} results and {progress:,} progress imported, "
            "0 already in the tables, 0 skipped\n"
        )
        await assert_same(old, ours, with_result, with_progress)
        again = await asyncio.to_thread(cli.json, *arguments)
    assert again == report(rows, already_there=results + progress)


def test_a_dry_run_counts_and_stores_nothing(cli: Cli, database: Database) -> None:
    cli.ok("upgrade")
    in_old(database.dsn, lambda old: fill_plainly(old, 20))
    assert cli.json(*IMPORT, "--dry-run") == report(20, is_dry_run=True, results=20)
    assert "20 results and 0 progress would be imported" in cli.ok(*IMPORT, "--dry-run")
    assert cli.json(*IMPORT) == report(20, results=20)


def test_what_cannot_be_read_is_told_and_stays_for_another_run(
    cli: Cli, database: Database, tmp_path: Path
) -> None:
    cli.ok("upgrade")
    in_old(database.dsn, lambda old: fill_plainly(old, 3))
    result = cli.run(*IMPORT, "--serializer", "json", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == report(3, unreadable=3)
    told = [json.loads(line) for line in result.stderr.splitlines()]
    assert [each["task_id"] for each in told] == ["task-00000", "task-00001", "task-00002"]
    assert all(each["reason"].startswith("result: ") for each in told)

    left_out = tmp_path / "left out.jsonl"
    result = cli.run(*IMPORT, "--serializer", "json", "--errors-to", str(left_out))
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout.endswith("3 skipped\n")
    assert [json.loads(line) for line in left_out.read_text("utf-8").splitlines()] == told

    assert cli.json(*IMPORT, "--errors-to", str(left_out)) == report(3, results=3)
    assert left_out.read_text() == ""


def test_many_rows_that_cannot_be_read_for_one_reason_stop_it(
    cli: Cli, database: Database, tmp_path: Path
) -> None:
    cli.ok("upgrade")
    in_old(database.dsn, lambda old: fill_plainly(old, 25))
    left_out = tmp_path / "left out.jsonl"
    arguments = (*IMPORT, "--serializer", "json", "--errors-to", str(left_out))
    line = cli.fails(*arguments)
    assert "stopped: 20 rows could not be read for the same reason" in line
    assert "Is json the --serializer of the old table?" in line
    assert "--skip-all" in line
    assert len(left_out.read_text("utf-8").splitlines()) == 20

    result = cli.run(*arguments, "--skip-all", "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (1, report(25, unreadable=25))
    assert len(left_out.read_text("utf-8").splitlines()) == 25

    cli.fails("import-results", "--from-table", "none", "--errors-to", str(left_out))
    assert len(left_out.read_text("utf-8").splitlines()) == 25, "it has not even started"
    assert cli.json(*IMPORT) == report(25, results=25)


async def test_from_another_database_and_schema(
    cli: Cli, database: Database, other_database: Database, start_backend: StartBackend
) -> None:
    ours = await start_backend(table_name="Our results")
    async with old_backend(other_database.dsn) as old:
        await fill_plainly(old, 4)
    into = {"TASKIQ_SA_PG_TABLE_NAME": "Our results"}
    places = [
        ("--from-schema", other_database.schema),
        ("--from-dsn", other_database.dsn),
        ("--from-dsn", database.dsn, "--from-schema", other_database.schema),
    ]
    for place in places:
        found = await asyncio.to_thread(cli.json, *IMPORT, *place, env=into)
        assert found == report(4, results=4), place
        assert (await ours.get_result("task-00003")).return_value == 3
        await database.fetch('TRUNCATE "Our results"')


async def test_into_another_serializer(
    cli: Cli, database: Database, start_backend: StartBackend
) -> None:
    ours = await start_backend(field_for_payload="Jsonb")
    async with old_backend(database.dsn) as old:
        await fill_plainly(old, 2)
    env = {"TASKIQ_SA_PG_FIELD_FOR_PAYLOAD": "Jsonb", "TASKIQ_SA_PG_SERIALIZER": "orjson"}
    found = await asyncio.to_thread(cli.json, *IMPORT, "--serializer", "pickle", env=env)
    assert found == report(2, results=2)
    assert (await ours.get_result("task-00001")).return_value == 1


def test_errors_name_the_thing_and_the_remedy(cli: Cli, database: Database, tmp_path: Path) -> None:
    no_tables = cli.fails(*IMPORT)
    assert "upgrade" in no_tables
    cli.ok("upgrade")
    assert "table old does not exist: pass the exact name" in cli.fails(*IMPORT)
    ours = cli.fails("import-results", "--from-table", "taskiq_results")
    assert "is not a table of taskiq-postgres" in ours
    in_old(database.dsn, lambda old: fill_plainly(old, 1))
    for option in ("--serializer", "--to-serializer"):
        assert f": {option} yaml: " in cli.fails(*IMPORT, option, "yaml", status=2)
    unwritable = cli.fails(*IMPORT, "--errors-to", str(tmp_path / "no folder" / "file"), status=2)
    assert "--errors-to" in unwritable
    assert "No such file or directory" in unwritable
    elsewhere = cli.fails(*IMPORT, "--from-dsn", "postgresql://me:secret@127.0.0.1:1/old")
    assert "Connect call failed" in elsewhere
    assert "secret" not in elsewhere
    assert cli.run(*IMPORT, "--batch-size", "0").exit_code == 2
    assert cli.json(*IMPORT) == report(1, results=1)


async def test_ended_in_the_middle_it_is_run_again(
    cli: Cli, database: Database, start_backend: StartBackend
) -> None:
    ours = await start_backend()
    async with old_backend(database.dsn) as old:
        task_ids = await fill_plainly(old, 800)

        connection = await asyncpg.connect(database.dsn)
        stored = 0

        async def count() -> int:
            return int(await connection.fetchval("SELECT count(*) FROM taskiq_results"))

        async def has_begun() -> bool:
            return await count() > stored

        for end, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
            process = cli.start(*IMPORT, "--batch-size", "2")
            await eventually(has_begun, 30)  # a program that starts, on a busy machine
            process.send_signal(end)
            _, stderr = await asyncio.to_thread(process.communicate)
            assert (process.returncode, stderr) == (status, "")
            before, stored = stored, await count()
            assert before < stored < len(task_ids)
        await connection.close()

        again = await asyncio.to_thread(cli.json, *IMPORT)
        assert again == report(800, results=800 - stored, already_there=stored)
        await assert_same(old, ours, task_ids, [])


def test_on_a_terminal_a_bar_tells_how_far_it_is(cli: Cli, database: Database) -> None:
    cli.ok("upgrade")
    in_old(database.dsn, lambda old: fill_plainly(old, 30))
    reader, writer = os.openpty()
    with cli.start(*IMPORT, "--batch-size", "10", stdout=writer) as process:
        os.close(writer)
        shown = b""
        while chunk := _read(reader):
            shown += chunk
    os.close(reader)
    assert process.returncode == 0
    assert b"30/30" in shown
    assert b"30 rows read: 30 results" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # how a terminal ends on Linux
        return b""
