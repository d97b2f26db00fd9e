"""How long results are kept, as arguments and labels say."""

import logging
from datetime import timedelta
from typing import Any

import pytest

from taskiq_sa_pg import ConfigurationError, SQLAlchemyResultBackend
from taskiq_sa_pg.codec import Retention

DSN = "postgresql://u:p@h/d"


class Unfriendly:
    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_results_are_kept_for_ever_unless_told_otherwise() -> None:
    for is_err in (False, True):
        assert Retention().seconds_for(is_err, {"a": 1}) is None


def test_each_outcome_has_its_own_time() -> None:
    retention = Retention(timedelta(minutes=1), 5)
    assert retention.seconds_for(False, {}) == 60
    assert retention.seconds_for(True, {}) == 5


@pytest.mark.parametrize(
    ("label", "seconds"),
    [
        (7, 7),
        (0.5, 0.5),
        ("7", 7),
        (" 7.5 ", 7.5),
        (timedelta(hours=1), 3600),
        (None, None),
        ("None", None),
        ("", None),
        (10**400, 1e11),
        ("inf", 1e11),
    ],
    ids=lambda value: f"{value!r:.9}",
)
def test_a_label_goes_before_the_setting(label: Any, seconds: float | None) -> None:
    retention = Retention(60, 60)
    assert retention.seconds_for(False, {"result_ttl": label}) == seconds
    assert retention.seconds_for(True, {"failure_ttl": label}) == seconds
    assert retention.seconds_for(True, {"result_ttl": label}) == 60
    assert retention.seconds_for(False, {"failure_ttl": label}) == 60


@pytest.mark.parametrize(
    "label",
    [0, -1, "0", "-5", float("nan"), "nan", True, "soon", [1], b"7", Unfriendly()],
    ids=lambda label: f"{type(label).__name__} {label}" if type(label) is not Unfriendly else "odd",
)
def test_a_label_that_says_nothing_is_logged_once(
    label: Any, caplog: pytest.LogCaptureFixture
) -> None:
    retention = Retention(60)
    for _ in range(3):
        assert retention.seconds_for(False, {"result_ttl": label}) == 60
    [record] = caplog.records
    assert (record.levelno, "result_ttl" in record.getMessage()) == (logging.ERROR, True)


def test_labels_that_always_differ_are_not_remembered_for_ever(
    caplog: pytest.LogCaptureFixture,
) -> None:
    retention = Retention()
    for number in range(1000):
        retention.seconds_for(False, {"result_ttl": f"soon {number}"})
    assert len(caplog.records) == 100


def test_what_are_no_labels_changes_nothing() -> None:
    labels: Any = 5
    assert Retention(60).seconds_for(False, labels) == 60


@pytest.mark.parametrize("name", ["result_ttl", "failure_ttl", "progress_ttl", "prune_interval"])
@pytest.mark.parametrize("value", [0, -1, True, "60", float("nan"), timedelta(0)], ids=repr)
def test_a_time_that_cannot_be_is_refused(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ConfigurationError, match=f"{name} must be a timedelta or a number"):
        SQLAlchemyResultBackend(DSN, **arguments)
