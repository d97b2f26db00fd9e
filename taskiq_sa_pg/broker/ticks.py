"""Ticks: the times at which schedules are due. For each tick, one scheduler sends the task."""

import logging
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import Executable, Table
from taskiq import BrokerMessage, TaskiqMessage

from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.statements import QueueRow, Sent, send_at_interval, send_by_cron, send_once

logger = logging.getLogger(__name__)

Kind = Literal["cron", "interval", "time"]

# The label that taskiq's scheduler adds to the tasks that it sends.
_SCHEDULE_ID: Final = "schedule_id"

_STATEMENTS: Final[Mapping[Kind, Callable[[Table, Table], Executable]]] = {
    "cron": send_by_cron,
    "interval": send_at_interval,
    "time": send_once,
}


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick that a scheduler found due.

    Attributes:
        schedule_id: The schedule.
        kind: The kind of schedule.
        parameters: The parameters of the statement that sends it.
        settings: The settings of the broker that sends it.
        settle: Called when the outcome is known: sent by this or by another scheduler.
    """

    schedule_id: str
    kind: Kind
    parameters: Mapping[str, Any]
    settings: QueueSettings
    settle: Callable[[Sent], None]


# From a source's pre_send() to the broker's kick(): taskiq calls both in one asyncio task.
_TICK: Final[ContextVar[Tick | None]] = ContextVar("taskiq_sa_pg_tick", default=None)


def set_tick(tick: Tick | None) -> None:
    """Sets the tick for which the next task of its schedule is sent."""
    _TICK.set(tick)


def take_tick(message: BrokerMessage, settings: QueueSettings) -> Tick | None:
    """Takes the tick for which a broker sends a message; None if there is none."""
    tick = _TICK.get()
    if tick is None:
        return None
    # After a failure before kick(), such as a middleware's, the tick was not taken. It must not be
    # used for other tasks that the same asyncio task sends later.
    is_its = message.labels.get(_SCHEDULE_ID) == tick.schedule_id
    if not is_its or tick.settings is not settings:
        return None
    _TICK.set(None)
    return tick


def has_tick(schedule_id: str) -> bool:
    """Whether the tick of a schedule was not taken."""
    tick = _TICK.get()
    return tick is not None and tick.schedule_id == schedule_id


def is_for_tick(message: TaskiqMessage) -> bool:
    """Whether a message is sent for a tick, and so only if no other scheduler sends it."""
    return has_tick(str(message.labels.get(_SCHEDULE_ID)))


class TickSender:
    """Sends the tasks of schedules, for one event loop.

    Args:
        settings: The broker's settings.
        database: The database of the queue and the schedules.
        announce: Called with the names of the queues that have new tasks.
    """

    def __init__(
        self,
        settings: QueueSettings,
        database: Database,
        announce: Callable[[Collection[str]], None],
    ) -> None:
        self._settings = settings
        self._database = database
        self._announce = announce
        self._statements: dict[Kind, Executable] = {}

    async def send(self, tick: Tick, row: QueueRow) -> bool:
        """Stores a task unless its tick was sent before; it is committed on return.

        Returns:
            Whether it was stored.
        """
        parameters = {f"task_{name}": value for name, value in row._asdict().items()}
        parameters |= {"id_sought": tick.schedule_id, **tick.parameters}
        purpose = f"send schedule {tick.schedule_id!r} to table {self._settings.table}"
        [answer] = await self._database.fetch(self._statement(tick.kind), parameters, purpose)
        sent = Sent(*answer)
        tick.settle(sent)
        if sent.is_sent:
            self._announce({row.queue_name})
        else:
            text = "schedule %s (%s): not sent: another scheduler sent it, or it is not due"
            logger.debug(text, tick.schedule_id, row.task_name)
        return sent.is_sent

    def _statement(self, kind: Kind) -> Executable:
        if kind not in self._statements:
            schedules = self._settings.models.schedules_table
            assert schedules is not None
            self._statements[kind] = _STATEMENTS[kind](self._settings.queue_table, schedules)
        return self._statements[kind]
