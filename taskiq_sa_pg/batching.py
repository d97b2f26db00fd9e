"""Group commit: batches many concurrent calls into few statements.

If a lane is free, a call is flushed at once, together with all calls of the same iteration of the
event loop. While all lanes are busy, calls gather for the next flush. So a single call does not
wait, and batches grow with the load. The exception is a stream of tasks that call once each, as in
a worker: there a write waits some milliseconds for the next ones; see Window.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from contextvars import Context
from functools import partial
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from taskiq_sa_pg.background import start_task
from taskiq_sa_pg.database import is_unfit_value
from taskiq_sa_pg.exceptions import NotStartedError, ResultDecodeError, StorageError
from taskiq_sa_pg.telemetry import BatchMeter
from taskiq_sa_pg.window import Window

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Row = TypeVar("_Row")
_Answer = TypeVar("_Answer")

MAX_ROWS: Final = 500
MAX_BYTES: Final = 8_000_000

# From this many keys on, a batch takes only its lane's share of all keys under way. The client then
# encodes one batch while the server stores the other, and no lane sends many small batches while
# another is busy. For fewer keys, a second statement costs more than this saves.
_MIN_SHARED: Final = 32

# Classes of SQLSTATE that a single row can cause: parts of the batch may succeed. "P0" are errors
# of triggers. https://www.postgresql.org/docs/18/errcodes-appendix.html
_BLAMING_A_ROW: Final = frozenset({"21", "22", "23", "27", "44", "54", "P0"})


# The item of a caller, the future that it awaits, and its span if calls are traced.
_Call = tuple[Any, "asyncio.Future[Any]", Any]


class Entry(Generic[_Row]):
    """The calls for one key, and the row that is flushed for them."""

    __slots__ = ("calls", "chosen", "row", "since", "size")

    row: _Row
    size: int
    chosen: "asyncio.Future[Any]"  # of the caller whose item is the row

    def __init__(self, call: _Call) -> None:
        self.calls = [call]
        self.since = time.perf_counter()

    @property
    def is_wanted(self) -> bool:
        """Whether a caller is still waiting."""
        return any(not future.done() for _, future, _ in self.calls)


_Batch = dict[_Key, Entry[_Row]]


class Batcher(Generic[_Key, _Item, _Row, _Answer]):
    """Gathers calls by key and flushes them in batches.

    A call returns when its batch has been flushed. Several calls for one key in a batch are flushed
    as one: the last of the highest rank. Two concurrent flushes never contain the same key, so
    later calls for a key are flushed later. A call that is cancelled before its flush is dropped; a
    cancellation never reaches the flush of a batch.

    If a flush fails with an error that a single row can cause, the batch is halved until that row
    is alone. Its caller gets the error, or an earlier call for the same key is tried.

    Args:
        flush: Flushes a batch, given as entries by key, and returns the answers by key; callers
            of keys without an answer get None.
        encode: Converts a key and its item to a row; called only for calls that are flushed. Its
            exceptions go to the caller.
        size: The size of a row in bytes.
        rank: The rank of an item, of any comparable type; used if a key has several calls.
        max_rows: The most keys in a batch.
        lanes: The most concurrent flushes.
        on_unclaimed: If given, only the first caller of a key gets the answer, and the others get
            None. Called with the key and the answer if no caller is left.
        window: Decides which calls wait for others; None for no waiting.
        meter: Counts calls and batches.
    """

    def __init__(
        self,
        flush: Callable[[Mapping[_Key, Entry[_Row]]], Awaitable[Mapping[_Key, _Answer]]],
        *,
        encode: Callable[[_Key, _Item], _Row],
        size: Callable[[_Row], int] = lambda _: 0,
        rank: Callable[[_Item], Any] = lambda _: 0,
        max_rows: int = MAX_ROWS,
        lanes: int = 2,
        on_unclaimed: Callable[[_Key, _Answer], None] | None = None,
        window: Window | None = None,
        meter: BatchMeter | None = None,
    ) -> None:
        self._flush = flush
        self._meter = meter or BatchMeter()
        self._encode = encode
        self._size = size
        self._rank = rank
        self._max_rows = max_rows
        self._max_lanes = lanes
        self._on_unclaimed = on_unclaimed
        self._pending: OrderedDict[_Key, Entry[_Row]] = OrderedDict()
        self._in_flight: set[_Key] = set()
        # Calls for keys in flight; they become pending when that flush is over.
        self._held: dict[_Key, Entry[_Row]] = {}
        # Each is done when its flush is over.
        self._lanes: set[asyncio.Future[None]] = set()
        self._lone = _LonePath(self._carry_out, self._begin_lane, self._end_lane)
        self._is_opening = False
        self._window = window
        self._timer: asyncio.TimerHandle | None = None  # while the window is open
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._meter.queues.append(self)

    @property
    def pending(self) -> int:
        """The number of keys with unanswered calls."""
        return len(self._pending) + len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether no call is pending or in flight."""
        return not (self._lanes or self._pending or self._held)

    async def submit(self, key: _Key, item: _Item) -> _Answer | None:
        """Flushes the item with others, and returns the answer for the key.

        Raises:
            NotStartedError: After close().
            StorageError: The flush failed.
            CancelledError: The caller was cancelled.
        """
        if self._is_closed:
            raise NotStartedError("it was shut down: call startup() again")
        meter = self._meter
        meter.calls += 1
        future: asyncio.Future[_Answer | None] = self._loop.create_future()
        call = (item, future, meter.caller() if meter.is_tracing else None)
        if self._window is not None and self._window.is_worth_waiting():
            self._open_window(self._window)
        elif self._timer is not None:
            self._close_window()
        # Not if the answer must survive its caller: a lone call is flushed in the caller's task.
        elif self._lone.is_quiet and self.is_idle and self._on_unclaimed is None:
            alone: _Answer | None = await self._lone.flush(key, self._encode(key, item), call)
            return alone
        entries = self._held if key in self._in_flight else self._pending
        entry = entries.get(key)
        if entry is None:
            entries[key] = Entry(call)
        else:
            entry.calls.append(call)
        self._open_lanes_soon()
        try:
            return await future
        except asyncio.CancelledError:
            # The answer may have arrived in the same iteration of the event loop.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_up(key, future.result())
            raise

    async def close(self) -> None:
        """Refuses new calls, and returns when all earlier ones have been flushed."""
        self._is_closed = True
        self._close_window()
        while not self.is_idle:
            self._open_lanes()
            if self._lanes:
                await asyncio.wait(self._lanes)
        if self in self._meter.queues:
            self._meter.queues.remove(self)

    def _open_window(self, window: Window) -> None:
        if self._timer is None:
            window.open()
            self._wait_for_more(window)
        elif len(self._pending) >= self._max_rows:
            self._close_window()

    def _wait_for_more(self, window: Window) -> None:
        seconds = window.seconds_left
        if seconds > 0:
            again, empty = self._wait_for_more, Context()
            self._timer = self._loop.call_later(seconds, again, window, context=empty)
        else:
            window.close()
            self._close_window()

    def _close_window(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._open_lanes_soon()

    def _open_lanes_soon(self) -> None:
        # After all calls of this iteration, or after the window has closed.
        if self._timer is not None:
            return
        if not self._is_opening and len(self._lanes) < self._max_lanes:
            self._is_opening = True
            self._loop.call_soon(self._open_lanes)

    def _open_lanes(self) -> None:
        self._is_opening = False
        while self._pending and len(self._lanes) < self._max_lanes:
            batch = self._next_batch()
            if batch:
                self._lone.is_quiet = len(batch) == 1
                lane = start_task(self._run_lane(batch))
                self._begin_lane(batch, lane)
                # In case it is cancelled before it runs.
                lane.add_done_callback(partial(self._end_lane, batch))

    async def _run_lane(self, batch: _Batch[_Key, _Row]) -> None:
        lane = asyncio.current_task()
        assert lane is not None
        try:
            await self._settle(batch)
        finally:
            # Not left to the callback, which runs an iteration later: a caller with an answer may
            # call again before that, and would find the lane busy.
            self._end_lane(batch, lane)

    def _begin_lane(self, batch: _Batch[_Key, _Row], lane: "asyncio.Future[None]") -> None:
        self._lanes.add(lane)
        self._in_flight.update(batch)

    def _end_lane(self, batch: _Batch[_Key, _Row], lane: "asyncio.Future[None]") -> None:
        if lane not in self._lanes:
            return
        self._lanes.remove(lane)
        for _, future, _ in _calls_of(batch):
            future.cancel()  # unanswered, because the flush was cancelled
        self._in_flight.difference_update(batch)
        for key in batch.keys() & self._held.keys():
            self._pending[key] = self._held.pop(key)
        if self._pending:
            # By then, callers with an answer may have called again, and join the batch.
            self._open_lanes_soon()

    def _next_batch(self) -> _Batch[_Key, _Row]:
        pending, limit = self._pending, self._max_rows
        if len(pending) >= _MIN_SHARED:
            lone = int(self._lone.is_flushing)  # it takes a lane, but no share
            under_way = len(pending) + len(self._in_flight) - lone
            limit = min(limit, -(-under_way // (self._max_lanes - lone)))
        batch: _Batch[_Key, _Row] = {}
        room = MAX_BYTES
        while pending and len(batch) < limit:
            key, entry = pending.popitem(last=False)
            if not self._prepare(key, entry):
                continue
            room -= entry.size
            if room < 0 and batch:
                pending[key] = entry
                pending.move_to_end(key, last=False)
                break
            batch[key] = entry
        return batch

    def _prepare(self, key: _Key, entry: Entry[_Row]) -> bool:
        """Chooses a call and encodes its row; returns False if no caller is left."""
        while True:
            calls = entry.calls
            if len(calls) > 1 or calls[0][1].done():  # rare, and slower
                entry.calls = calls = [call for call in calls if not call[1].done()]
                if not calls:
                    return False
                call = max(reversed(calls), key=lambda call: self._rank(call[0]))
            else:
                call = calls[0]
            item, entry.chosen, _ = call
            try:
                entry.row = self._encode(key, item)
                entry.size = self._size(entry.row)
            except BaseException as exc:  # noqa: BLE001 - it goes to this caller only
                entry.chosen.set_exception(exc)
            else:
                return True

    async def _settle(self, batch: _Batch[_Key, _Row]) -> None:
        while batch:
            try:
                answers = await self._carry_out(batch)
            except Exception as exc:  # noqa: BLE001 - it goes to the callers
                if not blames_a_row(exc):
                    _fail(batch, exc)
                    return
                if len(batch) > 1:
                    for half in _halves(batch):
                        await self._settle(half)
                    return
                [(key, entry)] = batch.items()
                _fail(batch, exc, entry.chosen)
                if not self._prepare(key, entry):
                    return
            else:
                self._answer(batch, answers)
                return

    async def _carry_out(self, batch: _Batch[_Key, _Row]) -> Mapping[_Key, _Answer]:
        span = self._meter.flushing(batch.values())
        if span is None:
            return await self._flush(batch)
        with span:
            return await self._flush(batch)

    def _answer(self, batch: _Batch[_Key, _Row], answers: Mapping[_Key, _Answer]) -> None:
        for key, entry in batch.items():
            answer = answers.get(key)
            for _, future, _ in entry.calls:
                if not future.done():
                    future.set_result(answer)
                    if self._on_unclaimed is not None:
                        answer = None
            self._give_up(key, answer)

    def _give_up(self, key: _Key, answer: _Answer | None) -> None:
        if self._on_unclaimed is not None and answer is not None:
            self._on_unclaimed(key, answer)


_Lane = Callable[[_Batch[Any, Any], "asyncio.Future[None]"], None]


class _LonePath:
    """Flushes a call in its caller's task if no other call is under way.

    That saves two iterations of the event loop, a quarter of a single caller's waiting time. A
    cancellation affects no other call. It counts as a lane.

    Attributes:
        is_quiet: Whether the last batch had one call only. If calls come together, one that is
            flushed alone would miss the batch of the others.
    """

    def __init__(
        self,
        carry_out: Callable[[_Batch[Any, Any]], Awaitable[Mapping[Any, Any]]],
        begin: _Lane,
        end: _Lane,
    ) -> None:
        self._carry_out = carry_out
        self._begin = begin
        self._end = end
        self.is_quiet = True
        self.is_flushing = False

    async def flush(self, key: Any, row: Any, call: _Call) -> Any:
        entry: Entry[Any] = Entry(call)
        entry.row, entry.chosen = row, call[1]
        batch, lane = {key: entry}, asyncio.get_running_loop().create_future()
        self._begin(batch, lane)
        self.is_flushing = True
        try:
            answers = await self._carry_out(batch)
        except StorageError as exc:
            raise _about(key, exc) from exc.__cause__
        finally:
            self.is_flushing = False
            lane.set_result(None)
            self._end(batch, lane)
        return answers.get(key)


def blames_a_row(exc: BaseException) -> bool:
    """Whether a single row may have caused the error, so that the others could be stored."""
    if isinstance(exc, StorageError):
        return (exc.sqlstate or "")[:2] in _BLAMING_A_ROW or is_unfit_value(exc.__cause__)
    return isinstance(exc, ResultDecodeError)


def _calls_of(batch: _Batch[Any, Any]) -> Iterator[_Call]:
    return (call for entry in batch.values() for call in entry.calls)


def _fail(
    batch: _Batch[Any, Any], exc: Exception, chosen: "asyncio.Future[Any] | None" = None
) -> None:
    """Raises the error in all callers of a batch, or only in the chosen one."""
    for key, entry in batch.items():
        for _, future, _ in entry.calls:
            if not future.done() and chosen in {None, future}:
                future.set_exception(_about(key, exc))


def _about(key: Any, exc: Exception) -> Exception:
    """The error of a batch, with the task id of the caller."""
    if not isinstance(exc, StorageError):
        return exc
    error = StorageError(f"task {str(key)!r}: {exc}", exc.sqlstate)
    error.__cause__ = exc.__cause__
    return error


def _halves(batch: _Batch[Any, Any]) -> Iterable[_Batch[Any, Any]]:
    middle = len(batch) // 2
    yield dict(islice(batch.items(), middle))
    yield dict(islice(batch.items(), middle, None))
