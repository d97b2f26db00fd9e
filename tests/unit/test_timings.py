"""The timings: one frozen record, which a backend has before it starts."""

from dataclasses import FrozenInstanceError, asdict, replace
from typing import Any

import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend
from taskiq_sa_pg.timings import DEFAULT_TIMINGS, Timings


def test_every_time_and_number_is_more_than_nothing() -> None:
    assert Timings() == DEFAULT_TIMINGS
    assert all(value > 0 for value in asdict(DEFAULT_TIMINGS).values())


def test_each_pause_is_in_proportion_to_the_others() -> None:
    timings = DEFAULT_TIMINGS
    assert timings.between_any_looks < timings.between_unheard_looks < timings.between_looks
    assert timings.first_reconnect < timings.last_reconnect
    assert timings.after_notification < timings.after_notifications


def test_nobody_changes_the_timings_of_others() -> None:
    with pytest.raises(FrozenInstanceError):
        DEFAULT_TIMINGS.lock = 1.0  # type: ignore[misc]  # it is frozen
    one: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend("postgresql://")
    other: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend("postgresql://")
    one.settings = replace(one.settings, timings=Timings(lock=1.0))
    assert one.settings.timings.lock == 1.0
    assert other.settings.timings is DEFAULT_TIMINGS
