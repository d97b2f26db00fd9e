"""What a backend works with between startup() and shutdown(), made from what it was told."""

import asyncio
import logging
from typing import Final

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import SchemaError
from taskiq_sa_pg.results.pruner import Pruner
from taskiq_sa_pg.results.reader import Reader
from taskiq_sa_pg.results.search import Search
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.results.status import Statuses
from taskiq_sa_pg.results.wait import Wait
from taskiq_sa_pg.results.writer import Writer
from taskiq_sa_pg.schema import check, quiet_alembic
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.waiting import Notifier, Waiters

logger = logging.getLogger(__name__)


class Runtime:
    """All that works on one results table, for one event loop; nothing connects before it is used.

    It is what the package's commands, import_results(), the middleware, tests and benchmarks use of
    a backend beside its public methods.
    """

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        config, timings = settings.models.config, settings.timings
        for meter in telemetry.meters.values():
            meter.queues.clear()  # of an event loop that has ended
        self.loop: Final = asyncio.get_running_loop()
        self.settings: Final = settings
        self.database: Final = database
        self.telemetry: Final = telemetry
        self.notifier: Final = Notifier(database, timings) if settings.notify else None
        self.writer: Final = Writer(settings, database, telemetry, self.notifier)
        self.reader: Final = Reader(settings, database, telemetry, self.notifier)
        self.waiters: Final = Waiters(
            config, self.reader.find_ready, database.listening, self.notifier, timings
        )
        self.wait: Final = Wait(config, self.reader, self.waiters)
        self.search: Final = Search(settings, database)
        self.statuses: Final = Statuses(settings, database, telemetry)
        self.pruner: Final = Pruner(settings, database, telemetry)

    async def prepare(self) -> None:
        """Makes the tables, or looks at them, as the settings say.

        Raises:
            SchemaError: The tables are absent or unfit, or cannot be made.
            StorageError: PostgreSQL could not be reached.
        """
        settings, timeout = self.settings, self.settings.startup_timeout
        if settings.run_migrations:
            with quiet_alembic():
                # Here, because Alembic is slow to import and only this needs it.
                from taskiq_sa_pg.schema.migrate import provision  # noqa: PLC0415

            await provision(self.database, settings.models.config, timeout, settings.timings)
        if settings.check_schema == "off":
            return
        extra = {} if settings.extra_values is None else settings.extra_values.columns
        try:
            await check(
                self.database,
                settings.models,
                timeout,
                extra_columns=extra,
                is_provisioned=settings.run_migrations,
            )
        except SchemaError as exc:
            if settings.check_schema == "error":
                raise
            logger.warning("%s", exc)

    async def close(self) -> None:
        """Ends all waiting, and returns when everything else that was asked for is done."""
        await self.waiters.close()
        await self.pruner.close()
        await self.writer.close()
        await self.reader.close()
        await self.statuses.close()
        if self.notifier is not None:
            await self.notifier.close()
