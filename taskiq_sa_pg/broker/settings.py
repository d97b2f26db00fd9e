"""The broker's settings, checked."""

import reprlib
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Table

from taskiq_sa_pg.exceptions import ConfigurationError, check_flag, check_number, check_whole
from taskiq_sa_pg.models import DEFAULT_QUEUE, Models
from taskiq_sa_pg.schema import SchemaCheck, check_schema_check
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

# Seconds.
DEFAULT_LEASE: Final = 60.0

DEFAULT_MAX_DELIVERIES: Final = 5

# Parking a task adds one. With more, the column's smallint would overflow, and no task could be
# claimed.
_MOST_DELIVERIES: Final = 32_766

# An index entry can hold at most 2,704 bytes.
_MAX_QUEUE_NAME_BYTES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Arguments of SQLAlchemyBroker, except those of the Database.

    Raises:
        ConfigurationError: An argument is invalid.
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
        """The queue's table."""
        assert self.models.queue_table is not None
        return self.models.queue_table

    @property
    def table(self) -> str:
        """The name of the queue's table, for messages."""
        config = self.models.config
        return config.qualified(config.queue_table_name)


def check_queue_name(what: str, name: object) -> None:
    """Checks the name of a queue.

    Raises:
        ConfigurationError: It is not a str, it is empty, or PostgreSQL cannot store it.
    """
    if not isinstance(name, str) or not name or "\x00" in name or _is_too_long(name):
        raise ConfigurationError(
            f"{what} must be a str of 1 to {_MAX_QUEUE_NAME_BYTES:,} bytes of UTF-8, without NUL, "
            f"not {reprlib.repr(name)}"
        )


def _is_too_long(name: str) -> bool:
    try:
        return len(name.encode()) > _MAX_QUEUE_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return True


def check_queue_names(names: tuple[str, ...]) -> None:
    """Checks the names of queues that a worker listens to.

    Raises:
        ConfigurationError: No name, or an invalid one.
    """
    if not names:
        raise ConfigurationError("listening_to() needs the name of a queue")
    for name in names:
        check_queue_name("a queue", name)
