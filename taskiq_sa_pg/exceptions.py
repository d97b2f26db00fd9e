"""The errors of the package, all derived from TaskiqSaPgError, and checks of arguments.

Each error can be rebuilt from its `args`, so it survives pickle and a result backend.
"""

import inspect
from difflib import get_close_matches
from math import inf
from typing import Any

from taskiq.exceptions import ResultBackendError, ResultGetError, ResultSetError


class TaskiqSaPgError(ResultBackendError):
    """Base class of all errors that this package raises."""

    # The text, formatted with `args`; taskiq's `__template__` is formatted with keywords.
    _text = ""

    def __init__(self, *args: object) -> None:
        super().__init__()
        # taskiq's errors take keywords and keep only the formatted text in `args`.
        self.args = args

    # taskiq before 0.13 copies and pickles its errors by their keywords, which ours lack.
    __copy__ = __deepcopy__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, vars(self)

    def __str__(self) -> str:
        return self.message

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(map(repr, self.args))})"

    @property
    def message(self) -> str:
        """What happened, to which task or table, and the remedy."""
        return self._text.format(*self.args) if self._text else " ".join(map(str, self.args))


class ConfigurationError(TaskiqSaPgError, ValueError):
    """An argument is invalid, for example a name, a type, an address or a limit.

    Also raised if a borrowed engine prepares statements behind a pooler; the first connection
    shows this.
    """


class NotStartedError(TaskiqSaPgError, RuntimeError):
    """The broker or the result backend was used before `startup()` or after `shutdown()`.

    Also raised on another event loop, and by calls that wait when the backend is shut down.
    """


class InvalidTaskIdError(TaskiqSaPgError, ValueError):
    """The task-id column cannot store a task id. Its args: the task id, the reason."""

    _text = "task id {!r} {}"


class TaskAbandonedError(TaskiqSaPgError):
    """A task was given up. Its args: the task id, the number of deliveries, the worker.

    SQLAlchemyBroker stores a result with this error for a task that was delivered too often and
    never acknowledged; there is no third argument. TaskMetadataMiddleware(abandon_lost=True)
    stores one for a task that was lost with its worker; the number of deliveries is None.
    """

    _text = (
        "task {!r} was delivered {} times and never acknowledged: its workers died, or it blocked "
        "their event loop for longer than the lease. It is parked: run it again with `taskiq-sa-pg "
        "release`, or delete it with `taskiq-sa-pg discard`"
    )
    _text_of_lost = (
        "task {!r} was lost: its worker {} was killed, cannot reach the database or blocks its "
        "event loop, and has sent no heartbeat for a minute. If the task may run twice, send it "
        "again"
    )

    @property
    def message(self) -> str:
        """What happened, to which task or table, and the remedy."""
        if len(self.args) > 2:
            return self._text_of_lost.format(self.args[0], self.args[2])
        return super().message


class SchemaError(TaskiqSaPgError):
    """Tables are missing, do not match, or cannot be created or read; names the remedy."""


class StorageError(TaskiqSaPgError):
    """PostgreSQL rejected a statement or is unreachable. Its args: the text, the SQLSTATE."""

    _text = "{}"

    @property
    def sqlstate(self) -> str | None:
        """PostgreSQL's five-character error code; None if there is none, as without an answer."""
        sqlstate = self.args[1] if len(self.args) > 1 else None
        return None if sqlstate is None else str(sqlstate)


class ResultIsMissingError(TaskiqSaPgError, ResultGetError):
    """The task has no result: it has not finished, or its result was deleted or has expired.

    Its args: the task id, the table.
    """

    _text = "no result of task {!r} in table {}"


class NotResendableError(TaskiqSaPgError):
    """A task cannot be sent again from its recorded data. Its args: the task id, the reason."""

    _text = "task {!r} cannot be sent again: {}"


class ResultDecodeError(TaskiqSaPgError, ResultGetError):
    """A stored value cannot be decoded; the row is not deleted.

    Its args: what was read, the table, the reason.
    """

    _text = (
        "cannot decode {} in table {}: {}. The row was not deleted. Was it written with another "
        "serializer, or by code that this process cannot import?"
    )


class MissingColumnsError(TaskiqSaPgError, LookupError):
    """No result can be decoded from a row, because its select omits columns.

    Its args: the names of the columns, the table.
    """

    _text = (
        "the row has no {} of table {}: select the whole model, or these columns too. Deferred "
        "columns and columns expired by a commit count as missing. An outer join has no columns "
        "if there is no result"
    )


class PayloadTooLargeError(TaskiqSaPgError, ResultSetError):
    """A serialized value exceeds max_payload_bytes, or the limit of a PostgreSQL column.

    A column stores 1,000,000,000 bytes, or 268,435,000 bytes as JSONB. This error is stored as the
    task's result if its return value is too large. Its args: the value's role, its size in bytes,
    the limit in bytes.
    """

    _text = (
        "{} takes {} bytes, and the limit is {} (max_payload_bytes, or the limit of a column). "
        "Store it elsewhere and return its location"
    )


class ResultSerializationError(TaskiqSaPgError, ResultSetError):
    """A value cannot be serialized, not even in its JSON-able form.

    This error is stored as the task's result if its return value cannot be serialized, or its
    exception is too large. Its args: the value's role, the name of its type, the reason.
    """

    _text = (
        "cannot serialize {} of type {}: {}. Return plain data, or choose a serializer that "
        "supports it"
    )


def check_flag(name: str, value: object) -> None:
    """Checks that a value is True or False, and not a text such as "false" from the environment.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}")


def check_whole(name: str, value: object, least: int = 1, *, or_none: bool = False) -> None:
    """Checks that a value is an int of `least` or more, or None if `or_none`.

    Raises:
        ConfigurationError: It is not.
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
    """Checks that a value is a number of `least` or more (above `least` if `is_above`).

    None is accepted if `or_none`.

    Raises:
        ConfigurationError: It is not, or it is NaN.
    """
    if value is None and or_none:
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        fits = value > least if is_above else value >= least  # False for NaN
    else:
        fits = False
    if not fits:
        bound = "" if least == -inf else f" above {least}" if is_above else f" of {least} or more"
        rest = ", or None" if or_none else ""
        raise ConfigurationError(f"{name} must be a number{bound}{rest}, not {value!r}")


def well_spelled(given: dict[str, Any], owner: type) -> dict[str, Any]:
    """Returns arguments for another function, after a check for misspelled ones of the owner.

    Raises:
        ConfigurationError: An argument resembles one of the owner's; suggests that one.
    """
    # Other unknown arguments are rejected by the function that receives them.
    parameters = inspect.signature(owner).parameters.values()
    ours = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    for name in given:
        # An engine's json_serializer has a similarity of 0.8 to serializer.
        for close in get_close_matches(name, ours, n=1, cutoff=0.85):
            raise ConfigurationError(f"there is no argument {name}: did you mean {close}?")
    return given


def check_serializer(serializer: object) -> None:
    """Checks that a value is a serializer; otherwise every result would be lost.

    Raises:
        ConfigurationError: It is a name or a class, or has no dumpb() or loadb().
    """
    methods = (getattr(serializer, name, None) for name in ("dumpb", "loadb"))
    if isinstance(serializer, type) or not all(map(callable, methods)):
        raise ConfigurationError(
            "serializer must be an object with dumpb() and loadb(), such as JSONSerializer(), not "
            f"{serializer!r}"
        )
