"""The application's broker, for commands that send tasks or show queues."""

import inspect
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from taskiq import AsyncBroker
from taskiq.cli.utils import import_object

from taskiq_sa_pg.exceptions import ConfigurationError, TaskiqSaPgError


def broker_of(name: str) -> AsyncBroker:
    """The broker `module:attribute`, or the broker that a function of this name returns.

    Raises:
        ConfigurationError: It cannot be imported, or is not a broker.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigurationError(
            f"--broker {name}: use module:attribute, such as shop.tasks:broker"
        )
    sys.path.insert(0, str(Path.cwd()))  # as taskiq's own command line does
    try:
        found = import_object(name)
        if inspect.isfunction(found):
            found = found()
    except Exception as exc:
        # The application's module may raise anything.
        raise ConfigurationError(f"--broker {name} cannot be imported: {exc!r}") from exc
    if not isinstance(found, AsyncBroker):
        raise ConfigurationError(f"--broker {name} is not a taskiq broker: {found!r}")
    return found


@asynccontextmanager
async def started(broker: AsyncBroker) -> AsyncIterator[None]:
    """Starts a broker with its result backend, and shuts it down at the end.

    Raises:
        TaskiqSaPgError: It could not be started.
    """
    try:
        await broker.startup()
    except TaskiqSaPgError:
        raise
    except Exception as exc:
        # Other brokers may raise anything.
        raise TaskiqSaPgError(f"the broker could not be started: {exc!r}") from exc
    try:
        yield
    finally:
        await broker.shutdown()
