"""Decodes rows that the application has selected itself to TaskiqResult."""

import json
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any, Final

from sqlalchemy import Row, inspect
from sqlalchemy.exc import InvalidRequestError
from taskiq import TaskiqResult

from taskiq_sa_pg.codec.codec import Codec
from taskiq_sa_pg.exceptions import MissingColumnsError
from taskiq_sa_pg.models import Models, ResultMixin
from taskiq_sa_pg.statements import StoredResult

# Required by TaskiqResult; labels and log have defaults.
_REQUIRED: Final = ("is_err", "return_value", "error", "execution_time")

_MISSING: Final[Any] = object()

# The value of a column, or _MISSING.
_Lookup = Callable[[str], Any]


class RowDecoder:
    """Decodes rows of any select, with values as SQLAlchemy's types return them; no queries."""

    def __init__(self, codec: Codec, models: Models) -> None:
        self._codec = codec
        self._models = models
        self._is_jsonb = models.config.field_for_payload == "Jsonb"

    def decode(self, row: object, *, with_logs: bool = False) -> TaskiqResult[Any]:
        """Returns the result in a row.

        Raises:
            MissingColumnsError: The row lacks a required column.
            ResultDecodeError: A value cannot be decoded.
            TypeError: It is not a row, or it has several results.
        """
        value_of = self._lookup(row)
        required = (*_REQUIRED, "log") if with_logs else _REQUIRED
        missing = [name for name in required if _is_missing(name, value_of(name))]
        if missing:
            raise MissingColumnsError(", ".join(missing), self._models.config.qualified_name)
        task_id = value_of("task_id")
        if task_id is _MISSING:
            task_id = None
        error, labels, log = value_of("error"), value_of("labels"), value_of("log")
        try:
            stored = StoredResult(
                task_id=task_id,
                is_err=value_of("is_err"),
                return_value=self._payload("return_value", value_of("return_value")),
                error=None if error is None else self._payload("error", error),
                error_type=None,
                execution_time=value_of("execution_time"),
                labels="{}" if labels is _MISSING or not labels else _to_json(labels),
                log=None if log is _MISSING else log,
            )
        except (TypeError, ValueError, RecursionError) as exc:
            raise self._codec.decode_error(task_id, exc) from exc
        return self._codec.decode_result(stored, with_logs=with_logs)

    def _payload(self, name: str, value: Any) -> bytes | str:
        if self._is_jsonb:
            return _to_json(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        raise TypeError(f"{name} is a {type(value).__qualname__}, not bytes")

    def _lookup(self, row: object) -> _Lookup:
        mapping = row._mapping if isinstance(row, Row) else row
        if isinstance(mapping, Mapping):
            found = [value for value in mapping.values() if isinstance(value, ResultMixin)]
            if not found:
                return partial(self._value_in, mapping)
            if len(found) > 1:
                raise TypeError(f"the row has {len(found)} results: decode them one by one")
            [row] = found
        if isinstance(row, ResultMixin):
            # Not getattr(), which would query an expired instance or a deferred column.
            loaded: Mapping[str, Any] = inspect(row).dict
            return lambda name: loaded.get(name, _MISSING)
        raise TypeError(
            "decode() takes a row of a select, a mapping of columns or an instance of "
            f"models.Result, not {type(row).__qualname__}"
        )

    def _value_in(self, mapping: Mapping[Any, Any], name: str) -> Any:
        # By the column first: another table may have a column of the same name.
        for key in (self._models.results_table.c[name], name):
            try:
                return mapping[key]
            except KeyError:
                continue
            except InvalidRequestError as exc:
                raise TypeError(
                    f"the row has several columns named {name}: label the others"
                ) from exc
        return _MISSING


def _is_missing(name: str, value: object) -> bool:
    # A NOT NULL column is NULL only if an outer join found no result.
    return value is _MISSING or (value is None and name in {"is_err", "execution_time"})


def _to_json(value: Any) -> str:
    """The JSON text of a value that was loaded from a jsonb column."""
    return json.dumps(value, ensure_ascii=False, default=_to_float)


def _to_float(value: Any) -> float:
    if isinstance(value, Decimal):  # from an application's json_deserializer
        return float(value)
    raise TypeError(f"the engine's json_deserializer returned a {type(value).__qualname__}")
