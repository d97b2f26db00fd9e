"""Converts TaskiqResult and TaskProgress to column values and back.

Each value is serialized separately: as it is if the serializer accepts it, otherwise in its
JSON-able form. If that fails too, an error result is stored.
"""

import dataclasses
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from taskiq import TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import JSONSerializer, ORJSONSerializer, PickleSerializer

from taskiq_sa_pg.codec.exceptions import (
    exception_from_document,
    exception_to_document,
    format_traceback,
    may_hold_exception,
    pack_or_repr,
    qualified_name,
)
from taskiq_sa_pg.codec.jsonb import (
    from_jsonb,
    is_plain,
    is_wrapper,
    storable_text,
    to_jsonb,
    unwrap,
    wrap,
    wrap_bytes,
    wrap_text,
)
from taskiq_sa_pg.codec.retention import KEEP_FOR_EVER, Retention
from taskiq_sa_pg.codec.signing import SignedSerializer
from taskiq_sa_pg.codec.task_metadata import task_metadata_of
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    PayloadTooLargeError,
    ResultDecodeError,
    ResultSerializationError,
    check_serializer,
    check_whole,
)
from taskiq_sa_pg.models import TableConfig
from taskiq_sa_pg.statements import ProgressRow, ResultRow, StoredProgress, StoredResult

logger = logging.getLogger(__name__)

_MAX_INTEGER: Final = 2_147_483_647
_MAX_REASON_CHARACTERS: Final = 500

# PostgreSQL accepts a message below 1 GiB, which includes the other values, and a jsonb value of at
# most 256 MiB, which includes some overhead.
_COLUMN_BYTES: Final = {"Bytea": 1_000_000_000, "Jsonb": 268_435_000}

# read_labels() returns this instead of a value that it does not read.
UNREAD: Final = "(serialized)"

# These can load everything that they can dump; for others that is checked before a row is written.
_TRUSTED_TO_LOAD: Final = (JSONSerializer, ORJSONSerializer)


class Codec:
    """Encodes and decodes the rows of one table with one serializer.

    The default is PickleSerializer, or JSONSerializer with "Jsonb". `max_payload_bytes` limits a
    serialized return value, exception or progress metadata; `column_bytes` limits their columns,
    None to PostgreSQL's maximum. Task ids are values of the task-id column.

    Raises:
        ConfigurationError: The serializer is invalid or, with "Jsonb", does not write JSON; or a
            limit is below 1.
    """

    def __init__(
        self,
        config: TableConfig,
        serializer: TaskiqSerializer | None = None,
        max_payload_bytes: int | None = None,
        retention: Retention = KEEP_FOR_EVER,
        *,
        column_bytes: int | None = None,
    ) -> None:
        check_whole("max_payload_bytes", max_payload_bytes, or_none=True)
        column_bytes = column_bytes or _COLUMN_BYTES[config.field_for_payload]
        self._column_bytes = column_bytes
        self._max_payload_bytes = min(max_payload_bytes or column_bytes, column_bytes)
        self._retention = retention
        self._table = config.qualified_name
        self._is_jsonb = config.field_for_payload == "Jsonb"
        if serializer is None:
            serializer = JSONSerializer() if self._is_jsonb else PickleSerializer()
        check_serializer(serializer)
        if self._is_jsonb:
            _check_writes_json(serializer)
        self.serializer = serializer
        inner = serializer.serializer if isinstance(serializer, SignedSerializer) else serializer
        if type(inner) is PickleSerializer:
            self._dump = self._dump_and_load_exceptions
        elif type(inner) in _TRUSTED_TO_LOAD:
            self._dump = serializer.dumpb
        else:
            self._dump = self._dump_and_load

    def encode_result(
        self, task_id: Any, result: TaskiqResult[Any], *, strict: bool = False
    ) -> ResultRow:
        """Returns the row of a result. If a value cannot be stored, logs it and returns an error.

        Raises:
            ResultSerializationError: With strict: a value cannot be serialized.
            PayloadTooLargeError: With strict: a value is too large.
        """
        error, is_err, labels = result.error, result.is_err, result.labels
        try:
            return_value = self._encode_payload("the return value", result.return_value)
        except (ResultSerializationError, PayloadTooLargeError) as exc:
            if strict:
                raise
            logger.error("task %s: %s", task_id, exc)  # noqa: TRY400 - the reason is enough
            error, is_err = exc, True
            return_value = self._encode_payload("the return value", None, is_limited=False)
        encoded_error = error_type = traceback = None
        if error is not None:
            # A replacement is stored even above the limit, if need be without its causes.
            stand_in = None if error is result.error else type(error)(*error.args)
            encoded_error = self._encode_exception(task_id, error, strict, stand_in)
            error_type = storable_text(qualified_name(type(error)))
            traceback = storable_text(format_traceback(error))
        metadata = task_metadata_of(result)
        return ResultRow(
            task_id=task_id,
            is_err=bool(is_err),
            return_value=return_value,
            error=encoded_error,
            error_type=error_type,
            traceback=traceback,
            execution_time=float(result.execution_time),
            labels=self._encode_labels(labels) if labels else "{}",
            log=None if result.log is None else storable_text(result.log),
            attempt=attempt_of(labels) if labels else 0,
            expires_at=self._retention.seconds_for(bool(is_err), labels),
            **metadata._asdict(),
        )

    def decode_result(self, row: StoredResult, *, with_logs: bool = False) -> TaskiqResult[Any]:
        """Returns the result of a row; its log only if with_logs is true.

        The row's task id is used in errors only; None if it is unknown.

        Raises:
            ResultDecodeError: A value of the row cannot be decoded.
        """
        try:
            # Without validation, which copies values and would rebuild the exception again.
            return TaskiqResult.model_construct(
                is_err=row.is_err,
                log=row.log if with_logs else None,
                return_value=self._decode_payload(row.return_value),
                execution_time=row.execution_time,
                labels=self._decode_labels(row.labels),
                error=None if row.error is None else self._decode_exception(row.error),
            )
        except Exception as exc:
            raise self.decode_error(row.task_id, exc) from exc

    def decode_any(
        self,
        row: StoredResult,
        failures: dict[Any, TaskiqResult[Any]] | None = None,
        *,
        with_logs: bool = False,
    ) -> TaskiqResult[Any]:
        """The same, but if a value cannot be decoded, a failure with the ResultDecodeError.

        Such a failure is also added to `failures`, by task id.
        """
        try:
            return self.decode_result(row, with_logs=with_logs)
        except ResultDecodeError as exc:
            failure: TaskiqResult[Any] = TaskiqResult.model_construct(
                is_err=True,
                log=row.log if with_logs else None,
                return_value=None,
                execution_time=row.execution_time,
                labels={},
                error=exc,
            )
        if failures is not None:
            failures[row.task_id] = failure
        return failure

    def decode_labels(self, task_id: Any, stored: str) -> dict[str, Any]:
        """Returns the labels of a row.

        Raises:
            ResultDecodeError: They cannot be decoded.
        """
        try:
            return self._decode_labels(stored)
        except Exception as exc:
            raise self.decode_error(task_id, exc) from exc

    def decode_error(self, task_id: Any, exc: Exception) -> ResultDecodeError:
        """Returns the error for a result that cannot be decoded because of `exc`."""
        what = "a result" if task_id is None else f"the result of task {str(task_id)!r}"
        return ResultDecodeError(what, self._table, reason_of(exc))

    def encode_progress(self, task_id: Any, progress: TaskProgress[Any]) -> ProgressRow:
        """Returns the row of a progress; raises an error if its metadata cannot be stored."""
        state = progress.state.value if isinstance(progress.state, Enum) else progress.state
        meta = progress.meta
        return ProgressRow(
            task_id=task_id,
            state=storable_text(str(state)),
            meta=None if meta is None else self._encode_payload("the progress metadata", meta),
        )

    def decode_progress(self, row: StoredProgress) -> TaskProgress[Any]:
        """Returns the progress of a row.

        Raises:
            ResultDecodeError: The metadata cannot be decoded.
        """
        try:
            meta = None if row.meta is None else self._decode_payload(row.meta)
        except Exception as exc:
            what = f"the progress of task {str(row.task_id)!r}"
            raise ResultDecodeError(what, self._table, reason_of(exc)) from exc
        return TaskProgress.model_construct(state=row.state, meta=meta)

    def pack(self, value: Any) -> Any:
        """Returns the value as plain data for an exception's document.

        Raises:
            ResultSerializationError: It cannot be serialized.
        """
        if type(value) is bytes:
            return wrap_bytes(value)
        if is_plain(value) and self._holds_in_document(value):
            return value
        try:
            return wrap(self._serialize("a value", value))
        except ResultSerializationError:
            if type(value) is not str:
                raise
            return wrap_text(value)  # it has lone surrogates

    def unpack(self, packed: Any) -> Any:
        """The inverse of pack()."""
        return unwrap(packed, self.serializer.loadb) if is_wrapper(packed) else packed

    def _serialize(self, what: str, value: Any) -> bytes:
        try:
            return self._dump(value)
        except Exception as refusal:  # noqa: BLE001 - serializers raise anything
            try:
                _refuse_iterators(value)
                return self._dump(to_jsonable_python(value))
            except Exception as exc:  # noqa: BLE001 - as above
                reasons = f"{reason_of(refusal)}; {reason_of(exc)}"
                type_name = qualified_name(type(value))
                raise ResultSerializationError(what, type_name, reasons) from refusal

    def _dump_and_load_exceptions(self, value: Any) -> bytes:
        # An exception's constructor may take other arguments than those in `args`.
        dumped = self.serializer.dumpb(value)
        if may_hold_exception(dumped):
            self.serializer.loadb(dumped)
        return dumped

    def _dump_and_load(self, value: Any) -> bytes:
        dumped = self.serializer.dumpb(value)
        self.serializer.loadb(dumped)
        return dumped

    def _holds_in_document(self, value: Any) -> bool:
        # Serializers limit integers and the depth, to which the document adds.
        try:
            self._dump({"exceptions": [{"args": [value]}]})
        except Exception:  # noqa: BLE001 - serializers raise anything
            return False
        return True

    def _encode_payload(self, what: str, value: Any, *, is_limited: bool = True) -> bytes | str:
        dumped, limit = self._serialize(what, value), self._max_payload_bytes
        if is_limited and len(dumped) > limit:
            raise PayloadTooLargeError(what, len(dumped), limit)
        if not self._is_jsonb:
            return dumped
        text = to_jsonb(dumped)
        if len(text) > self._column_bytes:  # a wrapper, which is longer
            raise PayloadTooLargeError(what, len(text), self._column_bytes)
        return text

    def _decode_payload(self, stored: bytes | str) -> Any:
        return self.serializer.loadb(stored if isinstance(stored, bytes) else from_jsonb(stored))

    def _encode_exception(
        self,
        task_id: Any,
        exception: BaseException,
        strict: bool,
        stand_in: BaseException | None,
    ) -> bytes | str:
        try:
            return self._encode_payload("the error", exception_to_document(exception, self))
        except Exception as exc:
            if strict:
                raise
            if stand_in is None:
                logger.exception("task %s: its exception cannot be stored completely", task_id)
                stand_in = ResultSerializationError(
                    "the error", qualified_name(type(exception)), reason_of(exc)
                )
            document = exception_to_document(stand_in, self)
            return self._encode_payload("the error", document, is_limited=False)

    def _decode_exception(self, stored: bytes | str) -> BaseException:
        return exception_from_document(self._decode_payload(stored), self)

    def _encode_labels(self, labels: Mapping[str, Any]) -> str:
        document: Any = {name: self._pack_label(value) for name, value in labels.items()}
        if not is_plain(document):  # because of the names
            try:
                document = self.pack({name: self.unpack(v) for name, v in document.items()})
            except Exception:  # noqa: BLE001 - serializers raise anything
                document = {storable_text(str(name)): v for name, v in document.items()}
        return json.dumps(document, ensure_ascii=False)

    def _pack_label(self, value: Any) -> Any:
        return value if is_plain(value) else pack_or_repr(value, self)

    def _decode_labels(self, stored: str) -> dict[str, Any]:
        return labels_of(stored, self.unpack)


def _check_writes_json(serializer: TaskiqSerializer) -> None:
    probe = {"probe": [1, 0.5, "text", True, None]}
    try:
        writes_json = json.loads(serializer.dumpb(probe).decode()) == probe
    except Exception:  # noqa: BLE001 - whatever it does, it does not write JSON
        writes_json = False
    if not writes_json:
        raise ConfigurationError(
            'field_for_payload="Jsonb" needs a serializer that writes JSON, such as '
            f"JSONSerializer or ORJSONSerializer, not {type(serializer).__qualname__}; "
            '"Bytea" takes any'
        )


def read_labels(stored: str) -> dict[str, Any]:
    """Returns the labels of a row without the serializer, which may execute what it reads.

    A value that only the serializer can read becomes `UNREAD`. Text that is not JSON is returned
    under the name "labels".
    """
    try:
        return labels_of(stored, _unpack_plain)
    except (ValueError, RecursionError):  # such as an integer of more digits than Python reads
        return {"labels": stored}


def labels_of(stored: str, unpack: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns the labels in JSON text."""
    if stored == "{}":
        return {}
    document = json.loads(stored)
    if not isinstance(document, dict) or is_wrapper(document):
        unpacked = unpack(document)
        return unpacked if isinstance(unpacked, dict) else {"labels": unpacked}
    return {name: unpack(value) for name, value in document.items()}


def _unpack_plain(packed: Any) -> Any:
    return unwrap(packed, lambda _: UNREAD) if is_wrapper(packed) else packed


def attempt_of(labels: Any) -> int:
    """The number of the attempt, 0 for the first, from the label of taskiq's retry middlewares."""
    try:  # a label can be of any type, and so can the labels
        if "_retries" not in labels:
            return 0
        return min(max(int(labels["_retries"]), 0), _MAX_INTEGER)
    except Exception:  # noqa: BLE001 - anyone's __int__
        return 0


def reason_of(exc: Exception) -> str:
    """The class and text of an error, at most 500 characters of text; never raises."""
    try:
        text = str(exc)
    except Exception:  # noqa: BLE001 - anyone's __str__
        text = "(no text)"
    return f"{qualified_name(type(exc))}: {storable_text(text)[:_MAX_REASON_CHARACTERS]}"


def _refuse_iterators(value: Any) -> None:
    pending, seen = [value], set()
    while pending:
        current = pending.pop()
        if isinstance(current, Iterator | AsyncIterator):
            # pydantic would convert it to a list: a generator, which may be endless, or the lines
            # of an open file.
            raise TypeError("an iterator cannot be stored")
        if id(current) not in seen:
            seen.add(id(current))
            pending.extend(_parts(current))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, BaseModel):
        extra = getattr(value, "__pydantic_extra__", None) or {}
        return [*value.__dict__.values(), *extra.values()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return ()
