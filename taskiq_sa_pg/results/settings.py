"""The checked arguments of a backend."""

from dataclasses import dataclass
from typing import Final, Literal, get_args

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.exceptions import ConfigurationError, check_flag, check_number
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.results.extra_values import ExtraValues
from taskiq_sa_pg.schema import SchemaCheck, check_schema_check
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings

# Seconds. The most that waiting clients are notified later, and only under load.
DEFAULT_GATHER_WINDOW: Final = 0.01

Track = Literal["started"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Arguments of SQLAlchemyResultBackend; `codec` and the Database have the others.

    Raises:
        ConfigurationError: An argument is invalid.
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
    gather_window: float = DEFAULT_GATHER_WINDOW
    timings: Timings = DEFAULT_TIMINGS

    def __post_init__(self) -> None:
        check_schema_check(self.check_schema)
        for name in ("keep_results", "notify", "run_migrations"):
            check_flag(name, getattr(self, name))
        check_number("startup_timeout", self.startup_timeout, 0)
        check_number("gather_window", self.gather_window, 0)
        if self.track not in (*get_args(Track), None):
            raise ConfigurationError(f'track must be "started" or None, not {self.track!r}')
        if self.is_tracked and self.models.status_table is None:
            raise ConfigurationError(
                "track needs a status table: subclass StatusMixin on your Base, and pass "
                "models=Models(Result, Progress, Status)"
            )

    @property
    def is_tracked(self) -> bool:
        """Whether statuses are stored."""
        return self.track is not None

    @property
    def table(self) -> str:
        """The results table as shown in messages."""
        return self.models.config.qualified_name
