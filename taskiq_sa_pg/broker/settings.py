"""What a broker was told, checked."""

import reprlib
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Table

from taskiq_sa_pg.exceptions import ConfigurationError, check_flag, check_number, check_whole
from taskiq_sa_pg.models import DEFAULT_QUEUE, Models
from taskiq_sa_pg.schema import SchemaCheck, check_schema_check
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

# Seconds for which a worker has a task, and which it prolongs three times as often.
DEFAULT_LEASE: Final = 60.0

DEFAULT_MAX_DELIVERIES: Final = 5

# With one more, with which a task is parked, the column's smallint is full: nothing could be
# claimed any more.
_MOST_DELIVERIES: Final = 32_766

# An entry of an index holds 2,704 bytes at most.
_MAX_QUEUE_NAME_BYTES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Arguments of SQLAlchemyBroker, but for those that the Database has taken in.

    Raises:
        ConfigurationError: One that cannot work.
    """

    models: Models
    queue_name: str = DEFAULT_QUEUE
    lease: float = DEFAULT_LEASE
    max_deliveries: int = DEFAULT_MAX_DELIVERIES
    notify: bool = True
    check_schema: SchemaCheck = "error"
    run_migrations: bool = False
    startup_timeout: float = 30.0
    timings: Timings = DEFAULT_TIMINGS

    def __post_init__(self) -> None:
        check_queue_name("queue_name", self.queue_name)
        check_number("lease", self.lease, 0, is_above=True)
        check_whole("max_deliveries", self.max_deliveries)
        if self.max_deliveries > _MOST_DELIVERIES:
            raise ConfigurationError(
                f"max_deliveries must be at most {_MOST_DELIVERIES:,}, not {self.max_deliveries!r}"
            )
        check_flag("notify", self.notify)
        check_flag("run_migrations", self.run_migrations)
        check_number("startup_timeout", self.startup_timeout, 0)
        check_schema_check(self.check_schema)
        if self.models.queue_table is None:
            raise ConfigurationError(
                "the broker needs the model of its queue: build_models(..., queue=True), or "
                "Models(..., Queue=...) with a subclass of QueueMixin"
            )

    @property
    def queue_table(self) -> Table:
        """The queue."""
        assert self.models.queue_table is not None
        return self.models.queue_table

    @property
    def table(self) -> str:
        """The queue's table, as messages name it."""
        config = self.models.config
        return config.qualified(config.queue_table_name)


def check_queue_name(what: str, name: object) -> None:
    """Refuses what is no name of a queue.

    Raises:
        ConfigurationError: It is no str, is empty, or is what PostgreSQL cannot store.
    """
    if not isinstance(name, str) or not name or "\x00" in name or _is_unfit(name):
        raise ConfigurationError(
            f"{what} must be a str of 1 to {_MAX_QUEUE_NAME_BYTES:,} bytes of UTF-8, without NUL, "
            f"not {reprlib.repr(name)}"
        )


def _is_unfit(name: str) -> bool:
    try:
        return len(name.encode()) > _MAX_QUEUE_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return True


def check_queue_names(names: tuple[str, ...]) -> None:
    """Refuses what a worker cannot listen to.

    Raises:
        ConfigurationError: No name, or what is none.
    """
    if not names:
        raise ConfigurationError("listening_to() needs the name of a queue")
    for name in names:
        check_queue_name("a queue", name)
