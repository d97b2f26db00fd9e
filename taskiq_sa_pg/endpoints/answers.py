"""The responses of the endpoints: models for OpenAPI, and values that JSON does not support."""

import json
import re
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

from taskiq_sa_pg.results import Outcome, TaskDetails, TaskRecord, TaskStatus

_MAX_DESCRIPTION: Final = 500
_POSITION: Final = re.compile(r"-?\d+")
_ADDRESS: Final = re.compile(r" at 0x[0-9A-Fa-f]+")

State = Literal["pending", "queued", "started", "retrying", "lost", "succeeded", "failed"]


class _Answer(BaseModel):
    # Fields that are always present are required in OpenAPI, so that clients need not check them.
    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class TaskError(_Answer):
    """The error of a failed task."""

    type: str = Field(description="The name of the exception's class, without its module.")
    message: str


class Progress(_Answer):
    """The latest progress of a task."""

    state: str = Field(description="STARTED, or another state that the task sets.")
    meta: Any = None


class TaskAnswer(_Answer):
    """A task: its status and, once it has finished, its result."""

    task_id: str
    state: State = Field(
        description="succeeded (with a value) or failed (with an error). Before that: queued, "
        "started, retrying or lost; or pending if nothing else is known."
    )
    task_name: str | None = None
    attempt: int = Field(default=0, description="0 for the first attempt; each retry adds one.")
    queued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    execution_time: float | None = Field(default=None, description="Seconds.")
    progress: Progress | None = Field(default=None, description="Null after the task has finished.")
    value: Any = Field(default=None, description="The return value.")
    error: TaskError | None = None


class TaskSummary(_Answer):
    """A finished task in a list, without its value."""

    model_config = ConfigDict(from_attributes=True)

    task_id: str
    outcome: Outcome
    task_name: str | None
    worker: str | None
    attempt: int
    error_type: str | None
    execution_time: float
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime
    expires_at: datetime | None
    labels: dict[str, Any]


class TaskPage(_Answer):
    """Finished tasks, latest first."""

    records: list[TaskSummary]
    next: str | None = Field(
        default=None,
        description="Pass it as `after` to get the next page; null on the last page.",
    )


class Problem(_Answer):
    """The reason of an error response."""

    detail: str


def _without_nul(text: str) -> str:
    if "\x00" in text:
        raise ValueError("must not contain a NUL character")
    return text


def _pair(text: str) -> str:
    if "=" not in text:
        raise ValueError("must be NAME=VALUE")
    return text


_Text = Annotated[str, AfterValidator(_without_nul)]
_Pair = Annotated[_Text, AfterValidator(_pair)]


class TaskQuery(BaseModel):
    """Which finished tasks to list, from the query of the URL."""

    outcome: Outcome | None = None
    name: _Text | None = Field(default=None, description="The task's name.")
    worker: _Text | None = Field(default=None, description="The worker that executed the task.")
    label: list[_Pair] = Field(default=[], description="NAME=VALUE; all given pairs must match.")
    argument: list[_Text] = Field(
        default=[],
        description="NAME=VALUE for a keyword argument, 0=VALUE for the first positional one, "
        "-1=VALUE for the last; or VALUE for any argument (=VALUE if it contains a =). All given "
        "pairs must match.",
    )
    window: float | None = Field(
        default=None,
        gt=0,
        le=1e10,
        description="How many seconds to look back; no limit by default.",
    )
    after: _Text | None = Field(default=None, description="`next` of the previous page.")
    limit: int = Field(default=50, ge=1, le=500, description="Maximum number of tasks per page.")

    @property
    def labels(self) -> dict[str, str] | None:
        """The labels by name; None if there are none.

        Raises:
            ValueError: A label has two values.
        """
        return _by_name("label", self.label) or None

    @property
    def arguments(self) -> dict[str | int, str] | str | None:
        """The arguments by name or position; a str matches any argument; None if there are none.

        Raises:
            ValueError: One of several arguments has no name, or an argument has two values.
        """
        # The same syntax as in `taskiq-sa-pg list --arg`.
        if len(self.argument) == 1 and self.argument[0].find("=") <= 0:
            return self.argument[0].removeprefix("=")
        if not all("=" in pair for pair in self.argument):
            raise ValueError("several arguments must all be NAME=VALUE")
        pairs = _by_name("argument", self.argument).items()
        return {
            int(name) if _POSITION.fullmatch(name) else name: value for name, value in pairs
        } or None


def _by_name(parameter: str, pairs: list[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if values.setdefault(name, value) != value:
            raise ValueError(f"{parameter} {name!r} must not have two values")
    return values


def _state_of(status: TaskStatus) -> State:
    match status.state:
        case "unknown" | "expired":
            return "pending"
        case state:
            return state


def unfinished(status: TaskStatus, progress: Progress | None) -> TaskAnswer:
    """Returns the answer for a task that has no result yet."""
    return TaskAnswer(
        task_id=status.task_id,
        state=_state_of(status),
        task_name=status.task_name,
        attempt=status.attempt,
        queued_at=status.queued_at,
        started_at=status.started_at,
        progress=progress,
    )


def finished(details: TaskDetails) -> TaskAnswer:
    """Returns the answer for a finished task; a failure if its result cannot be decoded."""
    record, result = details.record, details.result
    state: Outcome = "failed" if result is None else record.outcome
    value = error = None
    if result is None:
        error = TaskError(type="ResultDecodeError", message="the stored result cannot be read")
    elif record.outcome == "failed":
        error = error_of(record, result.error)
    else:
        value = result.return_value
    return TaskAnswer(
        task_id=record.task_id,
        state=state,
        task_name=record.task_name,
        attempt=record.attempt,
        queued_at=record.queued_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        execution_time=record.execution_time,
        value=value,
        error=error,
    )


def error_of(record: TaskRecord, error: BaseException | None) -> TaskError:
    """Returns the error of a failed task, even if its exception cannot be converted to text."""
    name = record.error_type or type(error).__name__
    try:
        message = "" if error is None else str(error)
    except Exception:  # noqa: BLE001 - the class is the application's
        message = ""
    return TaskError(type=name.rpartition(".")[2], message=message)


def to_json(answer: BaseModel) -> bytes:
    """Returns the JSON of an answer; values that JSON does not support become a description.

    Bytes become base64, NaN and infinity become null. Objects of custom classes, cyclic or deeply
    nested values, and too large numbers become a string that describes them.
    """
    fields = dict(answer)
    try:
        return _dump(fields)
    except Exception:  # noqa: BLE001 - values, and the code of their classes, are the application's
        return _dump({name: _or_description(value) for name, value in fields.items()})


def _dump(value: Any) -> bytes:
    plain = to_jsonable_python(value, bytes_mode="base64", inf_nan_mode="null", fallback=_describe)
    # In ASCII, because lone surrogates have no other encoding.
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()


def _or_description(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {name: _or_description(each) for name, each in dict(value).items()}
    if isinstance(value, list) and all(isinstance(each, BaseModel) for each in value):
        return list(map(_or_description, value))
    try:
        _dump(value)
    except Exception:  # noqa: BLE001 - as above
        return _describe(value)
    return value


def _describe(value: object) -> str:
    """Describes a value by its repr(), without memory addresses."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - as above
        text = f"<{type(value).__qualname__}>"
    return _ADDRESS.sub("", text)[:_MAX_DESCRIPTION]
