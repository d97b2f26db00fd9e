"""Alembic's commands, what the catalogue says of the tables, and roles."""

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic.util import CommandError
from sqlalchemy import make_url

from taskiq_sa_pg import TableConfig
from taskiq_sa_pg.database import Database as OurDatabase
from taskiq_sa_pg.schema import RESULTS, Family
from tests.commands import only_variables, run_alembic
from tests.conftest import Database

# PostgreSQL takes no longer one.
LONG_NAME = f"{'x' * 58}ü表"

ROOT = Path(__file__).parents[2]

# In no message, whatever goes wrong; every DSN of these tests has it.
PASSWORD = "geheim+7%"


async def alembic(*arguments: str, ini: Path | None = None, **variables: str) -> str:
    """What an Alembic command prints, in this process, with no other TASKIQ_SA_PG_* variables.

    Raises:
        CommandError: It fails.
    """

    def run() -> str:
        with only_variables(variables):
            return run_alembic(*arguments, ini=ini)

    return await asyncio.to_thread(run)


async def alembic_error(*arguments: str, **variables: str) -> str:
    """What it says as it fails, without the password."""
    with pytest.raises(CommandError) as caught:
        await alembic(*arguments, **variables)
    assert PASSWORD not in str(caught.value)
    return str(caught.value)


@dataclass(frozen=True)
class Outcome:
    """What a process left behind."""

    status: int
    stdout: str
    stderr: str


async def run(*command: str, **variables: str) -> Outcome:
    """Runs a program in the checkout, with no other TASKIQ_SA_PG_* variables."""
    with only_variables(variables):
        environment = {**os.environ, "PYTHONWARNINGS": "error"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    outcome = Outcome(process.returncode, stdout.decode(), stderr.decode())
    assert PASSWORD not in outcome.stdout + outcome.stderr
    return outcome


def with_password(dsn: str, **changes: Any) -> str:
    """The DSN with a password that the embedded server does not ask for."""
    url = make_url(dsn)
    if "username" in changes or url.password is None:
        url = url.set(password=PASSWORD)
    return url.set(**changes).render_as_string(hide_password=False)


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[OurDatabase]:
    """What a backend or a broker works on."""
    database = OurDatabase(dsn)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


_COLUMNS = """
    SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
           pg_get_expr(d.adbin, d.adrelid)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
    WHERE c.relnamespace = $1::text::regnamespace AND c.relkind = 'r' AND c.relname = ANY($2)
          AND NOT a.attisdropped
    ORDER BY c.relname, a.attnum
"""
_INDEXES = """
    SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisprimary, i.indisunique
    FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
    WHERE c.relnamespace = $1::text::regnamespace AND c.relname = ANY($2)
    ORDER BY 1, 2
"""
# Without those for NOT NULL, which PostgreSQL 18 names itself; the columns have it.
_CONSTRAINTS = """
    SELECT c.relname, n.conname, pg_get_constraintdef(n.oid)
    FROM pg_class c JOIN pg_constraint n ON n.conrelid = c.oid AND n.contype <> 'n'
    WHERE c.relnamespace = $1::text::regnamespace AND c.relname = ANY($2)
    ORDER BY 1, 2
"""
_TABLES = """
    SELECT c.relname, c.reloptions, c.relpersistence, m.amname
    FROM pg_class c JOIN pg_am m ON m.oid = c.relam
    WHERE c.relnamespace = $1::text::regnamespace AND c.relkind = 'r' AND c.relname = ANY($2)
    ORDER BY 1
"""


async def catalogue(
    database: Database, table_name: str = "taskiq_results", family: Family = RESULTS
) -> list[Any]:
    """Everything that PostgreSQL knows of the tables, without the name of the schema."""
    names = list(family.table_names(TableConfig(table_name)))
    rows: list[Any] = []
    connection = await asyncpg.connect(database.direct_dsn)
    try:
        for query in (_TABLES, _COLUMNS, _INDEXES, _CONSTRAINTS):
            rows.extend(await connection.fetch(query, f'"{database.schema}"', names))
    finally:
        await connection.close()
    prefix = f"{database.schema}."
    return [
        tuple(value.replace(prefix, "") if isinstance(value, str) else value for value in row)
        for row in rows
    ]


async def tables(database: Database) -> list[str]:
    """The tables of the test's schema."""
    rows = await database.fetch(
        "SELECT tablename FROM pg_tables WHERE schemaname = $1 ORDER BY 1", database.schema
    )
    return [row["tablename"] for row in rows]


@pytest.fixture
async def role(database: Database) -> AsyncIterator[str]:
    """A role that may see the test's schema, and nothing else."""
    name = f"role_{uuid.uuid4().hex}"
    await database.fetch(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    await database.fetch(f"GRANT USAGE ON SCHEMA {database.schema} TO {name}")
    yield name
    await database.fetch(f"DROP OWNED BY {name}")
    await database.fetch(f"DROP ROLE {name}")
