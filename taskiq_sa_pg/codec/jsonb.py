"""Values that PostgreSQL's text and jsonb can store, and wrappers for other values.

jsonb rejects NUL, lone surrogates, NaN and infinities, loses the sign of -0.0, and converts a
float that is written with an exponent to an integer. Such a value, or a value that looks like a
wrapper, is stored as `{"$serialized": "<base64 of the serializer's bytes>"}` and read unchanged.

Bytes in labels and exceptions, which JSON does not have, are `{"$bytes": "<base64>"}`. Texts with
lone surrogates that the serializer rejects, too, are `{"$surrogates": "<base64>"}`.
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

# Python does not read integers of more than 4,300 digits.
_MAX_PLAIN_BITS: Final = 14_000

# Python's JSON encoder fails near 1,000.
_MAX_PLAIN_DEPTH: Final = 500

# JSON text without any of these is plain and is not parsed.
_SUSPECT: Final = re.compile(
    r"\\u0000|\\u[dD][89a-fA-F]|\d[eE]\+?\d|(?<!\w)-0|NaN|Infinity|\$serialized|\$bytes"
    r"|\$surrogates"
)


def storable_text(text: str) -> str:
    """The text with NUL and lone surrogates, which PostgreSQL cannot store, as escapes."""
    return text.encode(errors="backslashreplace").decode().replace("\x00", "\\x00")


def to_jsonb(dumped: bytes) -> str:
    """Converts the bytes of a serializer that writes JSON to text for a jsonb column."""
    text = dumped.decode()
    if not _SUSPECT.search(text):
        return text
    try:
        survives = is_plain(json.loads(text))
    except (ValueError, RecursionError):
        survives = False
    return text if survives else json.dumps(wrap(dumped))


def from_jsonb(stored: str) -> bytes:
    """Converts the text of a jsonb column to the bytes that the serializer wrote."""
    if _SERIALIZED in stored:
        document = json.loads(stored)
        if is_wrapper(document):
            return base64.b64decode(document[_SERIALIZED], validate=True)
    return stored.encode()


def is_plain(value: Any) -> bool:
    """Whether jsonb returns this value unchanged and of the same type, and it is not a wrapper."""
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
        if depth == _MAX_PLAIN_DEPTH:  # such as a value that contains itself
            return False
        pending.extend((part, depth + 1) for part in parts)
    return True


def _is_plain_scalar(value: Any, kind: type) -> bool:
    if kind is str:
        return (value.isascii() and "\x00" not in value) or storable_text(value) == value
    if kind is float:
        # Floats from 1e16 are written with an exponent, which jsonb converts to an integer.
        is_negative_zero = value == 0 and math.copysign(1, value) < 0
        return abs(value) < 1e16 and not is_negative_zero
    if kind is int:
        return bool(value.bit_length() < _MAX_PLAIN_BITS)
    return value is None or kind is bool


def wrap(dumped: bytes) -> dict[str, str]:
    """The wrapper of a serializer's bytes."""
    return {_SERIALIZED: base64.b64encode(dumped).decode()}


def wrap_bytes(value: bytes) -> dict[str, str]:
    """The wrapper of a bytes value."""
    return {_BYTES: base64.b64encode(value).decode()}


def wrap_text(value: str) -> dict[str, str]:
    """The wrapper of a text that UTF-8 cannot encode."""
    return {_SURROGATES: base64.b64encode(value.encode(errors="surrogatepass")).decode()}


def unwrap(document: Mapping[str, str], load: Callable[[bytes], Any]) -> Any:
    """The value in a wrapper; `load` is the serializer's loadb()."""
    [(kind, encoded)] = document.items()
    content = base64.b64decode(encoded, validate=True)
    if kind == _SURROGATES:
        return content.decode(errors="surrogatepass")
    return content if kind == _BYTES else load(content)


def is_wrapper(value: Any) -> bool:
    """Whether a JSON value is a wrapper."""
    return type(value) is dict and len(value) == 1 and not _WRAPPERS.isdisjoint(value)
