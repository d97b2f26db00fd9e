"""When a cron expression is due next."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taskiq_sa_pg.broker.cron import CRON_ERRORS, Offset, is_cron_now, next_cron, offset_of


def utc(*fields: int) -> datetime:
    year, month, day, hour, minute = fields
    return datetime(year, month, day, hour, minute, tzinfo=UTC)


START = utc(2026, 3, 4, 12, 0)


@pytest.mark.parametrize(
    ("cron", "offset", "expected"),
    [
        ("* * * * *", None, utc(2026, 3, 4, 12, 0)),
        ("0 12 * * *", None, utc(2026, 3, 4, 12, 0)),
        ("59 11 * * *", None, utc(2026, 3, 5, 11, 59)),
        ("*/7 3-5 * * mon", None, utc(2026, 3, 9, 3, 0)),
        # With both fields of days, one is enough.
        ("0 0 13 * fri", None, utc(2026, 3, 6, 0, 0)),
        ("0 0 1 1 *", None, utc(2027, 1, 1, 0, 0)),
        ("0 6 * * *", "Europe/Berlin", utc(2026, 3, 5, 5, 0)),
        ("0 6 * * *", timedelta(hours=-3), utc(2026, 3, 5, 9, 0)),
        ("30 0 * * *", timedelta(minutes=330), utc(2026, 3, 4, 19, 0)),
        # Clocks in Berlin skip 2:30 on the 29th, and in Havana midnight on the 8th.
        ("30 2 * * sun", "Europe/Berlin", utc(2026, 3, 8, 1, 30)),
        ("30 2 29 3 *", "Europe/Berlin", None),
        ("15 1 8 3 *", "America/Havana", utc(2026, 3, 8, 5, 15)),
        ("0 0 30 2 *", None, None),
    ],
)
def test_the_next_minute_is_found(cron: str, offset: Offset, expected: datetime | None) -> None:
    found = next_cron(cron, offset, START)
    assert found == expected


@given(
    minute=st.sampled_from(["*", "0", "*/15", "59", "7,8"]),
    hour=st.sampled_from(["*", "0", "23", "2-3", "*/5"]),
    days=st.sampled_from(["* * *", "* * 0", "1-3 * *"]),
    offset=st.sampled_from([None, "Europe/Berlin", "America/Havana", timedelta(hours=13)]),
    after=st.integers(0, 60 * 24 * 30),
)
@settings(max_examples=25)
@example("30", "2", "* * *", "Europe/Berlin", 60 * 24 * 24)
def test_no_minute_is_missed(minute: str, hour: str, days: str, offset: Offset, after: int) -> None:
    """It is the first for which taskiq's scheduler would send."""
    cron, start = f"{minute} {hour} {days}", START + timedelta(minutes=after)
    found = next_cron(cron, offset, start)
    assert found is not None
    assert is_cron_now(cron, offset, found)
    minutes = min(int((found - start) / timedelta(minutes=1)), 2 * 24 * 60)
    between = (start + timedelta(minutes=number) for number in range(minutes))
    assert not any(is_cron_now(cron, offset, each) for each in between)


@pytest.mark.parametrize(
    ("cron", "offset"),
    [("*/0 * * * *", None), ("soon", None), ("* * * * *", "Nowhere/At all"), ("* * *", None)],
)
def test_what_is_no_expression_is_an_error(cron: str, offset: Offset) -> None:
    with pytest.raises(CRON_ERRORS):
        next_cron(cron, offset, START)


def test_an_offset_is_a_time_or_a_zone() -> None:
    assert offset_of("PT2H") == timedelta(hours=2)
    assert offset_of("Europe/Berlin") == "Europe/Berlin"
    assert offset_of(None) is None
