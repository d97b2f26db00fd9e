"""The codecs that the encoding's tests run over, and the way of a result through them."""

from typing import Any

import pytest
from taskiq import TaskiqResult
from taskiq.serializers import (
    CBORSerializer,
    JSONSerializer,
    MSGPackSerializer,
    ORJSONSerializer,
    PickleSerializer,
)

from taskiq_sa_pg import TableConfig
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.statements import ResultRow, StoredResult

BYTEA, JSONB = TableConfig("jobs"), TableConfig("jobs", field_for_payload="Jsonb")
# Every serializer, in both kinds of column.
CODECS = {
    "pickle": Codec(BYTEA, PickleSerializer()),
    "json": Codec(BYTEA, JSONSerializer()),
    "orjson": Codec(BYTEA, ORJSONSerializer()),
    "msgpack": Codec(BYTEA, MSGPackSerializer()),
    "cbor": Codec(BYTEA, CBORSerializer()),
    "jsonb": Codec(JSONB),
    "jsonb-orjson": Codec(JSONB, ORJSONSerializer()),
}
PICKLE = CODECS["pickle"]


def each(*names: str) -> pytest.MarkDecorator:
    """For a test of some of the codecs."""
    return pytest.mark.parametrize("codec", [CODECS[name] for name in names], ids=names)


every_codec = each(*CODECS)
every_plain_codec = each(*[name for name in CODECS if name != "pickle"])


def encode(codec: Codec, **fields: Any) -> ResultRow:
    """The row of a result with these fields, which nobody validates: as middlewares leave it."""
    usual = {"is_err": False, "return_value": 1, "execution_time": 0.25, "labels": {}}
    result: TaskiqResult[Any] = TaskiqResult.model_construct(
        **{**usual, "log": None, "error": None, **fields}
    )
    return codec.encode_result("t1", result)


def encode_error(codec: Codec, error: BaseException) -> ResultRow:
    return encode(codec, is_err=True, return_value=None, error=error)


def stored(row: ResultRow) -> StoredResult:
    """The row as it is read."""
    return StoredResult._make(getattr(row, name) for name in StoredResult._fields)


def decode(codec: Codec, row: ResultRow, *, with_logs: bool = False) -> TaskiqResult[Any]:
    return codec.decode_result(stored(row), with_logs=with_logs)


def decode_error(codec: Codec, row: ResultRow) -> Any:
    result = decode(codec, row)
    assert result.is_err
    return result.error


def error_through(codec: Codec, error: BaseException) -> Any:
    return decode_error(codec, encode_error(codec, error))
