"""Values that no serializer can hold, and stored ones that cannot be read back."""

import itertools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import (
    CBORSerializer,
    JSONSerializer,
    MSGPackSerializer,
    PickleSerializer,
)

from taskiq_sa_pg import ConfigurationError, ResultDecodeError, ResultSerializationError
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.statements import StoredProgress
from tests.unit.codecs import (
    CODECS,
    JSONB,
    PICKLE,
    decode,
    each,
    encode,
    every_codec,
    every_plain_codec,
)


@dataclass(slots=True)
class Feed:
    items: Any


class Envelope(BaseModel):
    model_config = ConfigDict(extra="allow")
    content: Any = None


class Stream(BaseModel):
    numbers: Iterable[int]


def through(codec: Codec, value: Any) -> Any:
    return decode(codec, encode(codec, return_value=value))


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
    row = encode(codec, return_value=value, labels={"queue": "a"})
    result = decode(codec, row)
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
    assert through(codec, itertools.count()).is_err


@every_plain_codec
def test_a_value_that_contains_itself_becomes_an_error_result(codec: Codec) -> None:
    value: list[Any] = []
    value.append(value)
    assert type(through(codec, value).error) is ResultSerializationError


def test_pickle_returns_a_value_that_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    read = through(PICKLE, value).return_value
    assert read[0] is read


@every_codec
def test_a_value_without_a_text_becomes_an_error_result(codec: Codec) -> None:
    class Mute:
        def __reduce__(self) -> Any:
            raise MuteError

    class MuteError(Exception):
        def __str__(self) -> str:
            raise self

    assert type(through(codec, Mute()).error) is ResultSerializationError


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


@each("pickle", "jsonb")
@pytest.mark.parametrize("damage", [b"", b"\x80\x04X", b"{", b"\xff", b"\x80\x04K\x01"])
def test_a_damaged_value_names_the_task_and_the_table(codec: Codec, damage: bytes) -> None:
    damaged = damage if codec is PICKLE else damage.decode(errors="replace")
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode(codec, encode(codec)._replace(return_value=damaged))
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        codec.decode_progress(StoredProgress("t1", "x", damaged))


@pytest.mark.parametrize("content", ['"no base64!"', "5", "null", '"eA=="'])
def test_a_damaged_wrapper_names_the_task_and_the_table(content: str) -> None:
    codec = CODECS["jsonb"]
    row = encode(codec)._replace(return_value=f'{{"$serialized": {content}}}')
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode(codec, row)
