"""Times, durations, numbers, values, progress and scales, as people read them."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from markupsafe import Markup

from taskiq_sa_pg.ui import formatting
from taskiq_sa_pg.ui.charts import Series, lines, nice_seconds, nice_top, stacked_bars
from taskiq_sa_pg.ui.progress import Shown, shown

NOW = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.000_004, "4 µs"),
        (0.012_34, "12.3 ms"),
        (0.9996, "1 s"),
        (3.42, "3.42 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (3_600, "1 h"),
        (4_800, "1 h 20 min"),
        (100_000, "1 d 3 h"),
        (10_000 * 86_400, "10,000 d"),
        (-5, "-5 s"),
        (float("inf"), "–"),
        (float("nan"), "–"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert formatting.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "just now"),
        (-0.4, "just now"),
        (12, "12 s ago"),
        (200, "3 min ago"),
        (7_300, "2 h ago"),
        (90_000, "1 d ago"),
        (-600, "in 10 min"),
    ],
)
def test_how_long_ago_with_the_exact_time_at_hand(seconds: float, text: str) -> None:
    at = NOW - timedelta(seconds=seconds)
    shown = formatting.ago(at, NOW)
    assert shown == Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(), f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03} UTC", text
    )


def test_exact_times_are_in_utc() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5)))
    assert ">2030-01-02 03:04:05 UTC<" in formatting.exact(there)
    assert formatting.exact(None) == formatting.ago(None) == "–"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "0 %"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 3, "33.3 %"),
        (1, 10_000, "< 0.1 %"),
        (9_999, 10_000, "> 99.9 %"),
    ],
)
def test_shares_are_none_or_all_only_where_they_are(part: int, whole: int, text: str) -> None:
    assert formatting.percent(part, whole) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (1_234_567, "1,234,567"), (0.25, "0.25"), (123.4, "123")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert formatting.number(value) == text


def test_values_that_json_has_not() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise ValueError

    circle: list[Any] = []
    circle.append(circle)
    assert formatting.pretty({1: (2, 3)}) == '{\n  "1": [\n    2,\n    3\n  ]\n}'
    assert formatting.pretty({(1, 2): 3}) == "{(1, 2): 3}"
    assert formatting.pretty(circle) == "[[...]]"
    assert "raises ValueError" in formatting.pretty(Broken())
    assert "raises ValueError" in formatting.pretty([Broken()])
    assert formatting.pretty([float("nan"), True, None]) == "[\n  NaN,\n  true,\n  null\n]"


@pytest.mark.parametrize(
    ("meta", "fraction", "text"),
    [
        (None, None, ""),
        (62, 0.62, "62%"),
        (0.25, 0.25, "25%"),
        (1.0, 1.0, "100%"),
        (1, 0.01, "1%"),
        (250, 1.0, "100%"),
        (-1, 0.0, "0%"),
        (True, None, ""),
        (float("nan"), None, ""),
        (10**400, None, ""),
        ("62", None, ""),
        ([3, 8], 0.375, "3 of 8"),
        ((3, 0), None, ""),
        ([3, "8"], None, ""),
        ({"done": 3, "total": 8}, 0.375, "3 of 8"),
        ({"of": 8, "Packed": 3, "box": "a"}, 0.375, "3 of 8"),
        ({"done": 9, "total": 8}, 1.0, "9 of 8"),
        ({"percent": 40, "eta": 3}, 0.4, "40%"),
        ({"read": 20, "found": 5}, 0.25, "5 of 20"),
        ({"a": 1, "b": 2, "c": 3}, None, ""),
        ({"a": 1}, None, ""),
        ({}, None, ""),
    ],
)
def test_progress_is_a_bar_where_numbers_say_so(
    meta: Any, fraction: float | None, text: str
) -> None:
    found = shown("packing", meta)
    assert (found.state, found.fraction, found.text) == ("packing", fraction, text)
    assert found.meta == (None if meta is None else formatting.pretty(meta))
    assert found.undecodable is Shown("packing").undecodable


@pytest.mark.parametrize(
    ("value", "top"), [(0, 1), (0.3, 0.4), (1, 1), (1.1, 2), (25, 40), (61, 100), (700, 1_000)]
)
def test_scales_end_at_round_numbers(value: float, top: float) -> None:
    assert nice_top(value) == pytest.approx(top)


@pytest.mark.parametrize(
    ("value", "top"), [(2.5, 4), (61, 120), (700, 1_200), (4_000, 7_200), (200_000, 345_600)]
)
def test_scales_of_time_end_at_whole_minutes_hours_and_days(value: float, top: float) -> None:
    assert nice_seconds(value) == pytest.approx(top)


def test_bars_stand_on_each_other_and_small_ones_are_seen() -> None:
    series = [Series("good", "succeeded", [99, 0]), Series("bad", "failed", [1, 0])]
    chart = stacked_bars("Finished", "In all", series, ["first <", "second"], ["then", "now"])
    assert chart.svg.count('class="succeeded"') == chart.svg.count('class="failed"') == 1
    assert '<rect class="failed" x="0.00" y="0.00" width="240.00" height="1.60"/>' in chart.svg
    assert "<title>first &lt;</title>" in chart.svg
    assert list(chart.y_labels) == ["100", "50", "0"]
    assert not chart.is_empty


def test_a_line_is_interrupted_where_there_is_nothing() -> None:
    series = [Series("p50", "p50", [1.0, None, 2.0, 4.0])]
    chart = lines("Time", "In all", series, ["a", "b", "c", "d"], ["then", "now"])
    assert chart.svg.count("<polyline") == 2
    assert list(chart.y_labels) == ["4 s", "2 s", "0 s"]
    assert lines("Time", "x", [Series("p50", "p50", [None])], ["a"], []).is_empty


def test_of_a_huge_value_only_the_beginning_is_made() -> None:
    class Endless(list[int]):
        def __iter__(self) -> Any:
            yield from range(10**5)
            pytest.fail("all of it was made")

        def __bool__(self) -> bool:
            return True

    text = formatting.pretty(Endless())
    assert text.startswith("[\n  0,\n  1,")
    assert text.endswith("\n… and more")
    assert len(text) < formatting.MAX_CHARACTERS + 20


def test_of_many_labels_as_many_are_shown_as_a_page_has_room_for() -> None:
    assert formatting.entries([]) == formatting.Entries([], 0)
    assert formatting.entries([("a", 1), ("b", "x")]).shown == [("a", "1"), ("b", "x")]
    huge = "x" * 10**6
    entries = formatting.entries([(huge, huge), ("b", 1), ("c", 2)])
    assert entries.left_out == 2
    assert sum(map(len, entries.shown[0])) < formatting.MAX_CHARACTERS + 400
    many = formatting.entries((str(n), n) for n in range(10**5))
    assert 100 < len(many.shown) < 1_000
    assert len(many.shown) + many.left_out == 10**5
