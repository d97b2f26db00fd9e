"""The gathering window: decides when a write waits for others to join its batch."""

import asyncio
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakSet

# The longest average gap between calls, in seconds. With longer gaps, waiting costs more than it
# saves.
_FAST: Final = 0.004

# Longer gaps count as this one: a single pause ends the waiting, and about twenty calls restart it.
_LONGEST_GAP: Final = 0.05

# The weight of the last gap in the average.
_WEIGHT: Final = 1 / 8

# A window ends early after at least so many seconds without a call; gaps vary.
_QUIET: Final = 0.002

# Windows end so if a worker runs few tasks at a time: the next one starts only when a result is
# stored, so waiting delays the tasks. If such windows outnumber the others by _MOST_QUIET, no call
# waits for _REST seconds. That costs such a worker a few percent of its tasks.
_MOST_QUIET: Final = 4
_REST: Final = 0.5


class Window:
    """Distinguishes a stream of asyncio tasks that call once from callers that call in a loop.

    A worker runs each message in a new asyncio task, and takes one message after the other. So the
    calls come one by one, and each would be flushed alone. A caller in a loop waits for the answer
    before its next call, so waiting for that would be useless. It is recognized by its task.

    Args:
        seconds: The most seconds that a call waits; 0 never waits.
        clock: Returns the time in seconds; None uses the event loop's clock.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] | None = None) -> None:
        self._seconds = seconds
        self._clock = clock or asyncio.get_running_loop().time
        self._callers: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._called_at = self._opened_at = self._clock()
        self._gap = _LONGEST_GAP
        self._quiet = 0  # the number of quiet windows minus that of others
        self._rests_until = self._clock()

    def is_worth_waiting(self) -> bool:
        """Whether the call that the current task makes should wait for others."""
        caller = asyncio.current_task()
        if not self._seconds or caller is None or caller in self._callers:
            return False
        self._callers.add(caller)
        now = self._clock()
        self._gap += (min(now - self._called_at, _LONGEST_GAP) - self._gap) * _WEIGHT
        self._called_at = now
        return self._gap < _FAST and now >= self._rests_until

    def open(self) -> None:
        """Starts a window."""
        self._opened_at = self._clock()

    def close(self) -> None:
        """Ends the window, because no seconds are left."""
        now = self._clock()
        is_early = now < self._opened_at + self._seconds
        is_quiet = is_early or now - self._called_at >= self._seconds / 2
        self._quiet = max(0, self._quiet + (1 if is_quiet else -1))
        if self._quiet >= _MOST_QUIET:
            self._quiet, self._rests_until = 0, now + _REST

    @property
    def seconds_left(self) -> float:
        """Seconds until the window ends, unless another call comes: at most twice the usual gap."""
        quiet_at = self._called_at + max(2 * self._gap, _QUIET)
        return min(self._opened_at + self._seconds, quiet_at) - self._clock()
