"""Group commit: many concurrent calls become few statements.

A call that finds a lane free is flushed at once, together with those of the same turn of the event
loop; calls that come while all lanes are busy gather and go with the next flush. There is no timer:
a lone call waits for nobody, and a busy backend sends ever larger batches.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from taskiq_sa_pg.exceptions import NotStartedError, ResultDecodeError, StorageError
from taskiq_sa_pg.faults import is_unfit_value
from taskiq_sa_pg.telemetry import BatchMeter

_Key = TypeVar("_Key", bound=Hashable)
_Item = TypeVar("_Item")
_Row = TypeVar("_Row")
_Answer = TypeVar("_Answer")

MAX_ROWS: Final = 500
MAX_BYTES: Final = 8_000_000

# From this many keys on a batch leaves the other lanes their share of all that are under way: the
# client then encodes the one while the server stores the other, and no lane is left with crumbs,
# of which it would send many while another is busy. Below, a second statement costs more.
_MIN_SHARED: Final = 32

# Classes of SQLSTATE that blame a row: a refused batch is worth trying in parts. "P0" are the
# errors of triggers. https://www.postgresql.org/docs/18/errcodes-appendix.html
_BLAMING_A_ROW: Final = frozenset({"21", "22", "23", "27", "44", "54", "P0"})


# What a caller brought, the future that it awaits, who it is where that is traced, and the task
# that its errors name.
_Call = tuple[Any, "asyncio.Future[Any]", Any, str | None]


class Entry(Generic[_Row]):
    """The calls for one key, and the row that stands for them in a flush."""

    __slots__ = ("calls", "chosen", "row", "since", "size")

    row: _Row
    size: int
    chosen: "asyncio.Future[Any]"  # of the caller whose row it is

    def __init__(self, call: _Call) -> None:
        self.calls = [call]
        self.since = time.perf_counter()

    @property
    def is_wanted(self) -> bool:
        """Whether a caller is still there."""
        return any(not future.done() for _, future, *_ in self.calls)


class Batcher(Generic[_Key, _Item, _Row, _Answer]):
    """Gathers calls by key and flushes them in batches.

    A call returns when its batch has been flushed. Calls for the same key in one batch are flushed
    as one: the last of the highest rank. Two flushes at the same time never hold the same key, so
    later calls for a key are flushed later. A call that is cancelled before its flush is left out;
    no cancellation reaches a flush.

    Where a flush fails and the error blames a row, the batch is halved until the guilty row stands
    alone: its caller gets the error, or an earlier call for the same key has its turn.

    Args:
        flush: Carries out a batch, of which it gets the entries by key, and returns the answers
            by key; where there is none, the callers get None.
        encode: Makes a key and its item into a row; only those that are flushed. What it raises,
            the caller gets.
        size: The bytes of a row.
        rank: The rank of an item, whatever it is; asked where a key has several calls.
        max_rows: The most keys in a batch.
        lanes: The most flushes at a time.
        is_shared: Whether all callers of a key get its answer; else the first alone gets it, and
            the others None.
        meter: Counts calls and batches.
    """

    def __init__(
        self,
        flush: Callable[[Mapping[_Key, Entry[_Row]]], Awaitable[Mapping[_Key, _Answer]]],
        *,
        encode: Callable[[_Key, _Item], _Row],
        size: Callable[[_Row], int] = lambda _: 0,
        rank: Callable[[_Item], int] = lambda _: 0,
        max_rows: int = MAX_ROWS,
        lanes: int = 2,
        is_shared: bool = True,
        meter: BatchMeter | None = None,
    ) -> None:
        self._flush = flush
        self._meter = meter or BatchMeter()
        self._meter.watch(self)
        self._encode = encode
        self._size = size
        self._rank = rank
        self._max_rows = max_rows
        self._max_lanes = lanes
        self._is_shared = is_shared
        self._pending: OrderedDict[_Key, Entry[_Row]] = OrderedDict()
        self._in_flight: set[_Key] = set()
        # Calls for keys in flight; they join those pending when that flush is over.
        self._held: dict[_Key, Entry[_Row]] = {}
        self._lanes: set[asyncio.Task[None]] = set()
        self._starting: asyncio.Task[None] | None = None
        # Of the caller that flushes its own call.
        self._alone: list[asyncio.Future[Any]] = []
        # Whether calls come one by one, as far as the last batch can tell.
        self._is_quiet = True
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    @property
    def pending(self) -> int:
        """How many keys have calls that are not answered yet."""
        return len(self._pending) + len(self._in_flight)

    def submit(
        self, key: _Key, item: _Item, task_id: str | None = None
    ) -> Awaitable[_Answer | None]:
        """The answer for the key, once the item has been flushed; to be awaited at once.

        No coroutine of its own, which would cost every call more than its place in the batch.

        Args:
            key: Whose item it is.
            item: What is flushed.
            task_id: What a StorageError is to name.

        Raises:
            NotStartedError: After close().
            StorageError: Of the flush, as it is awaited.
        """
        if self._is_closed:
            raise NotStartedError("the result backend was shut down: call startup() again")
        meter = self._meter
        meter.calls += 1
        future: asyncio.Future[_Answer | None] = self._loop.create_future()
        call = (item, future, meter.caller() if meter.is_tracing else None, task_id)
        if self._is_quiet and not self._lanes and not self._in_flight and not self._pending:
            lone: Entry[_Row] = Entry(call)
            lone.chosen, lone.row = future, self._encode(key, item)
            self._in_flight.add(key)
            self._alone.append(future)
            return self._flush_alone({key: lone})
        entries = self._held if key in self._in_flight else self._pending
        entry = entries.get(key)
        if entry is None:
            entries[key] = Entry(call)
        else:
            entry.calls.append(call)
        if self._starting is None and len(self._lanes) < self._max_lanes:
            self._start_lane()
        return future

    async def close(self) -> None:
        """Refuses further calls, and returns when all earlier ones have been flushed."""
        self._is_closed = True
        while self._pending or self._lanes or self._alone:
            self._start_lane()
            await asyncio.wait([*self._lanes, *self._alone])

    async def _flush_alone(self, batch: dict[_Key, Entry[_Row]]) -> _Answer | None:
        # In the caller's own task, which spares two turns of the event loop and touches nobody
        # else when it is cancelled.
        [(key, entry)] = batch.items()
        try:
            span = self._meter.flushing(batch.values())
            flush = self._flush(batch)
            answers = await (flush if span is None else _within(span, flush))
            return answers.get(key)
        except StorageError as exc:
            [(_, _, _, task_id)] = entry.calls
            raise _about(task_id, exc) from exc.__cause__
        finally:
            self._alone.clear()
            entry.chosen.cancel()  # close() may wait for it
            self._in_flight.discard(key)
            if self._held or self._pending:
                self._release(batch)
                self._start_lane()

    def _start_lane(self) -> None:
        # One at a time: it may find little to do, once the calls of this turn are all there.
        if self._starting is not None or not self._pending:
            return
        if len(self._lanes) + len(self._alone) < self._max_lanes:
            self._starting = lane = self._loop.create_task(self._run_lane())
            self._lanes.add(lane)
            lane.add_done_callback(self._end_lane)

    def _end_lane(self, lane: asyncio.Task[None]) -> None:
        self._lanes.discard(lane)
        if self._starting is lane:  # cancelled before it ran
            self._starting = None
        self._start_lane()  # one that was cancelled leaves calls behind

    async def _run_lane(self) -> None:
        lane, self._starting = self._starting, None
        assert lane is not None
        try:
            while batch := self._next_batch():
                self._start_lane()
                await self._carry_out(batch)
                if len(batch) > 1:
                    await asyncio.sleep(0)  # who was answered may call again, and goes along
        finally:
            # Not left to the callback, which comes a turn later: a call may come before it.
            self._end_lane(lane)

    def _next_batch(self) -> dict[_Key, Entry[_Row]]:
        pending, limit = self._pending, self._max_rows
        if len(pending) >= _MIN_SHARED:
            lone = len(self._alone)
            under_way = len(pending) + len(self._in_flight) - lone
            limit = min(limit, -(-under_way // (self._max_lanes - lone)))
        batch: dict[_Key, Entry[_Row]] = {}
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
        self._in_flight.update(batch)
        if batch:
            self._is_quiet = len(batch) == 1
        return batch

    def _prepare(self, key: _Key, entry: Entry[_Row]) -> bool:
        """Chooses a call and encodes its row; False where no caller is left."""
        while True:
            calls = entry.calls
            if len(calls) > 1 or calls[0][1].done():  # which is rare, and would take longer
                entry.calls = calls = [call for call in calls if not call[1].done()]
                if not calls:
                    return False
                call = max(reversed(calls), key=lambda call: self._rank(call[0]))
            else:
                call = calls[0]
            item, entry.chosen, _, _ = call  # not *_, which makes a list for every call
            try:
                entry.row = self._encode(key, item)
                entry.size = self._size(entry.row)
            except Exception as exc:  # noqa: BLE001 - it is the caller's
                entry.chosen.set_exception(exc)
            else:
                return True

    async def _carry_out(self, batch: dict[_Key, Entry[_Row]]) -> None:
        try:
            await self._settle(batch)
        except BaseException:  # the flush was cancelled
            for _, future, *_ in _calls_of(batch):
                future.cancel()
            raise
        finally:
            self._release(batch)

    def _release(self, keys: Iterable[_Key]) -> None:
        self._in_flight.difference_update(keys)
        if self._held:
            for key in keys:
                if key in self._held:
                    self._pending[key] = self._held.pop(key)

    async def _settle(self, batch: dict[_Key, Entry[_Row]]) -> None:
        while batch:
            try:
                span = self._meter.flushing(batch.values())
                flush = self._flush(batch)
                answers = await (flush if span is None else _within(span, flush))
            except Exception as exc:  # noqa: BLE001 - it is the callers'
                if not blames_a_row(exc):
                    _fail(_calls_of(batch), exc)
                    return
                if len(batch) > 1:
                    for half in _halves(batch):
                        await self._settle(half)
                    return
                [(key, entry)] = batch.items()
                _fail([call for call in entry.calls if call[1] is entry.chosen], exc)
                if not self._prepare(key, entry):
                    return
            else:
                self._answer(batch, answers)
                return

    def _answer(
        self,
        batch: dict[_Key, Entry[_Row]],
        answers: Mapping[_Key, _Answer],
    ) -> None:
        for key, entry in batch.items():
            answer = answers.get(key)
            for _, future, _, _ in entry.calls:
                if not future.done():
                    future.set_result(answer)
                    if not self._is_shared:
                        answer = None


def blames_a_row(exc: BaseException) -> bool:
    """Whether one row may be at fault, and the others could be stored without it."""
    if isinstance(exc, StorageError):
        return (exc.sqlstate or "")[:2] in _BLAMING_A_ROW or is_unfit_value(exc.__cause__)
    return isinstance(exc, ResultDecodeError)


async def _within(span: AbstractContextManager[Any], flush: Awaitable[_Answer]) -> _Answer:
    with span:
        return await flush


def _calls_of(batch: Mapping[Any, Entry[Any]]) -> Iterator[_Call]:
    return (call for entry in batch.values() for call in entry.calls)


def _fail(calls: Iterable[_Call], exc: Exception) -> None:
    for _, future, _, task_id in calls:
        if not future.done():
            future.set_exception(_about(task_id, exc))


def _about(task_id: str | None, exc: Exception) -> Exception:
    """The error that a batch met, as it is told to the caller who asked about this task."""
    if task_id is None or not isinstance(exc, StorageError):
        return exc
    error = StorageError(f"task {task_id!r}: {exc}", exc.sqlstate)
    error.__cause__ = exc.__cause__
    return error


def _halves(batch: dict[_Key, Any]) -> Iterator[dict[_Key, Any]]:
    middle = len(batch) // 2
    yield dict(islice(batch.items(), middle))
    yield dict(islice(batch.items(), middle, None))
