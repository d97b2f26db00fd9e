"""What is known of polled tasks, and that no order of events makes it known by mistake."""

import random
from math import inf

import pytest

from taskiq_sa_pg.polls import Polls


@pytest.fixture
def polls() -> Polls:
    """Task "a" has been polled at 1 and 2, and is therefore waited for."""
    polls = Polls()
    assert polls.is_repeated("a", 1.0) is False
    assert polls.is_repeated("a", 2.0) is True
    return polls


def test_a_task_is_waited_for_from_its_second_poll(polls: Polls) -> None:
    assert polls.repeated(2.0) == {"a"}
    assert polls.is_repeated("b", 2.0) is False
    assert polls.repeated(2.0) == {"a"}


def test_two_polls_far_apart_are_no_waiting(polls: Polls) -> None:
    for now in (10.0, 15.5, 30.0):
        assert polls.is_repeated("b", now) is False
    assert polls.is_repeated("b", 35.0) is True


def test_who_stops_polling_is_forgotten(polls: Polls) -> None:
    polls.note_missing(["a"], 2.0)
    assert polls.repeated(12.0) == {"a"}
    assert polls.repeated(12.1) == set()
    assert polls.is_missing_since("a", -inf) is False
    assert polls.is_repeated("a", 12.2) is False


def test_nothing_is_known_before_a_look(polls: Polls) -> None:
    assert polls.is_missing_since("a", -inf) is True  # as old as can be
    assert polls.is_missing_since("a", 0.0) is False
    assert polls.is_missing_since("unknown", -inf) is False


def test_a_look_is_good_for_as_long_as_the_asker_says(polls: Polls) -> None:
    polls.note_missing(["a", "unknown"], 3.0)
    assert polls.is_missing_since("a", 3.0) is True
    assert polls.is_missing_since("a", 3.1) is False
    assert polls.is_missing_since("unknown", 0.0) is False


@pytest.mark.parametrize("doubts_all", [False, True], ids=["one", "all"])
def test_a_look_that_began_before_a_doubt_or_with_it_never_counts(
    polls: Polls, doubts_all: bool
) -> None:
    polls.note_missing(["a"], 3.0)
    if doubts_all:
        polls.doubt_all(4.0)
    else:
        polls.doubt("a", 4.0)
    assert polls.is_missing_since("a", 0.0) is False
    for began_at in (3.5, 4.0):
        polls.note_missing(["a"], began_at)
        assert polls.is_missing_since("a", 0.0) is False
    polls.note_missing(["a"], 4.1)
    assert polls.is_missing_since("a", 4.1) is True


def test_a_doubt_of_another_task_changes_nothing(polls: Polls) -> None:
    polls.note_missing(["a"], 3.0)
    polls.doubt("b", 4.0)
    polls.forget("b")
    assert polls.is_missing_since("a", 3.0) is True


def test_a_task_that_is_ready_starts_anew(polls: Polls) -> None:
    polls.note_missing(["a"], 3.0)
    polls.forget("a")
    assert polls.repeated(3.0) == set()
    assert polls.is_repeated("a", 3.1) is False
    assert polls.is_missing_since("a", 0.0) is False


def test_of_tasks_that_are_polled_once_the_latest_are_kept_in_mind(
    polls: Polls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskiq_sa_pg.polls._MAX_POLLED_ONCE", 3)
    for task_id in "wxyz":
        assert polls.is_repeated(task_id, 3.0) is False
    assert len(polls._polled_once) == 3
    assert [polls.is_repeated(task_id, 4.0) for task_id in "zyxw"] == [True, True, True, False]
    assert polls.repeated(4.0) == {"a", "x", "y", "z"}


def test_no_order_of_looks_and_notifications_hides_a_result() -> None:
    """Looks see what is stored when they read, are reported late, and notifications are late."""
    chance = random.Random(7)
    answered_from_memory = 0
    for _ in range(300):
        polls = Polls()
        stored: set[str] = set()
        unheard: list[str] = []
        looks: list[tuple[float, set[str]]] = []
        for step in range(120):
            # Ties, as two events in one tick of the clock.
            now = float(step // 2)
            task_id = chance.choice("abc")
            match chance.randrange(6):
                case 0 | 1:
                    known = polls.is_repeated(task_id, now) and polls.is_missing_since(task_id, 0)
                    answered_from_memory += known
                    assert not known or task_id not in stored or task_id in unheard
                case 2:
                    # Began before the step, read at any time until it is reported.
                    looks.append((now, {"a", "b", "c"} - stored))
                case 3 if looks:
                    began_at, missing = looks.pop(chance.randrange(len(looks)))
                    polls.note_missing(missing, began_at)
                case 4 if chance.random() < 0.2 and task_id not in stored:
                    stored.add(task_id)
                    unheard.append(task_id)
                case 5 if unheard:
                    polls.doubt(unheard.pop(0), now)
    assert answered_from_memory > 500
