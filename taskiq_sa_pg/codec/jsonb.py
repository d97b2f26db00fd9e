"""What PostgreSQL's text and jsonb can hold, and wrappers for what they cannot.

jsonb refuses NUL, lone surrogates, NaN and infinities, forgets the sign of -0.0 and turns a float
that is written with an exponent into an integer. Such a value, and one that looks like a wrapper
itself, is stored as `{"$serialized": "<base64 of the serializer's bytes>"}`: it comes back whole.

Bytes in labels and in exceptions, which JSON cannot hold, are `{"$bytes": "<base64>"}`, and texts
with lone surrogates, where the serializer cannot hold them either, `{"$surrogates": "<base64>"}`.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

_SERIALIZED: Final = "$serialized"
_BYTES: Final = "$bytes"
_SURROGATES: Final = "$surrogates"
_WRAPPERS: Final = frozenset({_SERIALIZED, _BYTES, _SURROGATES})

# Python refuses to read integers of more than 4,300 digits.
_MAX_PLAIN_BITS: Final = 14_000

# Python's own JSON encoder ends near 1,000.
_MAX_PLAIN_DEPTH: Final = 500

# JSON text without any of these needs no closer look.
_SUSPECT: Final = re.compile(
    r"\\u0000|\\u[dD][89a-fA-F]|\d[eE]\+?\d|(?<!\w)-0|NaN|Infinity|\$serialized|\$bytes"
    r"|\$surrogates"
)


def storable_text(text: str) -> str:
    """The text with what PostgreSQL cannot hold, NUL and lone surrogates, written as escapes."""
    return text.encode(errors="backslashreplace").decode().replace("\x00", "\\x00")


def to_jsonb(dumped: bytes) -> str:
    """JSON text for a jsonb column, of what a serializer that writes JSON has written."""
    text = dumped.decode()
    if not _SUSPECT.search(text):
        return text
    try:
        survives = is_plain(json.loads(text))
    except (ValueError, RecursionError):
        survives = False
    return text if survives else json.dumps(wrap(dumped))


def from_jsonb(stored: str) -> bytes:
    """What the serializer wrote, of the text of a jsonb column."""
    if _SERIALIZED in stored:
        document = json.loads(stored)
        if is_wrapper(document):
            return base64.b64decode(document[_SERIALIZED], validate=True)
    return stored.encode()


def is_plain(value: Any) -> bool:
    """Whether jsonb returns this value equal and of the same type, and it is no wrapper."""
    if is_wrapper(value):
        return False
    pending = [(value, 0)]
    while pending:
        current, depth = pending.pop()
        kind = type(current)
        if kind is dict:
            if not all(type(name) is str and _is_plain_scalar(name, str) for name in current):
                return False
            parts = current.values()
        elif kind is list:
            parts = current
        elif _is_plain_scalar(current, kind):
            continue
        else:
            return False
        if depth == _MAX_PLAIN_DEPTH:  # as of a value that contains itself
            return False
        pending.extend((part, depth + 1) for part in parts)
    return True


def _is_plain_scalar(value: Any, kind: type) -> bool:
    if kind is str:
        return (value.isascii() and "\x00" not in value) or storable_text(value) == value
    if kind is float:
        # From 1e16 on floats are written with an exponent, which jsonb turns into an integer.
        is_negative_zero = value == 0 and math.copysign(1, value) < 0
        return abs(value) < 1e16 and not is_negative_zero
    if kind is int:
        return bool(value.bit_length() < _MAX_PLAIN_BITS)
    return value is None or kind is bool


def wrap(dumped: bytes) -> dict[str, str]:
    """The wrapper of a serializer's bytes."""
    return {_SERIALIZED: base64.b64encode(dumped).decode()}


def wrap_bytes(value: bytes) -> dict[str, str]:
    """The wrapper of a value that is bytes."""
    return {_BYTES: base64.b64encode(value).decode()}


def wrap_text(value: str) -> dict[str, str]:
    """The wrapper of a text that UTF-8 cannot hold."""
    return {_SURROGATES: base64.b64encode(value.encode(errors="surrogatepass")).decode()}


def unwrap(document: Mapping[str, str], load: Callable[[bytes], Any]) -> Any:
    """The value in a wrapper; load is the serializer's."""
    [(kind, encoded)] = document.items()
    content = base64.b64decode(encoded, validate=True)
    if kind == _SURROGATES:
        return content.decode(errors="surrogatepass")
    return content if kind == _BYTES else load(content)


def is_wrapper(value: Any) -> bool:
    """Whether a JSON value is a wrapper."""
    return type(value) is dict and len(value) == 1 and not _WRAPPERS.isdisjoint(value)
