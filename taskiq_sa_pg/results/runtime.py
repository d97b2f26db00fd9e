"""The objects of a backend that exist between startup() and shutdown()."""

import asyncio
from typing import Final

from taskiq_sa_pg.database import Database
from taskiq_sa_pg.results.finding import Finding
from taskiq_sa_pg.results.pruner import Pruner
from taskiq_sa_pg.results.reader import Reader
from taskiq_sa_pg.results.resend import Resender
from taskiq_sa_pg.results.search import Search
from taskiq_sa_pg.results.settings import Settings
from taskiq_sa_pg.results.status import Statuses
from taskiq_sa_pg.results.wait import Wait
from taskiq_sa_pg.results.workers import Workers
from taskiq_sa_pg.results.writer import Writer
from taskiq_sa_pg.schema import RESULTS, check, prepare
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.waiting import Listener, Notifier, Waiters


class Runtime:
    """The objects that work on one results table, for one event loop; connects on first use.

    The package's commands, import_results(), the middleware, tests and benchmarks use it in
    addition to a backend's public methods.
    """

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        config, timings = settings.models.config, settings.timings
        for meter in telemetry.meters.values():
            meter.queues.clear()  # they belong to an event loop that has ended
        self.loop: Final = asyncio.get_running_loop()
        self.settings: Final = settings
        self.database: Final = database
        self.telemetry: Final = telemetry
        self.notifier: Final = Notifier(database, timings) if settings.notify else None
        self.writer: Final = Writer(settings, database, telemetry, self.notifier)
        self.reader: Final = Reader(settings, database, telemetry, self.notifier)
        self.listener: Final = (
            None
            if self.notifier is None
            else Listener(database.listening, send=self.notifier.send, timings=timings)
        )
        self.waiters: Final = Waiters(config, self.reader.find_ready, self.listener, timings)
        self.wait: Final = Wait(config, self.reader, self.waiters)
        self.finding: Final = Finding(settings, database)
        self.search: Final = Search(settings, database)
        self.resender: Final = Resender(settings, database)
        self.statuses: Final = Statuses(settings, database, telemetry)
        self.workers: Final = Workers(settings, database, self.writer)
        self.pruner: Final = Pruner(settings, database, telemetry)

    async def prepare(self) -> None:
        """Creates the tables or checks them, according to the settings.

        Raises:
            SchemaError: Tables are missing or do not match, or cannot be created.
            StorageError: PostgreSQL is unreachable.
        """
        settings, database = self.settings, self.database
        extra = {} if settings.extra_values is None else settings.extra_values.columns

        async def check_tables() -> None:
            is_distributed = await check(
                database,
                settings.models,
                settings.startup_timeout,
                extra_columns=extra,
                is_provisioned=settings.run_migrations,
            )
            self.writer.by_values = self.statuses.by_values = is_distributed
            self.pruner.is_distributed = is_distributed

        await prepare(
            database,
            settings.models.config,
            RESULTS,
            check_tables,
            run_migrations=settings.run_migrations,
            check_schema=settings.check_schema,
            timeout=settings.startup_timeout,
            timings=settings.timings,
        )

    async def close(self) -> None:
        """Ends all waiting, and returns when all other calls are complete."""
        await self.waiters.close()
        if self.listener is not None:
            await self.listener.stop()
        await self.pruner.close()
        await self.workers.close()
        await self.writer.close()
        await self.reader.close()
        await self.statuses.close()
        if self.notifier is not None:
            await self.notifier.close()
