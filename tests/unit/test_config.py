"""TableConfig: the names and types it takes, and the rest refused before anything connects."""

import dataclasses
import enum
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskiq_sa_pg import (
    ConfigurationError,
    InvalidTaskIdError,
    SQLAlchemyResultBackend,
    TableConfig,
    build_models,
)

# PostgreSQL's, for every name.
LONGEST = 63

# Any text that PostgreSQL could hold, and more than it could.
any_name = st.text(max_size=70)


def fits(name: str) -> bool:
    return not {"\x00", "."} & set(name) and 0 < len(name.encode()) <= LONGEST


@given(any_name)
def test_a_name_is_kept_to_the_letter_or_refused(name: str) -> None:
    if fits(name):
        config = TableConfig(name)
        assert config.table_name == name
        names = [name, *config.derived_names]
        assert max(len(each.encode()) for each in names) <= LONGEST
        assert len(set(names)) == len(names)
        return
    with pytest.raises(ConfigurationError):
        TableConfig(name)


@pytest.mark.parametrize("letter", ["a", "é", "表", "🦆"])
def test_the_longest_name_is_counted_in_bytes(letter: str) -> None:
    size = len(letter.encode())
    longest = letter * (LONGEST // size) + "x" * (LONGEST % size)
    assert max(len(name.encode()) for name in TableConfig(longest).derived_names) <= 63
    with pytest.raises(ConfigurationError, match="64 bytes"):
        TableConfig(longest + "x")


@pytest.mark.parametrize(
    ("length", "progress", "version", "queue_version"),
    [
        (45, "_progress", "_version", "_queue_version"),
        (46, "_progress", "_version", "_404e0d6b_queue_version"),  # with room for Alembic's `_pkc`
        (51, "_progress", "_version", "_3ecd502a_queue_version"),
        (52, "_progress", "_f43f0afc_version", "_f43f0afc_queue_version"),
        (54, "_progress", "_45f316e1_version", "_45f316e1_queue_version"),
        (55, "_d5e28568_progress", "_d5e28568_version", "_d5e28568_queue_version"),
        (63, "_75220b47_progress", "_75220b47_version", "_75220b47_queue_version"),
    ],
)
def test_derived_names_that_are_too_long_have_a_hash_for_ever(
    length: int, progress: str, version: str, queue_version: str
) -> None:
    """And the others stay what they are: tables are found by them."""
    config = TableConfig("x" * length)
    assert config.progress_table_name.strip("x") == progress
    assert config.version_table_name.strip("x") == version
    assert config.queue_version_table_name.strip("x") == queue_version
    assert not set(config.derived_names) & set(TableConfig("x" * (length - 1) + "y").derived_names)


def test_the_broker_s_names_derive_from_that_of_the_results_table() -> None:
    config = TableConfig("jobs")
    assert config.queue_table_names == ("jobs_queue", "jobs_schedules")
    assert config.queue_table_name == "jobs_queue"
    assert config.schedules_table_name == "jobs_schedules"
    assert config.queue_version_table_name == "jobs_queue_version"
    assert config.available_at_index_name == "jobs_queue_available_at_idx"


@pytest.mark.parametrize("name", ["taskiq", "x" * LONGEST, "表" * (LONGEST // 3)])
def test_channels_fit_and_are_no_table_s_name(name: str) -> None:
    """They belong to the whole database: another package may listen to a plain name."""
    config, other = TableConfig(name), TableConfig(f"y{name[1:]}")
    channels = [
        channel
        for each in (config, other)
        for channel in (each.results_channel, each.progress_channel, each.queue_channel)
    ]
    assert len(set(channels)) == 6
    assert all(channel.startswith("taskiq_sa_pg.") for channel in channels)
    assert all(len(channel.encode()) <= 63 for channel in channels)
    assert TableConfig("taskiq").results_channel == "taskiq_sa_pg.taskiq"


@pytest.mark.parametrize("parameter", ["table_name", "schema"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "must not be empty"),
        ("a\x00b", "NUL"),
        ("a\ud800b", "surrogate"),
        ("x" * 64, "64 bytes"),
        (b"results", "must be a str"),
        (7, "must be a str"),
    ],
)
def test_a_name_that_postgresql_cannot_hold_is_refused(
    parameter: str, name: Any, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        TableConfig(**{parameter: name})
    assert parameter in str(caught.value)


def test_a_schema_may_take_all_63_bytes() -> None:
    assert TableConfig(schema="s" * 63).schema == "s" * 63


@pytest.mark.parametrize("parameter", ["field_for_task_id", "field_for_payload"])
@pytest.mark.parametrize("value", ["varchar", "Json", "", None, 7, ["Text"]])
def test_an_unknown_type_is_refused_with_the_known_ones(parameter: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{parameter} must be one of") as caught:
        TableConfig(**{parameter: value})
    known = "VarChar" if parameter == "field_for_task_id" else "Jsonb"
    assert f'"{known}"' in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [{"table_name": ""}, {"schema": "a\x00"}, {"field_for_task_id": "Int"}],
)
def test_models_and_backend_refuse_what_the_configuration_refuses(arguments: Any) -> None:
    with pytest.raises(ConfigurationError):
        build_models(**arguments)
    with pytest.raises(ConfigurationError):
        SQLAlchemyResultBackend("postgresql://nowhere.invalid/x", **arguments)


def test_a_configuration_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="table_name"):
        TableConfig("")


def test_configurations_are_frozen_and_compare_by_value() -> None:
    config = TableConfig("results", schema="app")
    assert config == TableConfig("results", schema="app")
    assert len({config, TableConfig("results", schema="app")}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.table_name = "other"  # type: ignore[misc]  # it is frozen


def test_the_qualified_name_has_the_schema_if_there_is_one() -> None:
    assert TableConfig("results").qualified_name == "results"
    assert TableConfig("results", schema="app").qualified_name == "app.results"
    assert TableConfig("results", schema="app").qualified("other") == "app.other"


@given(st.uuids())
def test_a_uuid_column_takes_every_spelling_of_a_uuid(task_id: uuid.UUID) -> None:
    config = TableConfig(field_for_task_id="Uuid")
    for spelling in (str(task_id), task_id.hex, str(task_id).upper(), f"{{{task_id}}}"):
        assert config.to_column_task_id(spelling) == task_id
    assert config.to_column_task_id(task_id) == task_id
    with pytest.raises(InvalidTaskIdError, match=r"is not a str but UUID: pass str\(task_id\)"):
        TableConfig().to_column_task_id(task_id)


class Kind(str, enum.Enum):  # noqa: UP042 - it is about these
    """Whose str() is "Kind.FIRST"."""

    FIRST = "first"


def test_an_id_of_a_subclass_becomes_a_plain_str() -> None:
    column_id = TableConfig().to_column_task_id(Kind.FIRST)
    assert (type(column_id), column_id) == (str, "first")


@pytest.mark.parametrize("task_id", ["", "not-a-uuid", "\ud800", None, 7])
def test_a_uuid_column_refuses_other_ids(task_id: Any) -> None:
    with pytest.raises(InvalidTaskIdError, match="is not a UUID"):
        TableConfig(field_for_task_id="Uuid").to_column_task_id(task_id)


@given(st.text())
def test_a_text_column_takes_every_id_without_nul(task_id: str) -> None:
    for config in (TableConfig(), TableConfig(field_for_task_id="Text")):
        if "\x00" in task_id:
            with pytest.raises(InvalidTaskIdError, match="NUL"):
                config.to_column_task_id(task_id)
        else:
            assert config.to_column_task_id(task_id) == task_id


@pytest.mark.parametrize(
    ("task_id", "reason"),
    [("a\x00b", "NUL"), ("\ud800", "surrogate"), (7, "not a str"), (None, "not a str")],
)
def test_a_text_column_refuses_what_it_cannot_hold(task_id: Any, reason: str) -> None:
    with pytest.raises(InvalidTaskIdError, match=reason):
        TableConfig().to_column_task_id(task_id)
