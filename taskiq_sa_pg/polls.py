"""What polls have found, so that who asks again and again can be answered without a statement."""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Final

# Two polls of a task that are no further apart are by somebody who waits for it.
_MAX_SECONDS_APART: Final = 5.0

# How many tasks that were polled once are kept in mind, to notice when they are polled again.
_MAX_POLLED_ONCE: Final = 50_000


@dataclass(slots=True)
class _Poll:
    polled_at: float
    missing_at: float = -inf
    doubted_at: float = -inf


class Polls:
    """What is known of the tasks that are polled. All times are the event loop's, in seconds."""

    def __init__(self) -> None:
        self._polled_once: OrderedDict[str, float] = OrderedDict()
        self._repeated: dict[str, _Poll] = {}

    def is_repeated(self, task_id: str, now: float) -> bool:
        """Notes a poll; whether the task was polled shortly before."""
        poll = self._repeated.get(task_id)
        if poll is not None:
            poll.polled_at = now
            return True
        if now - self._polled_once.pop(task_id, -inf) <= _MAX_SECONDS_APART:
            # What was heard until now, was heard of a task that was not kept in mind.
            self._repeated[task_id] = _Poll(now, doubted_at=now)
            return True
        self._polled_once[task_id] = now
        if len(self._polled_once) > _MAX_POLLED_ONCE:
            self._polled_once.popitem(last=False)
        return False

    def repeated(self, now: float) -> set[str]:
        """The tasks that somebody goes on polling; others are forgotten."""
        oldest = now - 2 * _MAX_SECONDS_APART
        for task_id in [t for t, poll in self._repeated.items() if poll.polled_at < oldest]:
            del self._repeated[task_id]
        return set(self._repeated)

    def is_missing_since(self, task_id: str, time: float) -> bool:
        """Whether a look that began then or later found no result, and nothing was heard since."""
        poll = self._repeated.get(task_id)
        return poll is not None and poll.missing_at >= time

    def note_missing(self, task_ids: Iterable[str], began_at: float) -> None:
        """Notes that a look which began at that time found no results."""
        for task_id in task_ids:
            poll = self._repeated.get(task_id)
            # What was heard since may have come too late for the look.
            if poll is not None and poll.doubted_at < began_at:
                poll.missing_at = began_at

    def doubt(self, task_id: str, now: float) -> None:
        """Notes that there may be a result."""
        poll = self._repeated.get(task_id)
        if poll is not None:
            poll.missing_at, poll.doubted_at = -inf, now

    def doubt_all(self, now: float) -> None:
        """Notes that there may be results of which nothing was heard."""
        for task_id in self._repeated:
            self.doubt(task_id, now)

    def forget(self, task_id: str) -> None:
        """Ends the memory of a task, whose result is there."""
        self._repeated.pop(task_id, None)
        self._polled_once.pop(task_id, None)
