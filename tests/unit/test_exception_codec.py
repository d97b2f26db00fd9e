"""Exceptions through the codec: what they are, what they carry, and what they are linked to."""

import copy
import pickle
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg import exceptions
from taskiq_sa_pg.codec import Codec
from tests.unit.codecs import CODECS, PICKLE, each, every_codec
from tests.unit.codecs import encode as encode_result
from tests.unit.codecs import encode_error as encode
from tests.unit.codecs import error_through as through


class OtherArguments(Exception):
    """Its constructor takes other arguments than it leaves in `args`."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}", "x")
        self.code = code


class OneOtherArgument(Exception):
    """Its constructor takes what is in its `args`, and garbles them in silence."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"failed: {reason}")

    def __str__(self) -> str:
        return "always the same"


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Slots(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, *, code: int) -> None:
        super().__init__("slots")
        self.code = code


@dataclass
class Data(Exception):
    code: int
    reason: str


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


@dataclass(frozen=True, slots=True)
class FrozenSlots(Exception):
    code: int


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class Base(BaseException):
    pass


class Outer:
    class Nested(LookupError):
        pass


def with_attributes() -> Exception:
    exception: Any = ValueError("a")
    exception.number, exception.items = 5, [1, {"a": None}]
    exception.add_note("first")
    exception.add_note("second")
    assert isinstance(exception, Exception)
    return exception


def decode_error() -> Exception:
    try:
        b"a\xff".decode()
    except UnicodeDecodeError as exc:
        return exc
    raise AssertionError


def surrogate_error() -> Exception:
    try:
        "a\udcff".encode()
    except UnicodeEncodeError as exc:
        return exc
    raise AssertionError


def validation_error() -> pydantic.ValidationError:
    try:
        pydantic.TypeAdapter(list[int]).validate_python(["x"])
    except pydantic.ValidationError as exc:
        return exc
    raise AssertionError


def syntax_error() -> Exception:
    try:
        compile("a b", "task.py", "exec")
    except SyntaxError as exc:
        return exc
    raise AssertionError


EXCEPTIONS = {
    "no arguments": ValueError(),
    "several arguments": ValueError("a", 1, None, [2, {"b": 1.5}]),
    "text that PostgreSQL cannot hold": ValueError("a\x00b"),
    "bytes": ValueError(bytes(range(256)), "x"),
    "a wrapper": ValueError({"$serialized": "x"}, {"$bytes": "x"}, [{"$bytes": 1}]),
    "KeyError": KeyError("missing"),
    "other arguments": OtherArguments(5),
    "one other argument": OneOtherArgument("x"),
    "keyword-only argument": KeywordOnly(code=5),
    "keyword-only argument, taskiq's": TaskiqResultTimeoutError(timeout=1.5),
    "slots": Slots(code=5),
    "dataclass": Data(5, "x"),
    "dataclass with keywords": Data(code=5, reason="x"),
    "frozen dataclass": Frozen(5),
    "frozen dataclass with slots": FrozenSlots(code=5),
    "falsy": Falsy("x"),
    "nested class": Outer.Nested("x"),
    "attributes and notes": with_attributes(),
    "OSError": OSError(2, "gone"),
    "OSError with a file": FileNotFoundError(2, "gone", "/a"),
    "OSError with two files": OSError(18, "crossed", "/a", None, "/b"),
    "OSError of one text": OSError("text"),
    "UnicodeDecodeError": decode_error(),
    "SyntaxError": syntax_error(),
    "ImportError": ModuleNotFoundError("no a", name="a", path="/a"),
    "CalledProcessError": subprocess.CalledProcessError(3, ["ls", "-l"], b"out\xff", b""),
    "BaseException": Base("x"),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "SystemExit": SystemExit(3),
    "group": ExceptionGroup("several", [ValueError(1), KeyError("a")]),
    "BaseException group": BaseExceptionGroup("several", [Base(), ValueError(1)]),
}


def assert_alike(exception: BaseException, original: BaseException) -> None:
    assert type(exception) is type(original)
    assert str(exception) == str(original)
    if isinstance(original, BaseExceptionGroup):
        assert isinstance(exception, BaseExceptionGroup)
        for member, its_original in zip(exception.exceptions, original.exceptions, strict=True):
            assert_alike(member, its_original)
    else:
        assert list(exception.args) == [list_of(arg) for arg in original.args]
    assert exception.__dict__ == original.__dict__


def list_of(value: Any) -> Any:
    """SyntaxError has a tuple among its arguments, for which most serializers have a list."""
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_class_arguments_text_and_attributes_come_back(name: str) -> None:
    original = EXCEPTIONS[name]
    for codec in CODECS.values():
        exception = through(codec, original)
        if codec is PICKLE and name == "SyntaxError":
            assert exception.args == original.args
            exception.args = tuple(map(list_of, exception.args))
        assert_alike(exception, original)


@every_codec
def test_native_attributes_come_back(codec: Codec) -> None:
    missing = through(codec, EXCEPTIONS["OSError with two files"])
    assert (missing.errno, missing.filename, missing.filename2) == (18, "/a", "/b")
    unimportable = through(codec, EXCEPTIONS["ImportError"])
    assert (unimportable.name, unimportable.path) == ("a", "/a")
    undecodable = through(codec, EXCEPTIONS["UnicodeDecodeError"])
    assert (undecodable.object, undecodable.start) == (b"a\xff", 1)
    assert through(codec, EXCEPTIONS["SystemExit"]).code == 3
    assert through(codec, EXCEPTIONS["SyntaxError"]).lineno == 1
    assert through(codec, EXCEPTIONS["slots"]).code == 5
    assert through(codec, EXCEPTIONS["frozen dataclass with slots"]).code == 5


@each("pickle", "json", "jsonb")
def test_lone_surrogates_come_back(codec: Codec) -> None:
    assert_alike(through(codec, surrogate_error()), surrogate_error())


@given(st.lists(st.tuples(st.integers(), st.binary(), st.text(st.characters()))))
def test_pickle_returns_any_arguments(args: list[Any]) -> None:
    assert through(PICKLE, OtherArguments(5)).code == 5
    assert through(PICKLE, ValueError(*args)).args == tuple(args)


def test_pickle_returns_a_validation_error_as_itself() -> None:
    original = validation_error()
    assert_alike(through(PICKLE, original), original)
    assert through(PICKLE, original).errors() == original.errors()


@every_codec
def test_a_validation_error_keeps_its_text(codec: Codec) -> None:
    error = through(codec, validation_error())
    assert str(error) == str(validation_error())
    assert isinstance(error, ValueError)
    assert type(error).__name__ == "ValidationError"


@every_codec
@pytest.mark.parametrize(
    "arg",
    [2**100, [[2**100]], "\ud800", lambda: None, 1j],
    ids=["a large integer", "a nested one", "a lone surrogate", "a lambda", "a complex number"],
)
def test_an_argument_that_cannot_be_held_leaves_class_and_neighbours_alone(
    codec: Codec, arg: Any
) -> None:
    error = through(codec, ValueError("before", arg, 5))
    assert type(error) is ValueError
    assert (error.args[0], error.args[2]) == ("before", 5)
    assert error.args[1] in (arg, str(arg), "'\\ud800'")


@every_codec
@pytest.mark.parametrize("levels", [252, 400, 2000])
def test_a_deep_argument_leaves_the_class_alone(codec: Codec, levels: int) -> None:
    arg: Any = "bottom"
    for _ in range(levels):
        arg = [arg]
    assert type(through(codec, Data(arg, "x"))) is Data


@every_codec
@pytest.mark.timeout(20)
def test_an_argument_that_contains_itself_leaves_the_class_alone(codec: Codec) -> None:
    arg: list[Any] = []
    arg.extend([arg, arg])
    error: Any = ValueError("x", arg)
    error.self = error
    assert type(through(codec, error)) is ValueError
    assert through(codec, error).args[0] == "x"


@every_codec
def test_a_datetime_argument_comes_back_as_one_or_as_iso_text(codec: Codec) -> None:
    at = datetime(2024, 2, 29, tzinfo=UTC)
    [arg] = through(codec, ValueError(at)).args
    assert arg in (at, "2024-02-29T00:00:00Z", "2024-02-29T00:00:00+00:00")


SURROGATE = "\ud800"
UNICODE = [
    UnicodeEncodeError("utf-8", f"a{SURROGATE}b", 1, 2, "surrogates not allowed"),
    UnicodeDecodeError("utf-8", b"a\xffb", 1, 2, "invalid start byte"),
    UnicodeTranslateError(f"a{SURROGATE}b", 1, 2, "no reason"),
    ValueError(f"a{SURROGATE}b", [1]),
]


@every_codec
@pytest.mark.parametrize("error", UNICODE, ids=lambda error: type(error).__name__)
def test_texts_with_lone_surrogates_come_back(codec: Codec, error: Exception) -> None:
    read = through(codec, error)
    assert (type(read), read.args, str(read)) == (type(error), error.args, str(error))


OWN = [
    *(exceptions.TaskiqSaPgError("a", 1), exceptions.ConfigurationError("a")),
    *(exceptions.NotStartedError("a"), exceptions.InvalidTaskIdError("t1", "is bad")),
    *(exceptions.SchemaError("a"), exceptions.StorageError("a", "53300")),
    *(exceptions.TaskAbandonedError("t1", 5), exceptions.TaskAbandonedError("t1", None, "host:1")),
    exceptions.NotResendableError("t1", "why"),
    *(exceptions.StorageError("a", None), exceptions.ResultIsMissingError("t1", "jobs")),
    exceptions.PayloadTooLargeError("the return value", 2, 1),
    exceptions.MissingColumnsError("is_err, error", "taskiq_results"),
    exceptions.ResultDecodeError("the result", "jobs", "why"),
    exceptions.ResultSerializationError("the value", "function", "why"),
]


def test_every_error_of_ours_is_tested() -> None:
    defined = {value for value in vars(exceptions).values() if isinstance(value, type)}
    ours = {cls for cls in defined if issubclass(cls, exceptions.TaskiqSaPgError)}
    assert ours == set(map(type, OWN))


@pytest.mark.parametrize("error", OWN, ids=repr)
def test_our_errors_survive_everything(error: exceptions.TaskiqSaPgError) -> None:
    copies = [pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)]
    for copied in [*copies, *(through(codec, error) for codec in CODECS.values())]:
        assert_alike(copied, error)
        assert repr(copied) == repr(error)
        assert copied.message == error.message


@every_codec
def test_error_type_and_traceback_are_told(codec: Codec) -> None:
    try:
        raise KeyError("missing") from ValueError("first")
    except KeyError as exc:
        row = encode(codec, exc)
    assert row.error_type == "KeyError"
    assert row.traceback is not None
    assert "ValueError: first\n\nThe above exception was the direct cause" in row.traceback
    assert row.traceback.endswith("KeyError: 'missing'\n")
    assert encode(codec, Outer.Nested()).error_type == f"{__name__}.Outer.Nested"


@every_codec
def test_a_traceback_is_capped_at_its_beginning(codec: Codec) -> None:
    row = encode(codec, ValueError("x" * 1_000_000 + "the end\x00\ud800"))
    assert row.traceback is not None
    assert len(row.traceback) < 70_000
    assert row.traceback.startswith("[...]\n")
    assert row.traceback.endswith("the end\\x00\\ud800\n")


@every_codec
def test_a_result_without_an_error_has_none(codec: Codec) -> None:
    row = encode_result(codec)
    assert (row.error, row.error_type, row.traceback) == (None, None, None)
