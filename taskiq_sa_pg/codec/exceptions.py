"""Converts exceptions to plain data and back: arguments, attributes, notes, chain and group.

taskiq.serialization does not store the chain of an exception that can be pickled, loses the class
if a constructor takes other arguments than `args`, and recurses along the chain. This module keeps
its rule of what may be rebuilt (only exception classes of modules that are already imported) and
its stand-in classes, but has its own format:

    {"exceptions": [{"mro": [[module, qualified name], ...], "text": str(exception),
                     "args": [...], "state": {...}, "object": ..., "members": [index, ...],
                     "cause": index, "context": index, "suppress_context": bool}, ...]}

The first is the exception itself. `object` exists if the serializer can store exceptions (pickle);
the rest is for readers that cannot load it, and for the other serializers.
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

# A pickle ends the first mention of a class with the opcodes STACK_GLOBAL and MEMOIZE.
_CLASS: Final = b"\x93\x94"

# Before them is the name with its length, or its number if it was written before.
_CLASS_NAME: Final = re.compile(rb"(?:\x8c(.)([\x20-\x7e]+)\x94|h.|j.{4}|\x94)\Z", re.DOTALL)
_MAX_NAME_BYTES: Final = 260


class _Packer(Protocol):
    """Converts values to plain data and back; raises if it cannot: a class may be missing."""

    def pack(self, value: Any) -> Any: ...
    def unpack(self, packed: Any) -> Any: ...


def qualified_name(cls: type) -> str:
    """Module and qualified name, as tracebacks print them: builtins without the module."""
    if cls.__module__ in {"builtins", "__main__"}:
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def format_traceback(exception: BaseException) -> str:
    """The traceback with its chain, as Python prints it; only its end if it is very long."""
    try:
        formatted = "".join(traceback.format_exception(exception))
    except Exception as exc:  # noqa: BLE001 - whatever its __str__ and attributes do
        reason = qualified_name(type(exc))
        formatted = f"{qualified_name(type(exception))} (cannot be formatted: {reason})\n"
    if len(formatted) <= _MAX_TRACEBACK_CHARACTERS:
        return formatted
    return "[...]\n" + formatted[-_MAX_TRACEBACK_CHARACTERS:]


def exception_to_document(exception: BaseException, packer: _Packer) -> Document:
    """Converts an exception, with its chain and its groups, to plain data."""
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
    for current in found:  # the list grows meanwhile; the chain may be long and have cycles
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
    """Whether a pickle names a class that is called like an exception, without loading it.

    Bytes that look the same, and classes whose name was written earlier, count too.
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
    for cls in pending:  # the list grows meanwhile
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
        if isinstance(member, MemberDescriptorType)  # from __slots__
    ]
    if isinstance(exception, ImportError):
        names += ["name", "path"]
    slots = {name: getattr(exception, name) for name in names if hasattr(exception, name)}
    return slots | vars(exception)


def _constructor_args(exception: BaseException) -> tuple[Any, ...]:
    if isinstance(exception, BaseExceptionGroup):
        return (exception.message,)
    # OSError removes its file names from `args`; __reduce__ returns them.
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
    """The packed value, or its repr if it cannot be packed."""
    try:
        return packer.pack(value)
    except Exception:  # noqa: BLE001 - packing may raise anything
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
        # A constructor that takes other arguments than those in `args` may succeed and change
        # them.
        is_faithful = (
            type(copy) is type(exception)
            and exception.args in ((), copy.args)
            and _text_of(copy) == _text_of(exception)
            and _state_of(copy).keys() == _state_of(exception).keys()
        )
    except Exception:  # noqa: BLE001 - then only its parts are stored
        return None
    return packed if is_faithful else None


def exception_from_document(document: Mapping[str, Any], packer: _Packer) -> BaseException:
    """Rebuilds the exception of a document.

    A class that is not imported, or is not an exception, is replaced by a stand-in of the same
    name that derives from the nearest imported base.
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
    # Not by the class's own __setattr__, which a frozen dataclass does not allow.
    BaseException.__setattr__(exception, name, value)


def _build_all(nodes: list[Document], packer: _Packer) -> dict[int, BaseException]:
    built: dict[int, BaseException] = {}
    # A group is built from its members, which mostly come after it.
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
        if not node["args"]:  # rebuilding pydantic's ValidationError adds some
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
    except Exception:  # noqa: BLE001 - its class is missing or has changed
        return default


def _find_class(name: list[str]) -> type[BaseException] | None:
    # Only imported modules: a name in a table must not run a module.
    module, qualname = name
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = vars(found).get(part) if isinstance(found, ModuleType | type) else None
    if isinstance(found, type) and issubclass(found, BaseException):
        return found
    return None


def _instantiate(cls: type[BaseException], args: list[Any]) -> BaseException | None:
    # Not by constructors written in Python: they may take other arguments than those in `args`.
    native: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
    try:
        exception = native.__new__(cls, *args)
        native.__init__(exception, *args)
    except Exception:  # noqa: BLE001 - a native constructor with other arguments
        return None
    return exception if isinstance(exception, BaseException) else None


def _stand_in(node: Document, bases: list[type[BaseException]], args: list[Any]) -> BaseException:
    module, qualname = node["mro"][0]
    text = node["text"]
    for base in bases:
        try:
            cls = create_exception_cls(qualname.rpartition(".")[2], module, base)  # type: ignore[arg-type]  # taskiq takes any BaseException
            cls.__str__ = lambda _: text  # type: ignore[method-assign]  # our own class
        except Exception:  # noqa: BLE001, S112 - a class that cannot be derived from
            continue
        for arguments in (args, [text]):
            exception = _instantiate(cls, arguments)
            if exception is not None:
                return exception
    raise ValueError(f"no base of {module}.{qualname} is an exception class")
