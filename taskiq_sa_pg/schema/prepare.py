"""Creates or checks the tables of a family at startup()."""

import logging
from collections.abc import Awaitable, Callable
from typing import Literal, get_args

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError
from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.schema.families import Family
from taskiq_sa_pg.schema.quiet import quiet_alembic
from taskiq_sa_pg.timings import Timings

logger = logging.getLogger(__name__)

SchemaCheck = Literal["error", "warn", "off"]


def check_schema_check(value: object) -> None:
    """Checks the argument check_schema.

    Raises:
        ConfigurationError: It is not a SchemaCheck.
    """
    if value not in get_args(SchemaCheck):
        raise ConfigurationError(f'check_schema must be "error", "warn" or "off", not {value!r}')


async def prepare(
    database: Database,
    config: TableConfig,
    family: Family,
    check: Callable[[], Awaitable[None]],
    *,
    run_migrations: bool,
    check_schema: SchemaCheck,
    timeout: float,
    timings: Timings,
) -> None:
    """Upgrades the tables if `run_migrations`, and compares them with the models by `check`.

    Raises:
        SchemaError: The tables are missing or do not match, or cannot be created.
        StorageError: PostgreSQL cannot be reached.
    """
    if run_migrations:
        with quiet_alembic():
            # Imported here because Alembic is slow to import, and only this needs it.
            from taskiq_sa_pg.schema.migrate import provision  # noqa: PLC0415

        await provision(database, config, timeout, timings, family)
    if check_schema == "off":
        return
    try:
        await check()
    except SchemaError as exc:
        if check_schema == "error":
            raise
        logger.warning("%s", exc)
