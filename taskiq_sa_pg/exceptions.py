"""The errors of the package, all of them TaskiqSaPgError, and the checks of arguments.

Each is rebuilt from its `args`, so that it survives pickle and a result backend.
"""

import inspect
from difflib import get_close_matches
from math import inf
from typing import Any

from taskiq.exceptions import ResultBackendError, ResultGetError, ResultSetError


class TaskiqSaPgError(ResultBackendError):
    """Anything that this package raises on its own account."""

    # The text, made of `args`; not taskiq's `__template__`, which is made of keywords.
    _text = ""

    def __init__(self, *args: object) -> None:
        super().__init__()
        # taskiq's errors take keywords and keep the formatted text alone in `args`.
        self.args = args

    # taskiq before 0.13 copies and pickles its errors by their keywords, and we have none.
    __copy__ = __deepcopy__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, vars(self)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(map(repr, self.args))})"

    @property
    def message(self) -> str:
        """What happened, to what, and what mends it."""
        return self._text.format(*self.args) if self._text else " ".join(map(str, self.args))


class ConfigurationError(TaskiqSaPgError, ValueError):
    """An argument that cannot work, such as a name, a type, an address or a limit.

    Or an engine that was given and prepares statements behind a pooler, which shows as it connects.
    """


class NotStartedError(TaskiqSaPgError, RuntimeError):
    """The broker or the result backend was used before `startup()` or after `shutdown()`."""


class InvalidTaskIdError(TaskiqSaPgError, ValueError):
    """A task id that the task-id column cannot hold. Its args: the task id, the reason."""

    _text = "task id {!r} {}"


class TaskAbandonedError(TaskiqSaPgError):
    """Nobody will finish a task. Its args: the task id, how often it was delivered, the worker.

    SQLAlchemyBroker stores a result with this error for a task that was delivered too often and
    never acknowledged; it has no worker. TaskMetadataMiddleware, with abandon_lost=True, stores one
    for a task that was lost with its worker; how often it was delivered is None.
    """

    _text = (
        "task {!r} was delivered {} times and never acknowledged: its workers died, or it blocked "
        "their event loop for longer than the lease. It is parked, and `taskiq-sa-pg release` or "
        "`discard` decides what becomes of it"
    )
    _text_of_lost = (
        "task {!r} was lost: its worker {} was killed, cannot reach the database or blocks its "
        "event loop, and has not been seen for a minute. If the task may run twice, send it again"
    )

    @property
    def message(self) -> str:
        """What happened, to what, and what mends it."""
        if len(self.args) > 2:
            return self._text_of_lost.format(self.args[0], self.args[2])
        return super().message


class SchemaError(TaskiqSaPgError):
    """The tables are absent, unfit or out of reach, or could not be made; names the remedy."""


class StorageError(TaskiqSaPgError):
    """PostgreSQL refused a statement or could not be reached. Its args: the text, the SQLSTATE."""

    _text = "{}"

    @property
    def sqlstate(self) -> str | None:
        """PostgreSQL's five-character error code; None when no server answered."""
        sqlstate = self.args[1] if len(self.args) > 1 else None
        return None if sqlstate is None else str(sqlstate)


class ResultIsMissingError(TaskiqSaPgError, ResultGetError):
    """There is no result: the task has not finished, or its result was taken or deleted.

    Its args: the task id, the table.
    """

    _text = "no result of task {!r} in table {}"


class NotResendableError(TaskiqSaPgError):
    """A task cannot be sent again from what was recorded. Its args: the task id, the reason."""

    _text = "task {!r} cannot be sent again: {}"


class ResultDecodeError(TaskiqSaPgError, ResultGetError):
    """A stored value that cannot be read back; the row stays where it is.

    Its args: what was read, the table, the reason.
    """

    _text = (
        "cannot decode {} in table {}: {}. The row was left in place; was it written with another "
        "serializer, or by code that this process cannot import?"
    )


class MissingColumnsError(TaskiqSaPgError, LookupError):
    """A row from which no result can be decoded, because its select left columns out.

    Its args: the names of the columns, the table.
    """

    _text = (
        "the row has no {} of table {}: select the whole model or these columns too. Columns that "
        "are deferred, or expired by a commit, count as left out; and an outer join has none where "
        "there is no result"
    )


class PayloadTooLargeError(TaskiqSaPgError, ResultSetError):
    """A serialized value beyond max_payload_bytes, or beyond what a column of PostgreSQL can hold.

    That is 1,000,000,000 bytes and, of JSONB, 268,435,000. A task that returns one gets this error
    as its result. Its args: what it was, its bytes, the limit.
    """

    _text = (
        "{} takes {} bytes, and the limit is {}: that of max_payload_bytes, or what a column can "
        "hold at all. Keep it elsewhere and return where it is"
    )


class ResultSerializationError(TaskiqSaPgError, ResultSetError):
    """A value that the serializer cannot hold, not even in its JSON-able form.

    A task that returns one gets this error as its result. Its args: what it was, the name of
    its type, the reason.
    """

    _text = (
        "cannot serialize {} of type {}: {}. Return plain data, or choose a serializer that can "
        "hold it"
    )


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither True nor False, such as the environment's "false".

    Raises:
        ConfigurationError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}")


def check_whole(name: str, value: object, least: int = 1, *, or_none: bool = False) -> None:
    """Refuses what is no int of `least` or more, nor None where that is allowed.

    Raises:
        ConfigurationError: It is something else.
    """
    if value is None and or_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        fits = f"a whole number of {least} or more{', or None' if or_none else ''}"
        raise ConfigurationError(f"{name} must be {fits}, not {value!r}")


def check_number(
    name: str,
    value: object,
    least: float = -inf,
    *,
    is_above: bool = False,
    or_none: bool = False,
) -> None:
    """Refuses what is no number of `least` or more, or above it; nor None where that is allowed.

    Raises:
        ConfigurationError: It is something else, such as NaN.
    """
    if value is None and or_none:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        fits = value > least if is_above else value >= least  # NaN is not
    else:
        fits = False
    if not fits:
        bound = "" if least == -inf else f" above {least}" if is_above else f" of {least} or more"
        rest = ", or None" if or_none else ""
        raise ConfigurationError(f"{name} must be a number{bound}{rest}, not {value!r}")


def well_spelled(given: dict[str, Any], owner: type) -> dict[str, Any]:
    """Arguments for another function, none of which is nearly one of the owner's own.

    Raises:
        ConfigurationError: One is; names the argument that may have been meant.
    """
    # Who gets them refuses the others, too, and knows no better ones.
    parameters = inspect.signature(owner).parameters.values()
    ours = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    for name in given:
        # json_serializer, which is an engine's, is 0.8 like serializer.
        for close in get_close_matches(name, ours, n=1, cutoff=0.85):
            raise ConfigurationError(f"there is no argument {name}: did you mean {close}?")
    return given


def check_serializer(serializer: object) -> None:
    """Refuses what is no serializer, with which every result would be lost.

    Raises:
        ConfigurationError: It is a name, a class, or lacks dumpb() or loadb().
    """
    methods = (getattr(serializer, name, None) for name in ("dumpb", "loadb"))
    if isinstance(serializer, type) or not all(map(callable, methods)):
        raise ConfigurationError(
            "serializer must be an object with dumpb() and loadb(), such as JSONSerializer(), not "
            f"{serializer!r}"
        )
