"""What the tests store: task ids, results and progress."""

from typing import Any
from uuid import uuid4

from taskiq import TaskiqResult
from taskiq.depends.progress_tracker import TaskProgress


def new_id() -> str:
    return uuid4().hex


def result_of(value: Any, **fields: Any) -> TaskiqResult[Any]:
    """A success with this return value, unless the fields say otherwise."""
    return TaskiqResult(
        **{"is_err": False, "return_value": value, "execution_time": 0.25, **fields}
    )


def progress_of(meta: Any, state: Any = "running") -> TaskProgress[Any]:
    return TaskProgress(state=state, meta=meta)
