"""Which partitions are missing, and which are old."""

from datetime import UTC, datetime, timedelta

import pytest

from taskiq_sa_pg import ConfigurationError, TableConfig
from taskiq_sa_pg.schema import Partition, Partitioned

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
NOW = datetime(2026, 11, 30, 18, 30, tzinfo=UTC)


def milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def at(day: int, hour: int = 0) -> datetime:
    """A moment of this November, or later."""
    return datetime(2026, 11, 1, hour, tzinfo=UTC) + (day - 1) * DAY


def table(*periods: tuple[datetime, datetime], name: str = "results") -> Partitioned:
    partitions = [
        Partition("public", f"made by hand {number}", milliseconds(start), milliseconds(end))
        for number, (start, end) in enumerate(periods)
    ]
    return Partitioned(
        config=TableConfig(name),
        schema="public",
        now=milliseconds(NOW),
        is_uuid=False,
        columns=("task_id",),
        partitions=tuple(partitions),
        default=None,
        has_triggers=False,
    )


def periods_of(partitions: list[Partition]) -> list[tuple[datetime, datetime]]:
    return [(each.starts_at, each.ends_at) for each in partitions]


def test_the_first_partition_is_that_of_now_and_the_last_one_is_whole() -> None:
    made = table().missing(2 * DAY, DAY)
    assert periods_of(made) == [(at(30), at(31)), (at(31), at(32)), (at(32), at(33))]
    assert [each.name for each in made] == [
        "results_p20261130",
        "results_p20261201",
        "results_p20261202",
    ]


def test_partitions_of_another_length_have_their_time_in_their_names() -> None:
    made = table().missing(timedelta(minutes=40), HOUR)
    assert [each.name for each in made] == [
        "results_p20261130_180000",
        "results_p20261130_190000",
    ]
    assert [each.starts_at.weekday() for each in table().missing(3 * 7 * DAY, 7 * DAY)] == [3] * 4


def test_a_long_name_is_cut() -> None:
    [made] = table(name="x" * 63).missing(HOUR, DAY)
    assert len(made.name) == 63
    assert made.name.endswith("_p20261130")


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([(at(30), at(31)), (at(31), at(32))], []),
        ([(at(30), at(31))], [(at(31), at(32))]),
        ([(at(31), at(32))], [(at(30), at(31))]),
        ([(at(30, 12), at(31, 6))], [(at(30), at(30, 12)), (at(31, 6), at(32))]),
        (
            [(at(30, 3), at(30, 4)), (at(30, 22), at(30, 23))],
            [
                (at(30), at(30, 3)),
                (at(30, 4), at(30, 22)),
                (at(30, 23), at(31)),
                (at(31), at(32)),
            ],
        ),
        ([(at(1), at(100))], []),
    ],
    ids=["all", "later", "now", "between", "several", "one for all"],
)
def test_only_what_no_partition_has_is_missing(
    there: list[tuple[datetime, datetime]], missing: list[tuple[datetime, datetime]]
) -> None:
    assert periods_of(table(*there).missing(DAY, DAY)) == missing


def test_a_gap_behind_the_last_partition_is_missing_too() -> None:
    found = table((at(1), at(2)), (at(10), at(20, 6)))
    made = found.missing(HOUR, DAY)
    assert periods_of(made) == [(at(20, 6), at(30)), (at(30), at(31))]


def test_too_many_are_refused() -> None:
    assert len(table().missing(999 * DAY, DAY)) == 1_000
    with pytest.raises(
        ConfigurationError, match=r"more than 1,000 partitions.* --ahead or .* --every"
    ):
        table().missing(1_000 * DAY, DAY)


def test_old_are_those_of_which_all_is_old() -> None:
    found = table((at(1), at(20)), (at(20), at(21)), (at(21), at(22)))
    assert found.outdated(10 * DAY) == [found.partitions[0]]
    assert found.outdated(NOW - at(21)) == list(found.partitions[:2])
    assert found.outdated(HOUR) == list(found.partitions)
    assert found.outdated(timedelta(days=36_500)) == []


def test_the_partition_of_the_first_of_all_ids_is_never_old() -> None:
    epoch = datetime.fromtimestamp(0, UTC)
    assert table((epoch, at(1))).outdated(HOUR) == []
