"""Labels through the codec: they never prevent storing, and come back as far as they can."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskiq_sa_pg import ResultDecodeError
from taskiq_sa_pg.codec import Codec
from tests.unit.codecs import CODECS, PICKLE, decode, encode, every_codec

INTEGERS = st.integers(-(2**63), 2**63 - 1)
JSON_LABELS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
    | st.sampled_from(["$serialized", "$bytes", "$surrogates"]),
    st.recursive(
        st.none() | st.booleans() | INTEGERS | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["a", "$serialized", "$bytes"]), inner)
        ),
        max_leaves=5,
    ),
    max_size=4,
)
ANY_LABELS = st.dictionaries(
    st.text(st.characters()),
    st.text(st.characters())
    | st.floats(allow_nan=False)
    | st.binary()
    | st.datetimes(timezones=st.timezones())
    | st.tuples(st.uuids(), st.decimals(allow_nan=False)),
    max_size=4,
)


def through(codec: Codec, labels: dict[Any, Any]) -> dict[str, Any]:
    result = decode(codec, encode(codec, labels=labels))
    assert not result.is_err
    assert result.return_value == 1
    return result.labels


@given(JSON_LABELS)
def test_labels_that_are_json_come_back(labels: dict[str, Any]) -> None:
    for codec in CODECS.values():
        assert through(codec, labels) == labels


@given(ANY_LABELS)
def test_labels_never_prevent_storing_and_pickle_returns_any(labels: dict[str, Any]) -> None:
    for codec in CODECS.values():
        assert isinstance(through(codec, labels), dict)
    assert through(PICKLE, labels) == labels


@every_codec
def test_labels_that_are_json_stay_readable_in_sql(codec: Codec) -> None:
    assert encode(codec, labels={"queue": "größe", "n": 1}).labels == '{"queue": "größe", "n": 1}'


@every_codec
def test_bytes_come_back_whole(codec: Codec) -> None:
    labels = {"raw": bytes(range(256)), "queue": "a"}
    assert through(codec, labels) == labels


@every_codec
def test_a_datetime_comes_back_as_one_or_as_iso_text(codec: Codec) -> None:
    at = datetime(2024, 2, 29, tzinfo=UTC)
    read = through(codec, {"at": at, "queue": "a"})
    assert read["queue"] == "a"
    assert read["at"] in (at, "2024-02-29T00:00:00Z", "2024-02-29T00:00:00+00:00")


@every_codec
@pytest.mark.parametrize("name", ["$serialized", "$bytes", "$surrogates"])
def test_a_label_that_looks_like_a_wrapper_comes_back(codec: Codec, name: str) -> None:
    for labels in ({name: "x"}, {"a": {name: "x"}}, {"a": [{name: 1}]}):
        assert through(codec, labels) == labels


class Mute:
    """Nothing can be got out of it."""

    def __repr__(self) -> str:
        raise MuteError

    def __reduce__(self) -> Any:
        raise MuteError


class MuteError(Exception):
    def __repr__(self) -> str:
        raise self

    __str__ = __repr__


def cycle() -> list[Any]:
    value: list[Any] = []
    value.extend([value, value])
    return value


def deep() -> list[Any]:
    value: list[Any] = []
    for _ in range(2_000):
        value = [value]
    return value


ODD: dict[str, Callable[[], Any]] = {
    "mute": Mute,
    "cycle": cycle,
    "deep": deep,
    "function": lambda: lambda: None,
    "object": object,
    "unprintable integer": lambda: 10**5000,
    "NaN": lambda: math.nan,
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
@pytest.mark.timeout(20)
def test_odd_labels_leave_their_neighbours_alone(make: Callable[[], Any]) -> None:
    for codec in CODECS.values():
        read = through(codec, {"odd": make(), "queue": "a"})
        assert read.keys() == {"odd", "queue"}
        assert read["queue"] == "a"


@every_codec
def test_a_label_that_cannot_be_held_comes_back_as_its_repr(codec: Codec) -> None:
    assert through(codec, {"odd": [lambda: None]})["odd"].startswith("[<function ")


@every_codec
@pytest.mark.parametrize("names", [("a\x00b", "c"), (1, "1"), ((1, 2), None)], ids=repr)
def test_odd_label_names_do_not_prevent_storing(codec: Codec, names: tuple[Any, ...]) -> None:
    assert through(codec, dict.fromkeys(names, b"\xff"))


@every_codec
@pytest.mark.parametrize("name", ["a\x00b", "a\ud800b"], ids=ascii)
def test_an_odd_label_name_leaves_its_neighbours_alone(codec: Codec, name: str) -> None:
    labels = {name: 1, "queue": "a", "raw": b"\xff", "held": [1, {"b": None}]}
    read = through(codec, labels | {"odd": [lambda: None]})
    assert read.pop("odd").startswith("[<function ")
    assert read.pop(name, None) or read.pop(ascii(name)[1:-1]) == 1
    assert read == {name: value for name, value in labels.items() if name in read}
    assert read.keys() == {"queue", "raw", "held"}


class NoInteger:
    def __int__(self) -> int:
        raise RuntimeError


ATTEMPTS = [
    *((3, 3), ("4", 4), (True, 1), (2.9, 2), (0, 0)),
    *((-1, 0), (2**40, 2**31 - 1), (10**400, 2**31 - 1), (-(10**400), 0)),
    *((None, 0), ("", 0), ("many", 0), ("9" * 5000, 0), ([], 0), (b"x", 0)),
    *((math.nan, 0), (math.inf, 0), (NoInteger(), 0)),
]


@pytest.mark.parametrize(
    ("label", "attempt"),
    ATTEMPTS,
    ids=[f"{index} {type(label).__name__}" for index, (label, _) in enumerate(ATTEMPTS)],
)
def test_the_attempt_is_read_from_the_retry_label(label: Any, attempt: int) -> None:
    assert encode(PICKLE, labels={"_retries": label}).attempt == attempt


def test_the_attempt_is_0_without_a_retry_label() -> None:
    assert encode(PICKLE).attempt == 0


@pytest.mark.parametrize(
    "damage", ["", "{", "5x", '{"a": {"$serialized": "!"}}', '{"a": {"$serialized": 5}}']
)
def test_damaged_labels_name_the_task_and_the_table(damage: str) -> None:
    with pytest.raises(ResultDecodeError, match=r"task 't1' in table jobs"):
        decode(PICKLE, encode(PICKLE)._replace(labels=damage))
