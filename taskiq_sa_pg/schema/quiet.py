"""Keeps Alembic's own log lines out of the log of an application that starts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

# The first logs its plugins when it is imported.
_LOGGERS: Final = ("alembic.runtime.plugins", "alembic.runtime.migration")

_is_quiet: Final = ContextVar("is_quiet", default=False)


@contextmanager
def quiet_alembic() -> Iterator[None]:
    """Drops Alembic's INFO lines in the current task only; the application's Alembic still logs."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_logged)
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def _is_logged(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _is_quiet.get()
