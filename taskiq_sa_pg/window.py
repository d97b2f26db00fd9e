"""The gathering window: when a write is worth holding back until others have come."""

import asyncio
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

# Seconds between calls on average. Those of a slower stream would wait for longer than they save.
_FAST: Final = 0.004

# Longer gaps count as this one: a single pause ends the waiting, and some twenty calls begin it.
_LONGEST_GAP: Final = 0.05

# How much the last gap counts in the average.
_WEIGHT: Final = 1 / 8

# Nobody has come for so many seconds: nobody comes. At least, because gaps vary.
_QUIET: Final = 0.002

# Where windows end so, a worker has few places: its next task starts only when a result is stored,
# and to wait for it holds up the tasks. After so many of such windows more than of others nobody
# waits for so many seconds. That costs such a worker a few tasks in a hundred.
_MOST_QUIET: Final = 4
_REST: Final = 0.5


class Window:
    """Tells a stream of tasks that call once from callers that call again and again.

    A worker runs every message in a task of its own, and takes one message after the other. So the
    calls come one by one, and each would be flushed alone. A caller who loops waits for the answer
    before the next call: it would be in vain to wait for that. He is known by his task.

    Args:
        seconds: How long a call waits at most; 0 never waits.
        clock: What time it is, in seconds; None is the event loop's.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] | None = None) -> None:
        self._seconds = seconds
        self._clock = clock or asyncio.get_running_loop().time
        self._callers: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._called_at = self._opened_at = self._clock()
        self._gap = _LONGEST_GAP
        self._quiet = 0  # how many windows have ended so, more than others
        self._rests_until = self._clock()

    def is_worth_waiting(self) -> bool:
        """Whether the call that the current task makes now had better wait for others."""
        caller = asyncio.current_task()
        if not self._seconds or caller is None or caller in self._callers:
            return False
        self._callers.add(caller)
        now = self._clock()
        self._gap += (min(now - self._called_at, _LONGEST_GAP) - self._gap) * _WEIGHT
        self._called_at = now
        return self._gap < _FAST and now >= self._rests_until

    def open(self) -> None:
        """Begins to wait."""
        self._opened_at = self._clock()

    def close(self) -> None:
        """Ends the waiting, because there are no seconds left."""
        now = self._clock()
        is_early = now < self._opened_at + self._seconds
        is_quiet = is_early or now - self._called_at >= self._seconds / 2
        self._quiet = max(0, self._quiet + (1 if is_quiet else -1))
        if self._quiet >= _MOST_QUIET:
            self._quiet, self._rests_until = 0, now + _REST

    @property
    def seconds_left(self) -> float:
        """For how long to wait on: until nothing has come for twice the usual gap."""
        quiet_at = self._called_at + max(2 * self._gap, _QUIET)
        return min(self._opened_at + self._seconds, quiet_at) - self._clock()
