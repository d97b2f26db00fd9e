"""Exceptions that cannot be encoded or rebuilt, and documents that nobody should trust."""

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from taskiq_sa_pg import ResultDecodeError, ResultSerializationError
from taskiq_sa_pg.codec import Codec
from tests.unit.codecs import CODECS, PICKLE, every_codec
from tests.unit.codecs import decode_error as decode
from tests.unit.codecs import encode as encode_result
from tests.unit.codecs import encode_error as encode
from tests.unit.codecs import error_through as through

JSON = CODECS["json"]


class Hostile(Exception):
    """Every method that an encoder may call raises, what it raises does so too."""

    def __str__(self) -> str:
        raise self

    __repr__ = __reduce__ = __reduce_ex__ = __eq__ = __hash__ = __getstate__ = __str__  # type: ignore[assignment]  # wrong on purpose


class BrokenArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]  # wrong on purpose
        raise Hostile


@every_codec
def test_an_exception_whose_methods_raise_comes_back(codec: Codec) -> None:
    row = encode(codec, Hostile("a", 5))
    assert row.error_type == f"{__name__}.Hostile"
    assert row.traceback is not None
    error = decode(codec, row)
    assert type(error) is Hostile
    assert BaseException.__str__(error) == "('a', 5)"


@every_codec
def test_a_hostile_argument_leaves_its_exception_alone(codec: Codec) -> None:
    error = through(codec, ValueError("a", Hostile()))
    assert type(error) is ValueError
    assert error.args[0] == "a"


@every_codec
def test_an_exception_that_cannot_be_encoded_still_gives_an_error_result(
    codec: Codec, caplog: pytest.LogCaptureFixture
) -> None:
    row = encode(codec, BrokenArgs())
    assert row.is_err
    assert row.error_type == f"{__name__}.BrokenArgs"
    error = decode(codec, row)
    assert type(error) is ResultSerializationError
    assert "BrokenArgs" in str(error)
    assert "t1" in caplog.text


@every_codec
def test_an_exception_of_a_local_class_comes_back_as_a_stand_in(codec: Codec) -> None:
    class Local(LookupError):
        def __init__(self, *, key: str) -> None:
            super().__init__(key, 5)
            self.key = key

        def __str__(self) -> str:
            return f"no {self.key}"

    error = through(codec, Local(key="a"))
    assert issubclass(type(error), LookupError)
    assert (type(error).__name__, type(error).__module__) == ("Local", __name__)
    assert (str(error), error.args, error.key) == ("no a", ("a", 5), "a")


@pytest.fixture
def module() -> Any:
    module = ModuleType("only_the_worker_has_it")
    sys.modules[module.__name__] = module
    source = """
class Base(OSError): pass
class Gone(Base):
    def __init__(self, value, text):
        super().__init__(2, text, value)
        self.value = value
    def __str__(self): return f"gone: {self.value}"
class Interrupt(BaseException): pass
class Group(ExceptionGroup): pass
class Value:
    def __eq__(self, other): return type(self) is type(other)
"""
    exec(source, vars(module))  # noqa: S102 - the module of the worker's code
    yield module
    sys.modules.pop(module.__name__, None)


@every_codec
def test_a_class_that_the_reader_lacks_has_a_stand_in_of_the_nearest_base(
    codec: Codec, module: Any
) -> None:
    row = encode(codec, module.Gone("/a", "b"))
    del module.Gone
    error = decode(codec, row)
    assert type(error).__name__ == "Gone"
    assert isinstance(error, module.Base)
    assert (str(error), error.errno, error.filename) == ("gone: /a", 2, "/a")
    assert error.value == "/a"


@every_codec
def test_a_module_that_the_reader_lacks_is_not_imported(codec: Codec, module: Any) -> None:
    row = encode(codec, module.Gone("/a", "b"))
    group_row = encode(codec, module.Group("several", [module.Interrupt("x"), ValueError()][1:]))
    interrupt_row = encode(codec, module.Interrupt("x"))
    del sys.modules[module.__name__]
    assert type(decode(codec, row)).__bases__ == (OSError,)
    assert type(decode(codec, group_row)).__bases__ == (ExceptionGroup,)
    assert type(decode(codec, interrupt_row)).__bases__ == (BaseException,)
    assert module.__name__ not in sys.modules


def test_a_module_on_the_path_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "nobody_has_imported_it"
    (tmp_path / f"{name}.py").write_text("class Error(ValueError): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = decode_document({"exceptions": [{**NODE, "mro": [[name, "Error"], *NODE["mro"]]}]})
    assert (type(error).__name__, type(error).__bases__) == ("Error", (ValueError,))
    assert name not in sys.modules


def test_a_class_that_has_changed_at_the_reader_is_rebuilt_from_its_parts(module: Any) -> None:
    original = module.Base(2, "b")
    original.value = 5
    row = encode(PICKLE, original)

    def refuse(self: Any, *args: Any) -> None:
        raise TypeError("takes no arguments")

    module.Base.__init__ = refuse
    error = decode(PICKLE, row)
    assert type(error) is module.Base
    assert (error.errno, error.value) == (2, 5)


def test_an_argument_that_the_reader_lacks_leaves_the_exception_alone(module: Any) -> None:
    original: Any = ValueError("a", module.Value())
    original.value = module.Value()
    assert through(PICKLE, original).args == original.args
    row = encode(PICKLE, original)
    del module.Value
    error = decode(PICKLE, row)
    assert type(error) is ValueError
    assert error.args[0] == "a"


NODE: dict[str, Any] = {
    "mro": [["builtins", "ValueError"], ["builtins", "Exception"], ["builtins", "BaseException"]],
    "text": "x",
    "args": ["x"],
    "state": {},
    "object": None,
    "cause": None,
    "context": None,
    "suppress_context": False,
}


def decode_document(document: Any) -> Any:
    row = encode(JSON, ValueError("x"))
    return decode(JSON, row._replace(error=json.dumps(document).encode()))


def test_the_document_is_the_one_that_is_written() -> None:
    error = encode(JSON, ValueError("x")).error
    assert error is not None
    assert json.loads(error) == {"exceptions": [NODE]}


@pytest.mark.parametrize(
    "name",
    [
        *(["os", "system"], ["builtins", "eval"], ["builtins", "print"], ["os", "path.join"]),
        *(["builtins", "int"], [__name__, "Recorder"], [__name__, "pytest.fail.Exception.mro"]),
        *(["os", "nothing"], ["no.such.module", "Error"], ["builtins", ""], ["", ""]),
    ],
    ids=".".join,
)
def test_a_name_that_is_no_exception_class_is_never_called(name: list[str], tmp_path: Path) -> None:
    mark = tmp_path / "called"
    node = {**NODE, "mro": [name, *NODE["mro"]], "args": [f"touch {mark}"]}
    error = decode_document({"exceptions": [node]})
    assert isinstance(error, ValueError)
    assert error.args == (f"touch {mark}",)
    assert not any(tmp_path.iterdir())
    assert Recorder.made == []


def test_a_class_that_is_no_exception_is_never_derived_from() -> None:
    """To derive from it would run its code."""
    mro = [["gone", "Gone"], [__name__, "Recorder"], *NODE["mro"]]
    error = decode_document({"exceptions": [{**NODE, "mro": mro}]})
    assert type(error).__bases__ == (ValueError,)
    assert Recorder.derived == []


class Recorder:
    made: list[Any] = []  # noqa: RUF012 - the record
    derived: list[Any] = []  # noqa: RUF012 - the record

    def __init_subclass__(cls) -> None:
        Recorder.derived.append(cls)

    def __init__(self, *args: Any) -> None:
        self.made.append(args)


@pytest.mark.parametrize("name", [["os", "system"], ["builtins", "int"]], ids=".".join)
def test_a_document_that_names_no_exception_class_at_all_is_refused(name: list[str]) -> None:
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode_document({"exceptions": [{**NODE, "mro": [name]}]})


GROUP = {**NODE, "mro": [["builtins", "ExceptionGroup"], *NODE["mro"][1:]]}
DAMAGED = {
    **{
        f"no {name}": [{k: v for k, v in NODE.items() if k != name}]
        for name in NODE
        if name != "object"
    },
    **{
        f"{name} is 5": [{**NODE, name: 5}] for name in ("mro", "args", "state", "cause", "context")
    },
    **{f"{name} is text": [{**NODE, name: "odd"}] for name in ("mro", "state", "suppress_context")},
    "empty mro": [{**NODE, "mro": []}],
    "mro of numbers": [{**NODE, "mro": [[1, 2]]}],
    "mro of lists": [{**NODE, "mro": [[[], {}]]}],
    "unusable class name": [{**NODE, "mro": [["a", "b\x00"]]}],
    "cause of nobody": [{**NODE, "cause": 1}],
    "cause from the end": [{**NODE, "cause": -1}],
    "groups in each other": [{**GROUP, "members": [1]}, {**GROUP, "members": [0]}],
    "group in itself": [{**GROUP, "members": [0]}],
    "member nobody": [{**GROUP, "members": [7]}],
    "nobody": [],
    "no list": 5,
    "no node": [5],
}


@pytest.mark.parametrize("nodes", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.timeout(20)
def test_a_damaged_document_names_the_task_and_the_table(nodes: Any) -> None:
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode_document({"exceptions": copy.deepcopy(nodes)})


@every_codec
@pytest.mark.parametrize("document", [None, 5, "x", [], {}, {"exceptions": None}], ids=repr)
def test_what_is_no_document_names_the_task_and_the_table(codec: Codec, document: Any) -> None:
    row = encode_result(codec, is_err=True, return_value=document)
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode(codec, row._replace(error=row.return_value))


@every_codec
def test_a_truncated_error_names_the_task_and_the_table(codec: Codec) -> None:
    row = encode(codec, ValueError("x"))
    assert row.error is not None
    for size in (0, 1, len(row.error) // 2, len(row.error) - 1):
        with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
            decode(codec, row._replace(error=row.error[:size]))
