"""Values through the codec: what each serializer holds, what it does not, and what cannot be."""

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from taskiq.depends.progress_tracker import TaskProgress, TaskState

from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.statements import StoredProgress
from tests.unit.codecs import (
    CODECS,
    PICKLE,
    decode,
    each,
    encode,
    every_codec,
    every_plain_codec,
)


class Order(BaseModel):
    """A task's return type."""

    id: UUID
    total: Decimal
    placed_at: datetime
    tags: set[str] = set()


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


Pair = namedtuple("Pair", "left right")

ORDER = Order(id=UUID(int=7), total=Decimal("9.90"), placed_at=datetime(2024, 2, 29, tzinfo=UTC))
BERLIN = ZoneInfo("Europe/Berlin")
ALL_BYTES = bytes(range(256))

VALUES = [
    *(None, True, False, 0, -1, 2**64, -(2**200), 0.1, -0.0, 1e300, 5e-324, ""),
    datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=BERLIN),
    datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    datetime(9999, 12, 31, 23, 59, 59, 999999),  # noqa: DTZ001 - naive ones come back naive
    *(date(2024, 2, 29), timedelta(days=-1, microseconds=1), Decimal("1.50"), UUID(int=1)),
    *(ALL_BYTES, (1, (2,), ()), {1, "a"}, frozenset({(1, 2)}), {1: {(2, "x"): [3]}}),
    *(Point(1, (2, 3)), ORDER, Pair(1, 2), TaskState.STARTED, Path("/a/x"), range(3)),
    *(math.inf, -math.inf, "a\x00b", "\ud800", "\udfff😀", {"\x00": "\udc80"}, 1j),
    *({"$serialized": "x"}, {"$bytes": "x"}, [{"$serialized": 1}]),
]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["$serialized"]),
            inner,
        )
    ),
    max_leaves=10,
)
ANY_SCALAR = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.datetimes(timezones=st.timezones())
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.timedeltas()
)
ANY_VALUES = st.recursive(
    ANY_SCALAR,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.frozensets(ANY_SCALAR)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), st.text()), inner)
    ),
    max_leaves=10,
)


def returned(codec: Codec, value: Any) -> Any:
    result = decode(codec, encode(codec, return_value=value))
    assert not result.is_err, result.error
    return result.return_value


def assert_alike(value: Any, original: Any) -> None:
    """Equal, and of the same types in the same order all the way down."""
    assert type(value) is type(original)
    assert value == original
    if isinstance(original, float):
        assert math.copysign(1, value) == math.copysign(1, original)
    if isinstance(original, dict):
        assert set(map(type, value)) == set(map(type, original))
        value, original = [value[name] for name in original], list(original.values())
    if isinstance(original, list | tuple):
        for part, original_part in zip(value, original, strict=True):
            assert_alike(part, original_part)


@pytest.mark.parametrize(
    "value", VALUES, ids=[f"{i}-{type(v).__name__}" for i, v in enumerate(VALUES)]
)
def test_pickle_returns_equal_values_of_the_same_type(value: Any) -> None:
    assert_alike(returned(PICKLE, value), value)


@given(ANY_VALUES)
def test_pickle_returns_any_nested_value(value: Any) -> None:
    assert_alike(returned(PICKLE, value), value)


@given(JSON_VALUES)
def test_any_json_value_comes_back_equal(value: Any) -> None:
    for codec in CODECS.values():
        assert_alike(returned(codec, value), value)


@each("pickle", "json", "jsonb", "cbor")
def test_nan_comes_back(codec: Codec) -> None:
    assert math.isnan(returned(codec, math.nan))


@each("json", "jsonb")
@pytest.mark.parametrize(
    "value",
    ["\ud800", "a\x00b", "\udfff😀", {"\x00": ["\ud83d"]}, math.inf, 2**100, [-0.0, 1e16]],
    ids=ascii,
)
def test_json_keeps_what_jsonb_alone_cannot_hold(codec: Codec, value: Any) -> None:
    assert_alike(returned(codec, value), value)


@each("pickle", "json", "msgpack", "jsonb")
@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"a": v}], ids=["list", "dict"])
def test_400_levels_come_back(codec: Codec, wrap: Callable[[Any], Any]) -> None:
    value: Any = "bottom"
    for _ in range(400):
        value = wrap(value)
    assert returned(codec, value) == value


DECLARED = [
    (Order, ORDER),
    (Point, Point(1, (2, 3))),
    (Pair, Pair(1, 2)),
    (list[Order], [ORDER]),
    (datetime, datetime(2024, 2, 29, 12, tzinfo=UTC)),
    (datetime, datetime(2024, 2, 29, 12, 0, 0, 123456)),  # noqa: DTZ001 - naive
    (date, date(2024, 2, 29)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (Decimal, Decimal("1.50")),
    (UUID, UUID(int=1)),
    (bytes, "Grüße".encode()),
    (tuple[int, ...], (1, 2)),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (dict[int, str], {1: "a"}),
    (TaskState, TaskState.RETRY),
    (Path, Path("/a/x")),
]


@pytest.mark.parametrize(
    ("declared", "value"),
    DECLARED,
    ids=[
        f"{index} {getattr(declared, '__name__', declared)}"
        for index, (declared, _) in enumerate(DECLARED)
    ],
)
def test_the_declared_type_reads_back(declared: Any, value: Any) -> None:
    adapter = TypeAdapter(declared)
    for codec in CODECS.values():
        read = adapter.validate_python(returned(codec, value))
        assert read == value
        assert type(read) is type(value)


@every_plain_codec
def test_tuple_keys_take_their_json_form_where_there_is_none_other(codec: Codec) -> None:
    assert returned(codec, {(1, 2): 3}) in ({"1,2": 3}, {(1, 2): 3})


@every_codec
def test_the_other_fields_come_back(codec: Codec) -> None:
    row = encode(codec, log="line\n", labels={"a": 1})
    read = decode(codec, row, with_logs=True)
    assert (read.is_err, read.execution_time, read.error) == (False, 0.25, None)
    assert (read.log, read.labels) == ("line\n", {"a": 1})


def test_the_log_is_left_out_unless_asked_for() -> None:
    assert decode(PICKLE, encode(PICKLE, log="line")).log is None


def test_a_log_that_postgresql_cannot_hold_is_escaped() -> None:
    read = decode(PICKLE, encode(PICKLE, log="a\x00b\ud800"), with_logs=True)
    assert read.log == "a\\x00b\\ud800"


@every_codec
@pytest.mark.parametrize("meta", [None, 0, "", [1, {"a": None}], {"$serialized": "x"}], ids=repr)
@pytest.mark.parametrize("state", [TaskState.STARTED, "half\x00way"], ids=repr)
def test_progress_comes_back(codec: Codec, state: Any, meta: Any) -> None:
    row = codec.encode_progress("t1", TaskProgress(state=state, meta=meta))
    progress = codec.decode_progress(StoredProgress._make(row))
    assert progress.state == state.replace("\x00", "\\x00")
    assert progress.meta == meta
