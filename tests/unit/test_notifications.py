"""pack(): every id is told exactly once, in payloads that PostgreSQL takes."""

import json
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskiq_sa_pg.waiting.notifier import pack

# https://www.postgresql.org/docs/18/sql-notify.html: less than 8000 bytes.
LIMIT = 8000

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
LONG = st.builds(
    lambda letter, length: letter * length,
    st.sampled_from(["x", "ü", "🦆", '"', "\\", "\n", "\x1f"]),
    st.integers(0, 9_000),
)


def size_of(text: str) -> int:
    """The bytes of a payload that tells of this id alone."""
    return len(json.dumps([text], ensure_ascii=False).encode())


@given(st.lists(TEXT | LONG, max_size=40))
def test_every_id_is_told_once_and_no_payload_is_too_long(ids: list[str]) -> None:
    payloads = pack(ids)
    assert payloads
    assert all(len(payload.encode()) < LIMIT for payload in payloads)
    told = [task_id for payload in payloads for task_id in json.loads(payload)]
    assert told == [task_id for task_id in ids if size_of(task_id) < LIMIT]
    # An empty payload has all waiters look, those for the ids that do not fit too.
    has_too_long = len(told) < len(ids)
    assert ("[]" in payloads) == (has_too_long or not ids)


@pytest.mark.parametrize("count", [1, 2, 205, 206, 1_000, 10_000])
def test_ids_share_payloads(count: int) -> None:
    ids = [str(UUID(int=number)) for number in range(count)]
    payloads = pack(ids)
    assert len(payloads) <= 2 * -(-count // 205)  # 39 bytes each, and halves
    assert [i for payload in payloads for i in json.loads(payload)] == ids


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("x" * 7_995, True),
        ("x" * 7_996, False),
        ("ü" * 3_997, True),
        ("ü" * 3_998, False),
        ('"' * 3_997, True),
        ('"' * 3_998, False),
        ("y" * 1_000_000, False),
    ],
    ids=lambda value: f"{len(value)}x{value[0]}" if isinstance(value, str) else str(value),
)
def test_the_longest_id_that_fits_is_told(text: str, fits: bool) -> None:
    assert pack([text]) == ([json.dumps([text], ensure_ascii=False)] if fits else ["[]"])
    assert "[]" not in pack(["short"])


def test_of_no_ids_an_empty_payload_tells() -> None:
    assert pack([]) == ["[]"]


def test_the_ids_that_fit_are_told_beside_one_that_does_not() -> None:
    assert sorted(pack(["a", "b", "x" * 9_000, "c"])) == ['["a","b"]', '["c"]', "[]"]
