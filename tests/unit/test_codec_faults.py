"""Values that no serializer can hold, and stored ones that cannot be read back."""

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from taskiq import TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import (
    CBORSerializer,
    JSONSerializer,
    MSGPackSerializer,
    ORJSONSerializer,
    PickleSerializer,
)

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.config import TableConfig
from taskiq_sa_pg.exceptions import (
    ConfigurationError,
    ResultDecodeError,
    ResultSerializationError,
)
from taskiq_sa_pg.rows import ResultRow, StoredProgress, StoredResult
from tests.tasks import result_of

BYTEA, JSONB = TableConfig("jobs"), TableConfig("jobs", field_for_payload="Jsonb")
PLAIN = [JSONSerializer, ORJSONSerializer, MSGPackSerializer, CBORSerializer]
CODECS = {
    "pickle": Codec(BYTEA),
    **{serializer.__name__: Codec(BYTEA, serializer()) for serializer in PLAIN},
    "jsonb": Codec(JSONB),
    "jsonb-orjson": Codec(JSONB, ORJSONSerializer()),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_plain_codec = pytest.mark.parametrize(
    "codec", list(CODECS.values())[1:], ids=list(CODECS)[1:]
)


@dataclass(slots=True)
class Feed:
    items: Any


class Envelope(BaseModel):
    model_config = ConfigDict(extra="allow")
    content: Any = None


class Stream(BaseModel):
    numbers: Iterable[int]


def stored(row: ResultRow) -> StoredResult:
    return StoredResult._make(getattr(row, name) for name in StoredResult._fields)


def through(codec: Codec, result: TaskiqResult[Any]) -> Any:
    return codec.decode_result("t1", stored(codec.encode_result("t1", result)))


def endless() -> Any:
    yield from itertools.count()


async def endless_async() -> Any:
    for number in itertools.count():
        yield number


UNSTORABLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: None,
    "generator": endless,
    "async generator": endless_async,
    "open file": lambda: Path(__file__).open(),  # noqa: SIM115 - the test closes it
    "lock": threading.Lock,
    "generator in a list": lambda: [1, {"a": (endless(),)}],
    "generator in a dataclass with slots": lambda: Feed(endless()),
    "generator in a model": lambda: Envelope(content=endless()),
    "generator in a model's extra": lambda: Envelope.model_validate({"more": endless()}),
    "generator in a typed model": lambda: Stream(numbers=endless()),
}


@every_codec
@pytest.mark.parametrize("make", UNSTORABLE.values(), ids=UNSTORABLE)
@pytest.mark.timeout(20)
def test_what_cannot_be_stored_becomes_an_error_result(
    codec: Codec, make: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    value = make()
    row = codec.encode_result("t1", result_of(value, labels={"queue": "a"}))
    result = codec.decode_result("t1", stored(row))
    assert result.is_err
    assert result.return_value is None
    assert result.labels == {"queue": "a"}
    assert type(result.error) is ResultSerializationError
    assert type(value).__name__ in str(result.error)
    assert row.error_type == "taskiq_sa_pg.exceptions.ResultSerializationError"
    assert "t1" in caplog.text
    getattr(value, "close", lambda: None)()


@every_plain_codec
@pytest.mark.timeout(20)
def test_an_endless_iterator_becomes_an_error_result(codec: Codec) -> None:
    assert through(codec, result_of(itertools.count())).is_err


@every_plain_codec
def test_a_value_that_contains_itself_becomes_an_error_result(codec: Codec) -> None:
    value: list[Any] = []
    value.append(value)
    assert type(through(codec, result_of(value)).error) is ResultSerializationError


def test_pickle_returns_a_value_that_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    read = through(CODECS["pickle"], result_of(value)).return_value
    assert read[0] is read


@every_codec
def test_a_value_without_a_text_becomes_an_error_result(codec: Codec) -> None:
    class Mute:
        def __reduce__(self) -> Any:
            raise MuteError

    class MuteError(Exception):
        def __str__(self) -> str:
            raise self

    assert type(through(codec, result_of(Mute())).error) is ResultSerializationError


@every_codec
def test_progress_that_cannot_be_stored_is_refused(codec: Codec) -> None:
    with pytest.raises(ResultSerializationError, match="the progress's meta of type function"):
        codec.encode_progress("t1", TaskProgress(state="x", meta=lambda: None))


class ReversedSerializer(JSONSerializer):
    def dumpb(self, value: Any) -> bytes:
        return super().dumpb(value)[::-1]


@pytest.mark.parametrize(
    "serializer",
    [PickleSerializer(), MSGPackSerializer(), CBORSerializer(), ReversedSerializer()],
    ids=lambda serializer: type(serializer).__name__,
)
def test_jsonb_refuses_serializers_that_do_not_write_json(serializer: TaskiqSerializer) -> None:
    with pytest.raises(ConfigurationError, match=type(serializer).__name__):
        Codec(JSONB, serializer)


@pytest.mark.parametrize("config", [BYTEA, JSONB], ids=["bytea", "jsonb"])
@pytest.mark.parametrize("damage", [b"", b"\x80\x04X", b"{", b"\xff", b"\x80\x04K\x01"])
def test_a_damaged_value_names_the_task_and_the_table(config: TableConfig, damage: bytes) -> None:
    codec = Codec(config)
    row = stored(codec.encode_result("t1", result_of([1])))
    damaged = damage if config is BYTEA else damage.decode(errors="replace")
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        codec.decode_result("t1", row._replace(return_value=damaged))
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        codec.decode_progress("t1", StoredProgress("t1", "x", damaged))


@pytest.mark.parametrize("content", ['"no base64!"', "5", "null", '"eA=="'])
def test_a_damaged_wrapper_names_the_task_and_the_table(content: str) -> None:
    codec = CODECS["jsonb"]
    row = stored(codec.encode_result("t1", result_of([1])))
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        codec.decode_result("t1", row._replace(return_value=f'{{"$serialized": {content}}}'))
