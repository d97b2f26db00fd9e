"""Alembic's commands on the broker's tables, alone and after those of results."""

import asyncio
import logging
import shlex
from pathlib import Path

import pytest

from taskiq_sa_pg import TableConfig
from taskiq_sa_pg.schema import QUEUE, RESULTS, Family
from taskiq_sa_pg.schema.migrate import provision, script_location
from tests.commands import run_taskiq_sa_pg
from tests.conftest import Database
from tests.migrations.applications import execute_script
from tests.migrations.conftest import (
    LONG_NAME,
    alembic,
    alembic_error,
    catalogue,
    opened,
    tables,
    with_password,
)

NAME = "taskiq_results"
ODD_NAME = "Wéird \"Re-sults\" 'n' 100%(:x) \\n user"

QUEUE_VERSION = f"{NAME}_queue_version"
NO_OPERATIONS = "No new upgrade operations detected.\n"

TRUE = ("-x", "queue=true")
ONLY = ("-x", "queue=only")


def all_of(table_name: str, *families: Family) -> list[str]:
    config = TableConfig(table_name)
    return sorted(
        name
        for each in families
        for name in (*each.table_names(config), each.version_table_name(config))
    )


async def test_both_families_go_up_and_down_one_after_the_other(database: Database) -> None:
    dsn = {"TASKIQ_SA_PG_DSN": with_password(database.dsn)}
    assert await alembic(*TRUE, "current", **dsn) == f"{NAME}_version:\n{QUEUE_VERSION}:\n"
    await alembic(*TRUE, "upgrade", "head", **dsn)
    assert await tables(database) == all_of(NAME, RESULTS, QUEUE)
    assert await alembic(*TRUE, "current", **dsn) == (
        f"{NAME}_version:\n0001 (head)\n{QUEUE_VERSION}:\n0001 (head)\n"
    )
    for option in (TRUE, ONLY, ()):
        assert await alembic(*option, "check", **dsn) == NO_OPERATIONS
    await alembic(*TRUE, "downgrade", "-1", **dsn)
    assert await tables(database) == [QUEUE_VERSION, f"{NAME}_version"]


async def test_neither_familys_commands_touch_the_other(database: Database) -> None:
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic(*ONLY, "upgrade", "head", **dsn)
    assert await tables(database) == all_of(NAME, QUEUE)
    assert await alembic("current", **dsn) == ""
    assert "not up to date" in await alembic_error(*TRUE, "check", **dsn)
    await alembic("upgrade", "head", **dsn)
    await alembic(*ONLY, "downgrade", "base", **dsn)
    assert await tables(database) == sorted([*all_of(NAME, RESULTS), QUEUE_VERSION])
    assert await alembic(*ONLY, "current", **dsn) == ""
    assert await alembic("current", **dsn) == "0001 (head)\n"
    await alembic(*ONLY, "stamp", "head", **dsn)
    await alembic("downgrade", "base", **dsn)
    assert await alembic(*ONLY, "current", **dsn) == "0001 (head)\n"


async def test_a_difference_counts_for_its_own_family(database: Database) -> None:
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic(*TRUE, "upgrade", "head", **dsn)
    await database.fetch(f"ALTER TABLE {NAME}_schedules DROP COLUMN cron")
    await database.fetch(f"DROP INDEX {NAME}_queue_available_at_idx")
    assert await alembic("check", **dsn) == NO_OPERATIONS
    message = await alembic_error(*TRUE, "check", **dsn)
    assert "add_column" in message
    assert "add_index" in message
    await alembic(*ONLY, "downgrade", "base", **dsn)
    await alembic(*ONLY, "upgrade", "head", **dsn)
    await database.fetch(f"ALTER TABLE {NAME} DROP COLUMN log")
    assert "add_column" in await alembic_error(*TRUE, "check", **dsn)
    assert await alembic(*ONLY, "check", **dsn) == NO_OPERATIONS


@pytest.mark.parametrize(
    ("name", "field"), [(ODD_NAME, "Uuid"), (LONG_NAME, "Text")], ids=["odd", "long"]
)
async def test_the_printed_sql_makes_the_same_tables(
    database: Database, other_database: Database, name: str, field: str
) -> None:
    options = (*TRUE, "-x", f"table_name={name}", "-x", f"field_for_task_id={field}")
    dsns = [{"TASKIQ_SA_PG_DSN": each.dsn} for each in (database, other_database)]
    await alembic(*options, "upgrade", "head", **dsns[0])
    await execute_script(other_database, await alembic(*options, "upgrade", "head", "--sql"))
    made = await catalogue(database, name, QUEUE)
    assert made
    assert made == await catalogue(other_database, name, QUEUE)
    assert await tables(database) == await tables(other_database) == all_of(name, RESULTS, QUEUE)
    for dsn in dsns:
        assert await alembic(*options, "check", **dsn) == NO_OPERATIONS
        assert (await alembic(*options, "current", **dsn)).count("0001 (head)") == 2
    script = await alembic(*options, "downgrade", "head:base", "--sql")
    await execute_script(other_database, script)
    for family in (RESULTS, QUEUE):
        assert await catalogue(other_database, name, family) == []


async def test_a_named_schema_gets_the_tables_and_a_clean_check(
    database: Database, other_database: Database
) -> None:
    for place in (database, other_database):
        options = (*TRUE, "-x", f"schema={place.schema}", "-x", f"dsn={database.dsn}")
        await alembic(*options, "upgrade", "head")
        assert await tables(place) == all_of(NAME, RESULTS, QUEUE)
        assert await alembic(*options, "check") == NO_OPERATIONS


async def test_the_choice_comes_from_option_variable_or_ini_file(
    database: Database, tmp_path: Path
) -> None:
    ini = tmp_path / "alembic.ini"
    ini.write_text(f"[alembic]\nscript_location = {script_location()}\nqueue = only\n")
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic("upgrade", "head", ini=ini, **dsn, TASKIQ_SA_PG_QUEUE="")
    assert await tables(database) == all_of(NAME, QUEUE)
    variable = await alembic("current", ini=ini, **dsn, TASKIQ_SA_PG_QUEUE="true")
    assert variable == f"{NAME}_version:\n{QUEUE_VERSION}:\n0001 (head)\n"
    none = ("-x", "queue=false", "current")
    assert await alembic(*none, ini=ini, **dsn, TASKIQ_SA_PG_QUEUE="true") == ""
    message = 'queue must be one of "false", "true", "only", not '
    assert f"{message}'yes'" in await alembic_error("-x", "queue=yes", "current")
    assert f"{message}'1'" in await alembic_error("current", TASKIQ_SA_PG_QUEUE="1")


@pytest.mark.parametrize("position", [1, 3], ids=["alembic", "taskiq-sa-pg"])
async def test_tables_that_are_gone_can_be_made_again_as_the_message_says(
    database: Database, position: int
) -> None:
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic(*TRUE, "upgrade", "head", **dsn)
    before = await catalogue(database, NAME, QUEUE)
    await database.fetch(f"DROP TABLE {NAME}_queue")
    message = await alembic_error(*ONLY, "downgrade", "base", **dsn)
    program, *arguments = shlex.split(message.split("`")[position])
    told = f"{QUEUE_VERSION} records version 0001, but tables were missing and were created again"
    told = f"{told}, empty: {NAME}_queue"
    if program == "alembic":
        assert told in await alembic(*arguments, **dsn)
    else:
        assert program == "taskiq-sa-pg"
        outcome = await asyncio.to_thread(run_taskiq_sa_pg, *arguments, env=dsn)
        assert told in outcome.output
    assert await catalogue(database, NAME, QUEUE) == before


async def test_tables_that_were_made_in_another_way_can_be_recorded_as_the_message_says(
    database: Database,
) -> None:
    """Without a word about those of results."""
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic(*ONLY, "upgrade", "head", **dsn)
    await database.fetch(f"DROP TABLE {QUEUE_VERSION}")
    message = await alembic_error(*TRUE, "upgrade", "head", **dsn)
    assert f"table or index of {NAME}_queue exists already" in message
    command = message.split("`")[1]
    assert command == "alembic -x queue=only stamp head"
    await alembic(*shlex.split(command)[1:], **dsn)
    assert await alembic(*TRUE, "check", **dsn) == NO_OPERATIONS


async def test_startup_provisions_the_broker_s_tables_alone(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It records them as the command does, and makes those again that were dropped."""
    config = TableConfig(NAME)
    async with opened(database.dsn) as opened_database:
        with caplog.at_level(logging.INFO):
            await provision(opened_database, config, family=QUEUE)
            await provision(opened_database, config, family=QUEUE)
        made = await catalogue(database, NAME, QUEUE)
        assert await tables(database) == all_of(NAME, QUEUE)
        await database.fetch(f"DROP TABLE {NAME}_queue, {NAME}_schedules")
        await provision(opened_database, config, family=QUEUE)
    assert [record.getMessage() for record in caplog.records] == [
        f"table {NAME}_queue: upgraded to version 0001",
        f"{QUEUE_VERSION} records version 0001, but tables were missing and were created again, "
        f"empty: {NAME}_queue, {NAME}_schedules",
    ]
    assert await catalogue(database, NAME, QUEUE) == made
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    assert await alembic(*ONLY, "check", **dsn) == NO_OPERATIONS
