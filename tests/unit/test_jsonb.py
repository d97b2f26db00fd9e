"""What survives a jsonb column, and the wrappers of what does not."""

import base64
import json
import math
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskiq_sa_pg.codec.jsonb import (
    from_jsonb,
    is_plain,
    is_wrapper,
    storable_text,
    to_jsonb,
    unwrap,
    wrap,
    wrap_bytes,
)

ANY_TEXT = st.text(st.characters()) | st.sampled_from(
    ["$serialized", "$bytes", "\\u0000", "1e5", "NaN", "Infinity"]
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=15,
)


def is_wrapped(text: str) -> bool:
    return is_wrapper(json.loads(text))


def stored_by_postgresql(text: str) -> str:
    """A jsonb column's text, as far as JSON's own rules go."""
    value = json.loads(text, parse_float=_as_numeric, parse_constant=_refuse)
    storable = json.dumps(value, ensure_ascii=False, default=str)
    assert "\x00" not in storable
    assert "\\u0000" not in storable or "\\\\u0000" in storable
    storable.encode()  # no lone surrogates
    return storable


def _refuse(constant: str) -> Any:
    raise AssertionError(f"jsonb has no {constant}")


def _as_numeric(literal: str) -> Any:
    value = float(literal)
    is_integral = re.search(r"[eE]\+?\d", literal) or literal == "-0.0"
    return int(value) if is_integral else value


@given(JSON_VALUES)
def test_any_value_comes_back_whole(value: Any) -> None:
    dumped = json.dumps(value).encode()
    restored = json.loads(from_jsonb(stored_by_postgresql(to_jsonb(dumped))))
    assert repr(restored) == repr(json.loads(dumped))


@given(JSON_VALUES)
def test_text_without_escapes_comes_back_whole(value: Any) -> None:
    try:
        dumped = orjson.dumps(value)
    except TypeError:  # lone surrogates, and integers of more than 64 bits
        return
    restored = json.loads(from_jsonb(stored_by_postgresql(to_jsonb(dumped))))
    assert repr(restored) == repr(json.loads(dumped))


@pytest.mark.parametrize(
    "value",
    [
        *("\x00", "a\ud800", {"\udfff": 1}, {"\x00": 1}, [math.nan], math.inf, -math.inf),
        *(-0.0, 1e16, -1e300, [{"a": 1.5e22}]),
        *({"$serialized": "x"}, {"$serialized": None}, {"$bytes": "x"}),
    ],
    ids=ascii,
)
def test_what_jsonb_cannot_hold_is_wrapped(value: Any) -> None:
    dumped = json.dumps(value).encode()
    text = to_jsonb(dumped)
    assert json.loads(text) == {"$serialized": base64.b64encode(dumped).decode()}
    assert from_jsonb(text) == dumped
    assert not is_plain(value)


@pytest.mark.parametrize(
    "value",
    [
        *("😀", "\\u0000", "\\ud800", "NaN", "-Infinity", "-0", "1e5", "$serialized"),
        *(-1, 0.0, -0.5, 1e-7, 5e-324, 1e15, 9999999999999998.0, 10**4000),
        *({"$serialized": 1, "a": 2}, [{"$serialized": "x"}], {"a": {"$bytes": "x"}}),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_jsonb_can_hold_stays_readable(value: Any) -> None:
    text = to_jsonb(json.dumps(value).encode())
    assert not is_wrapped(text)
    assert json.loads(from_jsonb(text)) == value
    assert is_plain(value)


@pytest.mark.parametrize(
    "value", [(1,), {1: 2}, {"\x00": 1}, b"x", {1}, -math.inf, {None: 1}], ids=lambda v: str(v)[:9]
)
def test_what_is_no_json_is_not_plain(value: Any) -> None:
    assert not is_plain(value)
    assert not is_plain([{"a": value}])


@pytest.mark.timeout(20)
def test_a_value_that_contains_itself_is_not_plain() -> None:
    array: list[Any] = []
    array.extend([array, array])
    document: dict[str, Any] = {}
    document["self"] = document
    assert not is_plain(array)
    assert not is_plain(document)


def test_an_integer_that_python_would_not_read_back_is_not_plain() -> None:
    assert is_plain(-(10**4000))
    assert not is_plain(-(10**5000))


def test_a_subclass_is_not_plain() -> None:
    class Text(str):
        pass

    assert not is_plain(Text("a"))
    assert not is_plain([type("Names", (dict,), {})()])


@pytest.mark.parametrize("levels", [400, 100_000])
def test_nesting_of_any_depth_comes_back(levels: int) -> None:
    # The NaN calls for the closer look.
    dumped = b"[" * levels + b"NaN" + b"]" * levels
    assert from_jsonb(to_jsonb(dumped)) == dumped
    assert from_jsonb(to_jsonb(dumped.replace(b"NaN", b'"1e5"'))) != dumped


@given(st.binary())
def test_wrappers_return_bytes(value: bytes) -> None:
    assert unwrap(wrap_bytes(value), json.loads) == value
    assert unwrap(wrap(value), lambda dumped: dumped) == value
    assert is_wrapper(wrap(value))
    assert is_wrapper(wrap_bytes(value))


@given(st.text(st.characters()))
def test_storable_text_is_storable_and_keeps_what_already_is(text: str) -> None:
    storable = storable_text(text)
    storable.encode()
    assert "\x00" not in storable
    assert storable_text(storable) == storable
    if "\x00" not in text and not re.search("[\ud800-\udfff]", text):
        assert storable == text
