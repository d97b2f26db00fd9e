"""The ids that make_task_id() makes."""

import time
from itertools import count
from uuid import RFC_4122, UUID

import pytest

from taskiq_sa_pg import make_task_id


def test_an_id_is_a_uuid_of_version_7() -> None:
    before = time.time_ns() // 1_000_000
    task_id = make_task_id()
    after = time.time_ns() // 1_000_000
    made = UUID(task_id)
    assert made.hex == task_id
    assert (made.version, made.variant) == (7, RFC_4122)
    assert before <= made.int >> 80 <= after


def test_ids_come_in_the_order_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = count(1_790_000_000_999_000_000, 250)
    monkeypatch.setattr(time, "time_ns", lambda: next(moments))
    ids = [make_task_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert {task_id[:12] for task_id in ids} == {"01a0c4506fe7", "01a0c4506fe8", "01a0c4506fe9"}


def test_ids_of_one_moment_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_790_000_000_999_999_999)
    ids = {make_task_id() for _ in range(1_000)}
    assert len(ids) == 1_000
    assert {task_id[:16] for task_id in ids} == {"01a0c4506fe77fff"}
