"""What the tables in the database have of the schema's later steps, and the statements for that."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeVar

from taskiq_sa_pg.exceptions import StorageError
from taskiq_sa_pg.models import Models
from taskiq_sa_pg.rows import Features
from taskiq_sa_pg.statements import Statements
from taskiq_sa_pg.status_statements import StatusStatements

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_UNDEFINED_COLUMN: Final = "42703"
_UNDEFINED_TABLE: Final = "42P01"
_INSUFFICIENT_PRIVILEGE: Final = "42501"

# By SQLSTATE: which feature may be missing, and what goes without it.
_MISSING: Final[Mapping[str, tuple[str, str]]] = {
    _UNDEFINED_COLUMN: (
        "has_metadata",
        "lacks columns of step 2 of the schema, and results go without what "
        "TaskMetadataMiddleware has for them",
    ),
    _UNDEFINED_TABLE: (
        "has_status",
        "lacks the status table of step 3 of the schema, and no task is tracked",
    ),
    _INSUFFICIENT_PRIVILEGE: ("has_status", "has a status table without the rights to track tasks"),
}


class Layout:
    """The tables as far as they are known; at first they are taken to be this release's.

    Args:
        models: The tables.
        is_tracked: Whether the status table is written.
    """

    def __init__(self, models: Models, *, is_tracked: bool = False) -> None:
        self.models: Final = models
        self.is_tracked: Final = is_tracked
        self.expect(Features(has_status=models.status_table is not None))

    def expect(self, features: Features) -> None:
        """Says what the tables have."""
        self.features = features
        self.statements = Statements(self.models, features, is_tracked=self.is_tracked)
        self.status_statements = StatusStatements(self.models, features)

    async def adapting(self, work: Callable[[], Awaitable[_T]], *, uses_status: bool) -> _T:
        """Does some work; once more without a feature that the tables turn out to lack.

        Args:
            work: What to do with the features as they are.
            uses_status: Whether it needs the status table, if there is one.

        Raises:
            StorageError: Of the work.
        """
        while True:
            features = self.features
            try:
                return await work()
            except StorageError as exc:
                self.adapt_to(exc, features, uses_status=uses_status)

    def adapt_to(self, exc: StorageError, features: Features, *, uses_status: bool) -> None:
        """Goes without the feature whose absence made an attempt fail.

        Args:
            exc: The error.
            features: What the attempt took the tables to have.
            uses_status: Whether it needed the status table, if there is one.

        Raises:
            StorageError: The error, where no feature was missing.
        """
        # Nobody looked at the tables, or they were downgraded since: no result is lost for it.
        name, consequence = _MISSING.get(exc.sqlstate or "", ("", ""))
        used = features if uses_status else features._replace(has_status=False)
        if not name or not getattr(used, name):
            raise exc
        if getattr(self.features, name):  # else another batch has met it, too
            logger.warning(
                "table %s %s until the next startup(): %s",
                *(self.models.config.qualified_name, consequence, exc),
            )
            self.expect(self.features._replace(**{name: False}))
