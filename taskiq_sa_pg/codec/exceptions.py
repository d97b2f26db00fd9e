"""Exceptions as plain data and back: with arguments, attributes, notes, chain and group.

taskiq.serialization has no place for the chain of an exception that can be pickled, loses the
class where a constructor takes other arguments than `args`, and recurses along the chain. So its
rule of what may be rebuilt is kept here (exception classes of modules that are imported already,
and nothing else), and its stand-in classes; the form is our own:

    {"exceptions": [{"mro": [[module, qualified name], ...], "text": str(exception),
                     "args": [...], "state": {...}, "object": ..., "members": [index, ...],
                     "cause": index, "context": index, "suppress_context": bool}, ...]}

The first is the exception itself. `object` is there where the serializer holds exceptions as they
are (pickle); the rest is for readers that cannot load it, and for the other serializers.
"""

import re
import sys
import traceback
from collections.abc import Mapping
from functools import lru_cache
from types import MemberDescriptorType, ModuleType
from typing import Any, Final, Protocol

from taskiq.serialization import create_exception_cls

from taskiq_sa_pg.codec.jsonb import storable_text

Document = dict[str, Any]

_MAX_TRACEBACK_CHARACTERS: Final = 65_536

# How a pickle ends to name a class for the first time: the opcodes STACK_GLOBAL and MEMOIZE.
_CLASS: Final = b"\x93\x94"

# And what stands before: the name, with its length, or its number if it was written before.
_CLASS_NAME: Final = re.compile(rb"(?:\x8c(.)([\x20-\x7e]+)\x94|h.|j.{4}|\x94)\Z", re.DOTALL)
_MAX_NAME_BYTES: Final = 260


class _Packer(Protocol):
    """Makes values plain data, and back; raises where it cannot: a class may not be here."""

    def pack(self, value: Any) -> Any: ...
    def unpack(self, packed: Any) -> Any: ...


def qualified_name(cls: type) -> str:
    """Module and qualified name, as tracebacks print them: builtins without their module."""
    if cls.__module__ in {"builtins", "__main__"}:
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def format_traceback(exception: BaseException) -> str:
    """The traceback with its chain, as Python prints it; the end of it where it is very long."""
    try:
        formatted = "".join(traceback.format_exception(exception))
    except Exception as exc:  # noqa: BLE001 - whatever its __str__ and attributes do
        reason = qualified_name(type(exc))
        formatted = f"{qualified_name(type(exception))} (cannot be formatted: {reason})\n"
    if len(formatted) <= _MAX_TRACEBACK_CHARACTERS:
        return formatted
    return "[...]\n" + formatted[-_MAX_TRACEBACK_CHARACTERS:]


def exception_to_document(exception: BaseException, packer: _Packer) -> Document:
    """The exception, and all that its chain and its groups reach, as plain data."""
    found: list[BaseException] = [exception]
    index_of: dict[int, int] = {id(exception): 0}

    def refer(to: BaseException | None) -> int | None:
        if to is None:
            return None
        if id(to) not in index_of:
            index_of[id(to)] = len(found)
            found.append(to)
        return index_of[id(to)]

    nodes: list[Document] = []
    for current in found:  # which grows meanwhile: the chain may be long and have cycles
        node: Document = {
            "mro": [
                [cls.__module__, cls.__qualname__]
                for cls in type(current).__mro__
                if issubclass(cls, BaseException)
            ],
            "text": _text_of(current),
            "args": [pack_or_repr(arg, packer) for arg in _constructor_args(current)],
            "state": {
                storable_text(str(name)): pack_or_repr(value, packer)
                for name, value in _state_of(current).items()
            },
        }
        if isinstance(current, BaseExceptionGroup):
            node["members"] = [refer(member) for member in current.exceptions]
        else:
            node["object"] = _pack_whole(current, packer)
        node["cause"] = refer(current.__cause__)
        node["context"] = refer(current.__context__)
        node["suppress_context"] = current.__suppress_context__
        nodes.append(node)
    return {"exceptions": nodes}


def may_hold_exception(pickled: bytes) -> bool:
    """Whether a pickle names a class called like an exception; it is not loaded.

    Bytes that only look so, and classes whose name is not told where they are used, count too.
    """
    at = pickled.find(_CLASS)
    while at != -1:
        found = _CLASS_NAME.search(pickled, max(at - _MAX_NAME_BYTES, 0), at)
        if found:
            length, name = found.groups()
            if name is None or length[0] != len(name) or _is_exception_name(name.decode()):
                return True
        at = pickled.find(_CLASS, at + 1)
    return False


@lru_cache(maxsize=1_000)
def _is_exception_name(name: str) -> bool:
    pending: list[type] = [BaseException]
    for cls in pending:  # which grows meanwhile
        pending += type.__subclasses__(cls)
        if cls.__qualname__ == name:
            return True
    return False


def _state_of(exception: BaseException) -> dict[str, Any]:
    names = [
        name
        for cls in type(exception).__mro__
        if cls.__module__ != "builtins"
        for name, member in vars(cls).items()
        if isinstance(member, MemberDescriptorType)  # of __slots__
    ]
    if isinstance(exception, ImportError):
        names += ["name", "path"]
    slots = {name: getattr(exception, name) for name in names if hasattr(exception, name)}
    return slots | vars(exception)


def _constructor_args(exception: BaseException) -> tuple[Any, ...]:
    if isinstance(exception, BaseExceptionGroup):
        return (exception.message,)
    # OSError takes its file names out of `args`; __reduce__ puts them back.
    if isinstance(exception, OSError) and type(exception).__reduce__ is OSError.__reduce__:
        reduced: Any = exception.__reduce__()
        return tuple(reduced[1])
    return exception.args


def _text_of(exception: BaseException) -> str:
    try:
        return storable_text(str(exception))
    except Exception as exc:  # noqa: BLE001 - anyone's __str__
        return f"<no text: {type(exc).__qualname__}>"


def pack_or_repr(value: Any, packer: _Packer) -> Any:
    """The value packed or, where it cannot be, its repr."""
    try:
        return packer.pack(value)
    except Exception:  # noqa: BLE001 - what cannot be packed is told by its repr
        return _repr_of(value)


def _repr_of(value: Any) -> str:
    try:
        return storable_text(repr(value))
    except Exception:  # noqa: BLE001 - anyone's __repr__
        return f"<{qualified_name(type(value))} without a repr>"


def _pack_whole(exception: BaseException, packer: _Packer) -> Any:
    try:
        packed = packer.pack(exception)
        copy = packer.unpack(packed)
        # A constructor that takes other arguments than it leaves in `args` can succeed all the
        # same, and garble them.
        is_faithful = (
            type(copy) is type(exception)
            and exception.args in ((), copy.args)
            and _text_of(copy) == _text_of(exception)
            and _state_of(copy).keys() == _state_of(exception).keys()
        )
    except Exception:  # noqa: BLE001 - then its parts have to do
        return None
    return packed if is_faithful else None


def exception_from_document(document: Mapping[str, Any], packer: _Packer) -> BaseException:
    """The exception of a document, of the nearest class that this process has.

    A class that is not there, or is no exception, is replaced by a stand-in of the same name
    that derives from the nearest base that is there.
    """
    nodes: list[Document] = document["exceptions"]
    built = _build_all(nodes, packer)
    for index, node in enumerate(nodes):
        for name in ("cause", "context"):
            chained = None if node[name] is None else built[node[name]]
            _set(built[index], f"__{name}__", chained)
        _set(built[index], "__suppress_context__", node["suppress_context"])
    return built[0]


def _set(exception: BaseException, name: str, value: Any) -> None:
    # Past the __setattr__ of the class: that of a frozen dataclass refuses.
    BaseException.__setattr__(exception, name, value)


def _build_all(nodes: list[Document], packer: _Packer) -> dict[int, BaseException]:
    built: dict[int, BaseException] = {}
    # A group is made of its members, which mostly come after it.
    pending = list(reversed(range(len(nodes))))
    while pending:
        postponed = []
        for index in pending:
            members = nodes[index].get("members", ())
            if all(member in built for member in members):
                built[index] = _build(nodes[index], [built[m] for m in members], packer)
            else:
                postponed.append(index)
        if len(postponed) == len(pending):
            raise ValueError("exception groups that contain each other")
        pending = postponed
    return built


def _build(node: Document, members: list[BaseException], packer: _Packer) -> BaseException:
    whole = _unpack_or(None, node.get("object"), packer)
    if isinstance(whole, BaseException):
        if not node["args"]:  # pydantic's ValidationError gets some by being rebuilt
            _set(whole, "args", ())
        return whole
    args = [_unpack_or(node["text"], arg, packer) for arg in node["args"]]
    if members:
        args.append(members)
    cls, *bases = map(_find_class, node["mro"])
    exception = None if cls is None else _instantiate(cls, args)
    if exception is None:
        exception = _stand_in(node, [base for base in bases if base is not None], args)
    for name, packed in node["state"].items():
        value = _unpack_or(None, packed, packer)
        if isinstance(getattr(type(exception), name, None), MemberDescriptorType):
            _set(exception, name, value)
        else:
            vars(exception)[name] = value
    return exception


def _unpack_or(default: Any, packed: Any, packer: _Packer) -> Any:
    try:
        return packer.unpack(packed)
    except Exception:  # noqa: BLE001 - its class is not here, or has become another
        return default


def _find_class(name: list[str]) -> type[BaseException] | None:
    # Only what is imported already: a name in a table is no reason to run a module.
    module, qualname = name
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
    if isinstance(found, type) and issubclass(found, BaseException):
        return found
    return None


def _instantiate(cls: type[BaseException], args: list[Any]) -> BaseException | None:
    # Past the constructors written in Python: what they take is not what they left in `args`.
    native: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    try:
        exception = native.__new__(cls, *args)
        native.__init__(exception, *args)
    except Exception:  # noqa: BLE001 - a native constructor that takes something else
        return None
    return exception if isinstance(exception, BaseException) else None


def _stand_in(node: Document, bases: list[type[BaseException]], args: list[Any]) -> BaseException:
    module, qualname = node["mro"][0]
    text = node["text"]
    for base in bases:
        try:
            cls = create_exception_cls(qualname.rpartition(".")[2], module, base)  # type: ignore[arg-type]  # taskiq takes any BaseException
            cls.__str__ = lambda _: text  # type: ignore[method-assign]  # a class of our own
        except Exception:  # noqa: BLE001, S112 - a class that cannot be derived from
            continue
        for arguments in (args, [text]):
            exception = _instantiate(cls, arguments)
            if exception is not None:
                return exception
    raise ValueError(f"no base of {module}.{qualname} is an exception class")
