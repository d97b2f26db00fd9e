"""Tables of taskiq-postgres, written and read by its own result backend."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress, TaskState
from taskiq_pg.asyncpg import AsyncpgResultBackend

from taskiq_sa_pg import SQLAlchemyResultBackend

Old = AsyncpgResultBackend

VALUES: list[Any] = [
    *(None, True, 0, 1, -(2**63), 2**70, 0.1, -0.0, 1e300, "", "text", "ünï 😀 \\ ' % \n"),
    *([], {}, [1, [2, [3, {"four": [None]}]]], {"a": {"b": [1.5, "c"]}}, "x" * 300_000),
    *(
        b"bytes",
        (1, "two"),
        {3},
        datetime(2026, 1, 2, tzinfo=UTC),
        Decimal("1.50"),
        uuid.UUID(int=7),
    ),
    {"when": datetime(2026, 1, 2, tzinfo=UTC), "NUL": "a\x00b"},
]


class Unfit(Exception):
    """An error whose constructor does not take its args."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")


def _chained() -> Exception:
    try:
        try:
            raise KeyError("inner", 1)
        except KeyError as exc:
            raise RuntimeError("outer", [2, None]) from exc
    except RuntimeError as exc:
        return exc


def _unknown() -> Exception:
    cls: type[Exception] = type("OutOfStock", (ValueError,), {"__module__": "a_shop.errors"})
    return cls("apples", 3)


ERRORS: list[BaseException] = [
    *(ValueError("with", "arguments", 3), KeyError(), OSError(2, "no such file"), SystemExit(3)),
    *(
        Unfit(1, detail="d"),
        _chained(),
        _unknown(),
        asyncio.CancelledError(),
        ValueError("\x00 😀"),
    ),
]


def results() -> list[TaskiqResult[Any]]:
    """One of every kind."""
    labels = {"queue": "ü", "n": 1, "nested": {"a": [None, 2.5]}, "_retries": "2"}
    return [
        *[TaskiqResult(is_err=False, return_value=v, execution_time=0.25) for v in VALUES],
        *[
            TaskiqResult(
                is_err=True, return_value=None, execution_time=1e-9, error=e, labels=labels
            )
            for e in ERRORS
        ],
        TaskiqResult(is_err=False, return_value=1, execution_time=2, log="a log\nü\x00"),
        TaskiqResult(is_err=True, return_value="both", execution_time=2, error=None, labels=labels),
    ]


PROGRESS: list[TaskProgress[Any]] = [
    TaskProgress(state=TaskState.STARTED, meta={"done": 1, "ü": [None]}),
    TaskProgress(state="a state of their own", meta=None),
    TaskProgress(state="", meta="text"),
]


@asynccontextmanager
async def old_backend(dsn: str, table_name: str = "old", **kwargs: Any) -> AsyncIterator[Old]:
    """Its result backend on a table that it makes."""
    old = AsyncpgResultBackend(dsn, table_name=table_name, min_size=1, max_size=4, **kwargs)
    await old.startup()
    try:
        yield old
    finally:
        await old.shutdown()


async def fill(old: Old, repeat: int = 2) -> tuple[list[str], list[str]]:
    """Stores results and progress of every kind; the ids of those with either."""
    kinds = results() * repeat
    with_result = [uuid.uuid4().hex for _ in kinds]
    await _all(old.set_result(i, r) for i, r in zip(with_result, kinds, strict=True))
    # Most of it of tasks that have no result.
    kinds_of_progress = PROGRESS * repeat
    with_progress = [uuid.uuid4().hex for _ in kinds_of_progress] + with_result[: len(PROGRESS)]
    await _all(
        old.set_progress(i, p)
        for i, p in zip(with_progress, [*kinds_of_progress, *PROGRESS], strict=True)
    )
    return with_result, with_progress


async def _all(calls: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*calls)


def value(number: int) -> TaskiqResult[Any]:
    return TaskiqResult(is_err=False, return_value=number, execution_time=0.5)


async def fill_plainly(old: Old, count: int) -> list[str]:
    """Stores as many small results; their ids in the order of the column."""
    task_ids = [f"task-{number:05}" for number in range(count)]
    await _all(old.set_result(task_id, value(n)) for n, task_id in enumerate(task_ids))
    return task_ids


def described(result: TaskiqResult[Any]) -> dict[str, Any]:
    """All that can be compared, with the types of the values."""
    return {
        "is_err": result.is_err,
        "return_value": json.dumps(result.return_value, sort_keys=True),
        "execution_time": result.execution_time,
        "labels": json.dumps(result.labels, sort_keys=True),
        "log": result.log and result.log.replace("\x00", "\\x00"),
        "error": _describe_error(result.error),
    }


def _describe_error(error: BaseException | None) -> Any:
    if error is None:
        return None
    chain = [_describe_error(error.__cause__), _describe_error(error.__context__)]
    # Of a class that is not imported the module differs: taskiq puts its own there.
    return [type(error).__qualname__, error.args, str(error), error.__suppress_context__, *chain]


async def assert_same(
    old: Old, ours: SQLAlchemyResultBackend[Any], with_result: list[str], with_progress: list[str]
) -> None:
    """Everything reads from ours as it reads from the old table."""
    for task_id in with_result:
        expected = await old.get_result(task_id, with_logs=True)
        assert described(await ours.get_result(task_id, with_logs=True)) == described(expected)
    for task_id in with_progress:
        assert await ours.get_progress(task_id) == await old.get_progress(task_id)
    for task_id in set(with_progress) - set(with_result):
        assert not await ours.is_result_ready(task_id)
