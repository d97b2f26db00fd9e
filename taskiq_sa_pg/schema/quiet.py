"""Keeps what Alembic logs of itself out of the log of an application that starts."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

# The first tells of plugins as it is imported.
_LOGGERS: Final = ("alembic.runtime.plugins", "alembic.runtime.migration")

_is_quiet: Final = ContextVar("is_quiet", default=False)


@contextmanager
def quiet_alembic() -> Iterator[None]:
    """Drops Alembic's INFO lines, of this task alone: an Alembic of the application's logs on."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_passes)
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def _passes(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _is_quiet.get()
