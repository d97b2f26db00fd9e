"""Alembic's commands on our own migrations."""

import asyncio
import io
import shlex
import uuid
from pathlib import Path
from typing import Any

import pytest
from alembic.config import CommandLine
from alembic.util import CommandError

from taskiq_sa_pg import TableConfig
from taskiq_sa_pg.database import parse_dsn
from taskiq_sa_pg.schema.migrate import script_location
from taskiq_sa_pg.schema.partitions import statements_to_partition
from tests.commands import run_alembic
from tests.conftest import BackendFactory, Database
from tests.migrations.applications import execute_script
from tests.migrations.conftest import (
    LONG_NAME,
    PASSWORD,
    ROOT,
    alembic,
    alembic_error,
    catalogue,
    tables,
    with_password,
)
from tests.tasks import result_of

NAME = "taskiq_results"
ODD_NAME = "Wéird \"Re-sults\" 'n' 100%(:x) \\n user"

FOREIGN_TABLE = "(task_id VARCHAR UNIQUE, kept TEXT)"


def all_of(table_name: str) -> list[str]:
    config = TableConfig(table_name)
    return sorted([*config.table_names, config.version_table_name])


async def test_upgrade_current_check_and_downgrade_work_on_the_database_of_the_variable(
    database: Database,
) -> None:
    environment = {"TASKIQ_SA_PG_DSN": with_password(database.dsn)}
    await alembic("upgrade", "head", **environment)
    assert await tables(database) == all_of(NAME)
    assert "0001 (head)" in await alembic("current", **environment)
    assert "No new upgrade operations detected." in await alembic("check", **environment)
    await database.fetch(f"ALTER TABLE {NAME} ALTER error_type TYPE varchar(9)")
    assert "error_type" in await alembic_error("check", **environment)
    await alembic("downgrade", "-1", **environment)
    assert await tables(database) == [f"{NAME}_version"]


async def test_heads_and_history_need_no_database() -> None:
    assert await alembic("heads") == "0001 (head)\n"
    assert "<base> -> 0001 (head), " in await alembic("history")


@pytest.mark.parametrize("name", [ODD_NAME, LONG_NAME], ids=["odd", "long"])
async def test_odd_names_work_in_every_command_and_in_the_backend(
    database: Database, other_database: Database, start_backend: BackendFactory, name: str
) -> None:
    """The printed SQL, applied by hand, makes the same tables as the command."""
    options = ("-x", f"table_name={name}", "-x", "field_for_payload=Jsonb")
    dsn = ("-x", f"dsn={database.dsn}")
    await alembic(*options, *dsn, "upgrade", "head")
    await execute_script(other_database, await alembic(*options, "upgrade", "head", "--sql"))
    made = await catalogue(database, name)
    assert made
    assert made == await catalogue(other_database, name)
    assert await tables(database) == await tables(other_database) == all_of(name)
    await alembic(*options, *dsn, "check")
    await alembic(*options, "check", TASKIQ_SA_PG_DSN=other_database.dsn)
    backend = await start_backend(table_name=name, field_for_payload="Jsonb", run_migrations=False)
    assert not await backend.is_result_ready("1")
    await alembic(*options, *dsn, "downgrade", "base")
    downgrade_sql = await alembic(*options, "downgrade", "head:base", "--sql")
    await execute_script(other_database, downgrade_sql)
    for left in (database, other_database):
        assert await catalogue(left, name) == []
    again = await start_backend(table_name=name, field_for_payload="Jsonb", run_migrations=True)
    assert await catalogue(database, name) == made
    waiting = asyncio.create_task(again.wait_result("1", timeout=5))
    await again.set_result("1", result_of(7))
    assert (await waiting).return_value == 7


async def test_a_table_in_partitions_is_as_it_should_be_and_can_be_dropped(
    database: Database, start_backend: BackendFactory
) -> None:
    name = ODD_NAME
    options = ("-x", f"table_name={name}", "-x", f"dsn={database.dsn}")
    await alembic(*options, "upgrade", "head")
    await execute_script(database, ";".join(statements_to_partition(TableConfig(name))))
    assert len(await tables(database)) == len(all_of(name)) + 1
    assert "No new upgrade operations" in await alembic(*options, "check")
    await start_backend(table_name=name, run_migrations=True)
    await alembic(*options, "downgrade", "base")
    assert await tables(database) == [TableConfig(name).version_table_name]


async def test_options_win_over_variables_and_variables_over_the_ini_file(
    database: Database, tmp_path: Path
) -> None:
    ini = tmp_path / "alembic.ini"
    ini.write_text(
        f"[alembic]\nscript_location = {script_location()}\ntable_name = from_ini\n"
        "field_for_task_id = Text\nfield_for_payload = Jsonb\n"
    )
    await alembic(
        *("-x", f"dsn={database.dsn}", "-x", "table_name=from_x=y", "upgrade", "head"),
        ini=ini,
        TASKIQ_SA_PG_DSN="postgresql://nowhere.invalid/x",
        TASKIQ_SA_PG_TABLE_NAME="from_variable",
        TASKIQ_SA_PG_FIELD_FOR_TASK_ID="Uuid",
        TASKIQ_SA_PG_FIELD_FOR_PAYLOAD="",
    )
    assert await tables(database) == all_of("from_x=y")
    found = await catalogue(database, "from_x=y")
    assert ("from_x=y", "task_id", "uuid", True, None) in found
    assert ("from_x=y", "return_value", "jsonb", True, None) in found


async def test_an_option_that_cannot_work_is_named() -> None:
    messages = {
        "tabel_name=a": "unknown option -x tabel_name; the options are dsn, table_name",
        "field_for_task_id=Int": "field_for_task_id must be one of",
        "table_name=": "table_name must not be empty",
        f"table_name={'x' * 64}": "64 bytes long",
        "dsn=": "which database?",
        f"postgresql://u:{PASSWORD}@h/db?a=b": "unknown option -x postgresql;",
        f"dsn=postgresql://u:{PASSWORD}@h:port/db": "dsn cannot be parsed",
        f"dsn=mysql://u:{PASSWORD}@h/db": "use postgresql://",
    }
    for option, message in messages.items():
        assert message in await alembic_error("-x", option, "current")


def test_sql_for_a_name_that_alembic_would_change_is_refused() -> None:
    printed = io.StringIO()
    with pytest.raises(CommandError, match="a name with a tab"):
        run_alembic("-x", "table_name=a\tb", "upgrade", "head", "--sql", printed=printed)
    assert printed.getvalue() == ""


async def test_two_results_tables_in_one_database_do_not_know_of_each_other(
    database: Database,
) -> None:
    one = {"TASKIQ_SA_PG_DSN": database.dsn, "TASKIQ_SA_PG_TABLE_NAME": "one"}
    two = {**one, "TASKIQ_SA_PG_TABLE_NAME": "two", "TASKIQ_SA_PG_FIELD_FOR_TASK_ID": "Uuid"}
    await alembic("upgrade", "head", **one)
    await alembic("upgrade", "head", **two)
    assert await tables(database) == all_of("one") + all_of("two")
    await alembic("check", **one)
    await alembic("downgrade", "base", **two)
    assert await tables(database) == [*all_of("one"), "two_version"]


async def test_a_named_schema_gets_the_tables_and_a_clean_check(
    database: Database, other_database: Database
) -> None:
    """Also where it is the default one, and where another schema has tables of these names."""
    own, other = (
        ("-x", f"schema={schema}", "-x", f"dsn={database.dsn}")
        for schema in (database.schema, other_database.schema)
    )
    await alembic(*own, "upgrade", "head")
    await alembic(*other, "upgrade", "head")
    assert await tables(database) == await tables(other_database) == all_of(NAME)
    await other_database.fetch(f"ALTER TABLE {NAME} DROP COLUMN log")
    await alembic(*own, "check")
    assert "add_column" in await alembic_error(*other, "check")


async def upgrade_error(dsn: str, *options: str) -> str:
    return await alembic_error(*options, "-x", f"dsn={dsn}", "upgrade", "head")


async def test_a_missing_database_or_schema_is_to_be_created(database: Database) -> None:
    name = f"absent_{uuid.uuid4().hex}"
    no_database = await upgrade_error(with_password(database.dsn, database=name))
    [(host, port)] = parse_dsn(database.dsn).hosts
    place = f'"{name}" does not exist (at {host}:{port or 5432}); create the database'
    assert f"{place} first (`createdb" in no_database
    no_database = await upgrade_error(with_password(database.psycopg_dsn, database=name))
    assert f"{place}, or correct" in no_database
    no_schema = await upgrade_error(with_password(database.dsn), "-x", f"schema={name}")
    assert f'"{name}" does not exist; create the schema first' in no_schema


def test_a_server_that_is_not_there_is_named_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Alembic tells it so, and shows the traceback of all other errors."""
    ini = tmp_path / "alembic.ini"
    ini.write_text(f"[alembic]\nscript_location = {script_location()}\n")
    dsn = with_password("postgresql://postgres@127.0.0.1:1/x")
    with pytest.raises(SystemExit):
        CommandLine().main(["-c", str(ini), "-x", f"dsn={dsn}", "upgrade", "head"])
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert PASSWORD not in printed
    assert printed.strip().startswith("FAILED: ")
    assert "no connection to PostgreSQL" in printed
    assert "127.0.0.1" in printed


async def test_a_role_that_may_not_create_tables_is_told_what_to_grant(
    database: Database, role: str
) -> None:
    message = await upgrade_error(with_password(database.dsn, username=role))
    assert "permission denied for schema" in message
    assert "GRANT USAGE, CREATE ON SCHEMA" in message


async def rows_of(database: Database, table: str) -> list[Any]:
    return await database.fetch(f"SELECT * FROM {table}")


@pytest.mark.parametrize("table", [NAME, f"{NAME}_progress"])
async def test_a_foreign_table_of_the_same_name_is_left_untouched(
    database: Database, table: str
) -> None:
    await database.fetch(f"CREATE TABLE {table} {FOREIGN_TABLE}")
    await database.fetch(f"INSERT INTO {table} VALUES ('1', 'kept')")
    before = await catalogue(database), await rows_of(database, table)
    message = await upgrade_error(with_password(database.dsn))
    assert f'"{table}" already exists' in message
    assert "choose another table_name" in message
    assert (await catalogue(database), await rows_of(database, table)) == before
    assert await tables(database) == [table]


async def test_tables_that_were_made_in_another_way_can_be_recorded(
    database: Database, start_backend: BackendFactory
) -> None:
    """With the command that the error names."""
    environment = {"TASKIQ_SA_PG_DSN": database.dsn}
    await start_backend(run_migrations=True)
    await database.fetch(f"DROP TABLE {NAME}_version")
    message = await alembic_error("upgrade", "head", **environment)
    command = message.split("`")[1]
    assert command == "alembic stamp head"
    await alembic(*shlex.split(command)[1:], **environment)
    assert "0001 (head)" in await alembic("current", **environment)
    await alembic("check", **environment)


async def test_an_upgrade_makes_tables_again_that_were_dropped(database: Database) -> None:
    """Of all commands it alone."""
    environment = {"TASKIQ_SA_PG_DSN": database.dsn}
    await alembic("upgrade", "head", **environment)
    before = await catalogue(database)
    await database.fetch(f"DROP TABLE {NAME}, {NAME}_status")
    assert "0001 (head)" in await alembic("current", **environment)
    message = await alembic_error("downgrade", "base", **environment)
    assert "create the missing tables first with `alembic upgrade head`" in message
    assert await tables(database) == [f"{NAME}_progress", f"{NAME}_version", f"{NAME}_workers"]
    assert await alembic("upgrade", "head", **environment) == (
        f"{NAME}_version records version 0001, but tables were missing and were created "
        f"again, empty: {NAME}, {NAME}_status\n"
    )
    assert await catalogue(database) == before
    assert await alembic("upgrade", "head", **environment) == ""


def test_the_checkouts_ini_file_says_where_its_migrations_are() -> None:
    assert Path(script_location()) == ROOT / "migrations"
