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

from taskiq_sa_pg import (
    ConfigurationError,
    PayloadTooLargeError,
    ResultDecodeError,
    ResultSerializationError,
    TableConfig,
)
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.statements import StoredProgress
from tests.unit.codecs import (
    BYTEA,
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
    with pytest.raises(ResultSerializationError, match="the progress metadata of type function"):
        codec.encode_progress("t1", TaskProgress(state="x", meta=lambda: None))


class Refused(Exception):
    """pickle calls it with what it has left in `args`."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"refused with {code}")
        self.code = code


class RefusedByANameOfMoreThan32Characters(Refused): ...


class Holder:
    def __init__(self, held: Any) -> None:
        self.held = held


HOLDERS: dict[str, Callable[[Exception], Any]] = {
    "itself": lambda error: error,
    "list": lambda error: [error],
    "key": lambda error: {error: 1},
    "deep": lambda error: {"a": [(1, {"b": {2, frozenset([error])}})]},
    "dataclass": Feed,
    "object": Holder,
    "model": lambda error: Envelope(content=error),
    "chunks": lambda error: [*("x" * 70_000,) * 3, error],
    "neighbours": lambda error: ["Refused", Holder.__module__, error, error],
    "bytes": lambda error: [bytes(range(256)) * 10, b"\x94\x93\x94", error],
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_an_exception_that_pickle_cannot_load_becomes_an_error_result(
    hold: Callable[[Exception], Any],
) -> None:
    result = through(PICKLE, hold(Refused(code=7)))
    assert (result.is_err, result.return_value) == (True, None)
    assert type(result.error) is ResultSerializationError
    assert "Refused.__init__() takes 1 positional argument" in str(result.error)


def test_a_name_that_was_written_before_hides_no_exception() -> None:
    """Equal names of modules and classes are one text, which pickle writes once."""
    name = Refused.__qualname__
    for value in ([name, Refused(code=7)], {name: {name: Refused(code=7)}}):
        assert type(through(PICKLE, value).error) is ResultSerializationError
    # Here that number is the opcode of a text, which the name's length and the name might be.
    long = RefusedByANameOfMoreThan32Characters(code=7)
    value = [*map(str, range(139)), __name__, long]
    assert b"h\x8c\x8c$Refused" in PickleSerializer().dumpb(value)
    assert type(through(PICKLE, value).error) is ResultSerializationError


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_other_exceptions_in_values_come_back(hold: Callable[[Exception], Any]) -> None:
    result = through(PICKLE, hold(KeyError("a")))
    assert (result.is_err, type(result.return_value)) == (False, type(hold(KeyError())))


class Loads:
    """Counts how often it is loaded."""

    number = 0

    def __setstate__(self, state: Any) -> None:
        Loads.number += 1


def test_a_pickle_without_an_exception_is_not_loaded() -> None:
    value = [Loads(), Feed(1), Path(), {"a": 1.5}, "Refused"]
    value[0].some = 1  # type: ignore[attr-defined]  # a state, to be set
    encode(PICKLE, return_value=value)
    assert Loads.number == 0
    encode(PICKLE, return_value=[*value, KeyError()])
    assert Loads.number == 1


@pytest.mark.parametrize("most", [None, 5_000])
@pytest.mark.parametrize("config", [BYTEA, JSONB], ids=["bytea", "jsonb"])
def test_what_no_column_holds_becomes_an_error_result(
    config: TableConfig, most: int | None
) -> None:
    """Whatever max_payload_bytes says."""
    codec = Codec(config, JSONSerializer(), most, column_bytes=1_000)
    assert not through(codec, "x" * 998).is_err
    result = through(codec, "x" * 999)
    assert (result.is_err, result.return_value) == (True, None)
    assert type(result.error) is PayloadTooLargeError
    assert "the return value takes 1001 bytes, and the limit is 1000" in str(result.error)
    with pytest.raises(PayloadTooLargeError):
        codec.encode_progress("t1", TaskProgress(state="x", meta="x" * 999))
    # What jsonb cannot hold is stored in a wrapper, which takes more.
    wrapped = through(codec, "\x00" * 150)
    assert wrapped.is_err == (config is JSONB)


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
