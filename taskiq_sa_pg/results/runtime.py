"""What a backend works with between startup() and shutdown(), made from what it was told."""

import logging
from dataclasses import dataclass
from typing import Final, Literal, get_args

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, SchemaError
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.results.extra_values import ExtraValues
from taskiq_sa_pg.results.pruner import Pruner
from taskiq_sa_pg.results.reader import Reader
from taskiq_sa_pg.results.search import Search
from taskiq_sa_pg.results.status import Statuses, Track
from taskiq_sa_pg.results.wait import Wait
from taskiq_sa_pg.results.writer import Writer
from taskiq_sa_pg.schema import check
from taskiq_sa_pg.telemetry import Telemetry
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings
from taskiq_sa_pg.waiting import Notifier, Waiters

logger = logging.getLogger(__name__)

SchemaCheck = Literal["error", "warn", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Arguments of SQLAlchemyResultBackend; `codec` and the Database have taken in the others.

    Raises:
        ConfigurationError: One that cannot work.
    """

    models: Models
    codec: Codec
    extra_values: ExtraValues | None = None
    keep_results: bool = True
    notify: bool = True
    track: Track | None = None
    progress_ttl: float | None = None
    prune_interval: float | None = None
    check_schema: SchemaCheck = "error"
    run_migrations: bool = False
    startup_timeout: float = 30.0
    timings: Timings = DEFAULT_TIMINGS

    def __post_init__(self) -> None:
        if self.check_schema not in get_args(SchemaCheck):
            raise ConfigurationError(
                f'check_schema must be "error", "warn" or "off", not {self.check_schema!r}'
            )
        if self.startup_timeout < 0:
            raise ConfigurationError(
                f"startup_timeout must be 0 or more, not {self.startup_timeout}"
            )
        if self.track is None:
            return
        if self.track not in get_args(Track):
            raise ConfigurationError(f'track must be "started" or None, not {self.track!r}')
        if self.models.status_table is None:
            raise ConfigurationError(
                "track needs a status table: subclass StatusMixin on your Base, and pass "
                "models=Models(Result, Progress, Status)"
            )


class Runtime:
    """All that works on one results table, for one event loop; nothing connects before it is used.

    It is what the package's commands, import_results(), the middleware, tests and benchmarks use of
    a backend beside its public methods.

    Args:
        settings: What the backend was told.
        database: Where the tables are; open.
        telemetry: Counts what is done.
    """

    def __init__(self, settings: Settings, database: Database, telemetry: Telemetry) -> None:
        models, codec, timings = settings.models, settings.codec, settings.timings
        is_tracked = settings.track is not None
        for meter in telemetry.meters.values():
            meter.queues.clear()  # of an event loop that has ended
        self.settings: Final = settings
        self.database: Final = database
        self.telemetry: Final = telemetry
        self.notifier: Final = Notifier(database, timings) if settings.notify else None
        self.writer: Final = Writer(
            database,
            codec,
            models,
            self.notifier,
            telemetry,
            extra_values=settings.extra_values,
            is_tracked=is_tracked,
        )
        self.reader: Final = Reader(
            database,
            codec,
            models,
            telemetry,
            keep_results=settings.keep_results,
            is_tracked=is_tracked,
        )
        self.waiters: Final = Waiters(
            models.config, self.reader.find_ready, database.listening, self.notifier, timings
        )
        self.wait: Final = Wait(models.config, self.reader, self.waiters)
        self.search: Final = Search(database, codec, models)
        self.statuses: Final = Statuses(database, models, telemetry, timings)
        self.pruner: Final = Pruner(
            database,
            models,
            telemetry,
            timings,
            progress_ttl=settings.progress_ttl,
            interval=settings.prune_interval,
        )

    async def prepare(self) -> None:
        """Makes the tables, or looks at them, as the settings say.

        Raises:
            SchemaError: The tables are absent or unfit, or cannot be made.
            StorageError: PostgreSQL could not be reached.
        """
        settings, timeout = self.settings, self.settings.startup_timeout
        if settings.run_migrations:
            # Here, because Alembic is slow to import and only this needs it.
            from taskiq_sa_pg.schema.migrate import provision  # noqa: PLC0415

            await provision(self.database, settings.models.config, timeout, settings.timings)
        if settings.check_schema == "off":
            return
        extra = {} if settings.extra_values is None else settings.extra_values.columns
        try:
            await check(self.database, settings.models, timeout, extra_columns=extra)
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
