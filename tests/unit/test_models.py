"""The models: their columns, types and names in the DDL, their metadata, what they refuse."""

from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import CreateIndex, CreateTable

from taskiq_sa_pg import (
    ConfigurationError,
    Models,
    ProgressMixin,
    QueueMixin,
    ResultMixin,
    ScheduleMixin,
    StatusMixin,
    TableConfig,
    WorkerMixin,
    build_models,
)
from taskiq_sa_pg.models import primary_key_name
from tests.unit.sql import compiled, names, quoted

CONVENTION = {"pk": "pk_%(table_name)s", "ix": "ix_%(column_0_label)s"}

RESULT_COLUMNS = [
    "task_id",
    "is_err",
    "return_value",
    "error",
    "error_type",
    "traceback",
    "execution_time",
    "labels",
    "log",
    "task_name",
    "attempt",
    "finished_at",
    "expires_at",
    "args",
    "kwargs",
    "worker",
    "queued_at",
    "started_at",
]
PROGRESS_COLUMNS = ["task_id", "state", "meta", "updated_at"]
STATUS_COLUMNS = [
    *("task_id", "state", "task_name", "attempt", "queued_at", "started_at", "worker"),
    "updated_at",
]
WORKER_COLUMNS = ["worker", "started_at", "seen_at"]
QUEUE_COLUMNS = [
    *("task_id", "queue_name", "priority", "available_at", "claim", "deliveries", "worker"),
    *("task_name", "message", "queued_at"),
]
SCHEDULE_COLUMNS = [
    *("schedule_id", "task_name", "cron", "interval", "time", "message", "last_tick"),
    *("created_at", "is_labelled"),
]


def table_of(table: sa.Table | None) -> sa.Table:
    assert table is not None
    return table


def ddl(models: Models) -> list[str]:
    tables = (models.results_table, *models.other_tables, table_of(models.workers_table))
    indexes = sorted(models.results_table.indexes, key=lambda index: str(index.name))
    return [*map(compiled, map(CreateTable, tables)), *map(compiled, map(CreateIndex, indexes))]


@settings(max_examples=12)
@given(names, st.none() | names)
def test_names_are_in_the_ddl_to_the_letter(name: str, schema: str | None) -> None:
    config = TableConfig(name, schema=schema)
    text = "\n".join(ddl(build_models(name, schema=schema)))
    prefix = "" if schema is None else f"{quoted(schema)}."
    assert f"CREATE TABLE {prefix}{quoted(name)} (" in text
    assert f"CREATE TABLE {prefix}{quoted(config.progress_table_name)} (" in text
    assert f"CREATE TABLE {prefix}{quoted(config.status_table_name)} (" in text
    assert f"CREATE TABLE {prefix}{quoted(config.workers_table_name)} (" in text
    assert f"CREATE INDEX {quoted(config.finished_at_index_name)} ON {prefix}" in text
    assert f"CREATE INDEX {quoted(config.expires_at_index_name)} ON {prefix}" in text
    for table_name in config.table_names:
        assert f"CONSTRAINT {quoted(primary_key_name(table_name))} PRIMARY KEY" in text


def test_the_columns_stand_in_the_documented_order() -> None:
    models = build_models()
    assert models.results_table.c.keys() == RESULT_COLUMNS
    assert models.progress_table.c.keys() == PROGRESS_COLUMNS
    assert models.status_table is not None
    assert models.status_table.c.keys() == STATUS_COLUMNS
    assert table_of(models.workers_table).c.keys() == WORKER_COLUMNS
    models = build_models(queue=True)
    assert table_of(models.queue_table).c.keys() == QUEUE_COLUMNS
    assert table_of(models.schedules_table).c.keys() == SCHEDULE_COLUMNS


def test_the_other_tables_are_those_whose_rows_go_with_a_result() -> None:
    models = build_models()
    assert models.other_tables == [models.progress_table, models.status_table]
    without_status = Models(models.Result, models.Progress)
    assert without_status.status_table is None
    assert without_status.workers_table is None
    assert without_status.other_tables == [models.progress_table]


@pytest.mark.parametrize(
    ("field", "ddl_type"), [("VarChar", "VARCHAR"), ("Text", "TEXT"), ("Uuid", "UUID")]
)
def test_both_task_ids_have_the_chosen_type(field: Any, ddl_type: str) -> None:
    models = build_models(field_for_task_id=field)
    for table in (models.results_table, *models.other_tables):
        assert f"task_id {ddl_type} NOT NULL" in compiled(CreateTable(table))


@pytest.mark.parametrize(("field", "ddl_type"), [("Bytea", "BYTEA"), ("Jsonb", "JSONB")])
def test_serialized_values_have_the_chosen_type(field: Any, ddl_type: str) -> None:
    results, progress, *_ = ddl(build_models(field_for_payload=field))
    assert f"return_value {ddl_type} NOT NULL" in results
    assert f"error {ddl_type}," in results
    assert "labels JSONB NOT NULL" in results
    assert f"meta {ddl_type}," in progress


def test_the_columns_are_not_null_and_default_as_documented() -> None:
    models = build_models()
    required = [column.name for column in models.results_table.c if not column.nullable]
    assert required == [
        *("task_id", "is_err", "return_value", "execution_time", "labels"),
        *("attempt", "finished_at"),
    ]
    results, progress, status, *_ = ddl(models)
    assert "attempt INTEGER DEFAULT 0 NOT NULL" in results
    assert "execution_time DOUBLE PRECISION NOT NULL" in results
    assert "finished_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL" in results
    assert "expires_at TIMESTAMP WITH TIME ZONE," in results
    assert "state TEXT NOT NULL" in progress
    assert "updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL" in progress
    assert "attempt INTEGER DEFAULT 0 NOT NULL" in status
    assert "updated_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL" in status


def test_finished_at_has_a_brin_index_and_expires_at_a_partial_one() -> None:
    *_, expires_at, finished_at = ddl(build_models())
    assert finished_at.endswith(
        '"taskiq_results" USING brin (finished_at) WITH (autosummarize = on)'
    )
    assert expires_at.endswith('ON "taskiq_results" (expires_at) WHERE expires_at IS NOT NULL')


def test_rows_that_change_often_have_room_for_it_and_no_index_but_the_key() -> None:
    models = build_models()
    for table in (*models.other_tables, table_of(models.workers_table)):
        assert "WITH (fillfactor = 50)" in compiled(CreateTable(table))
        assert not table.indexes
    assert "fillfactor" not in compiled(CreateTable(models.results_table))


@settings(max_examples=8)
@given(names, st.none() | names)
def test_names_of_the_broker_s_tables_are_in_the_ddl_to_the_letter(
    name: str, schema: str | None
) -> None:
    config, models = TableConfig(name), build_models(name, schema=schema, queue=True)
    prefix = "" if schema is None else f"{quoted(schema)}."
    for table, table_name in zip(
        (models.queue_table, models.schedules_table), config.queue_table_names, strict=True
    ):
        text = compiled(CreateTable(table_of(table)))
        assert f"CREATE TABLE {prefix}{quoted(table_name)} (" in text
        assert f"CONSTRAINT {quoted(primary_key_name(table_name))} PRIMARY KEY" in text
    [index] = table_of(models.queue_table).indexes
    assert compiled(CreateIndex(index)) == (
        f"CREATE INDEX {quoted(config.available_at_index_name)} ON "
        f"{prefix}{quoted(config.queue_table_name)} (queue_name, priority DESC, available_at)"
    )


def test_the_broker_s_columns_are_not_null_and_default_as_documented() -> None:
    models = build_models(queue=True)
    queue, schedules = table_of(models.queue_table), table_of(models.schedules_table)
    assert [column.name for column in queue.c if column.nullable] == ["worker"]
    assert [column.name for column in schedules.c if column.nullable] == [
        *("cron", "interval", "time", "last_tick")
    ]
    text = compiled(CreateTable(queue))
    assert "queue_name TEXT DEFAULT 'default' NOT NULL" in text
    assert "priority SMALLINT DEFAULT 0 NOT NULL" in text
    assert "available_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL" in text
    assert "claim INTEGER DEFAULT 0 NOT NULL" in text
    assert "autovacuum_vacuum_threshold = 1000" in text
    text = compiled(CreateTable(schedules))
    assert "created_at TIMESTAMP WITH TIME ZONE DEFAULT now() NOT NULL" in text
    assert "WITH (fillfactor = 50)" in text


def test_the_broker_s_tables_are_there_only_where_they_are_asked_for() -> None:
    without, with_queue = build_models("jobs"), build_models("jobs", queue=True)
    assert (without.Queue, without.Schedule) == (None, None)
    assert (without.queue_table, without.schedules_table) == (None, None)
    assert with_queue.metadata.tables.keys() - without.metadata.tables.keys() == {
        "jobs_queue",
        "jobs_schedules",
    }
    assert with_queue.other_tables == [with_queue.progress_table, with_queue.status_table]
    with pytest.raises(ConfigurationError, match="queue must be"):
        build_models(queue="true")  # type: ignore[arg-type]  # it is about this


def test_each_call_makes_fresh_classes() -> None:
    one, other = build_models("one"), build_models("other")
    again = build_models("one")
    assert len({one.Result, other.Result, again.Result, ResultMixin}) == 4
    assert one.metadata is not again.metadata
    assert one.results_table.name == "one"
    assert other.results_table.name == "other"


def test_the_classes_have_a_repr_without_values() -> None:
    models = build_models()
    result, progress = models.Result(), models.Progress()
    result.task_id = progress.task_id = "1"
    result.is_err, result.return_value = False, b"secret"
    progress.state, progress.meta = "half", b"secret"
    assert repr(result) == "Result(task_id='1', is_err=False)"
    assert repr(progress) == "Progress(task_id='1', state='half')"
    of_broker = build_models(queue=True)
    assert of_broker.Queue is not None
    assert of_broker.Schedule is not None
    sent, schedule = of_broker.Queue(), of_broker.Schedule()
    sent.task_id = schedule.schedule_id = "1"
    sent.task_name = schedule.task_name = "add"
    sent.message = schedule.message = b"secret"
    assert repr(sent) == "Queue(task_id='1', task_name='add')"
    assert repr(schedule) == "Schedule(schedule_id='1', task_name='add')"


def test_a_given_metadata_gets_the_tables() -> None:
    metadata = sa.MetaData()
    models = build_models("results", metadata=metadata)
    assert models.metadata is metadata
    assert set(metadata.tables) == {
        "results",
        "results_progress",
        "results_status",
        "results_workers",
    }


def test_a_given_metadata_may_hold_several_pairs_of_tables() -> None:
    metadata = sa.MetaData()
    build_models("one", metadata=metadata)
    build_models("two", metadata=metadata)
    build_models("one", metadata=metadata, schema="app")
    assert len(metadata.tables) == 12


def test_the_schema_of_a_given_metadata_is_the_default() -> None:
    metadata = sa.MetaData(schema="app")
    models = build_models(metadata=metadata)
    assert models.config.schema == "app"
    assert models.results_table.schema == "app"
    other = build_models(metadata=metadata, schema="other")
    assert other.results_table.schema == "other"


def test_a_naming_convention_changes_no_name() -> None:
    # The second rewrites names that are given, too.
    for convention in (CONVENTION, {"ix": "ix_%(constraint_name)s"}):
        metadata = sa.MetaData(naming_convention=convention)
        models, usual = build_models(metadata=metadata, queue=True), build_models(queue=True)
        assert ddl(models) == ddl(usual)
        for name, table in usual.metadata.tables.items():
            given = metadata.tables[name]
            assert compiled(CreateTable(given)) == compiled(CreateTable(table))
            assert {i.name for i in given.indexes} == {i.name for i in table.indexes}


@pytest.mark.parametrize(
    "present",
    [
        f"results{suffix}"
        for suffix in ("", "_progress", "_status", "_workers", "_queue", "_schedules")
    ],
)
def test_a_metadata_that_has_one_of_the_tables_is_refused_and_left_as_it_is(present: str) -> None:
    metadata = sa.MetaData()
    sa.Table(present, metadata)
    with pytest.raises(ConfigurationError, match=f"already has a table '{present}'"):
        build_models("results", metadata=metadata, queue=True)
    assert set(metadata.tables) == {present}


def test_mixins_make_models_on_a_base_of_your_own_with_columns_of_your_own() -> None:
    class Base(DeclarativeBase):
        metadata = sa.MetaData(naming_convention=CONVENTION)

    config = TableConfig("own", "Uuid", "Jsonb", schema="app")

    class OwnResult(ResultMixin, Base):
        __table_config__ = config
        tenant: Mapped[str | None] = mapped_column(index=True)

    class OwnProgress(ProgressMixin, Base):
        __table_config__ = config

    models = Models(OwnResult, OwnProgress)
    assert models.config == config
    assert models.metadata is Base.metadata
    assert models.results_table.c.keys() == [*RESULT_COLUMNS, "tenant"]
    assert isinstance(models.results_table.c.task_id.type, sa.Uuid)
    assert isinstance(models.results_table.c.return_value.type, JSONB)
    built = build_models("own", field_for_task_id="Uuid", field_for_payload="Jsonb", schema="app")
    assert compiled(CreateTable(models.progress_table)) == ddl(built)[1]


def test_mixins_of_two_configurations_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="must share one __table_config__"):
        Models(build_models("one").Result, build_models("two").Progress)


def test_a_table_that_the_configuration_does_not_name_is_refused() -> None:
    class Base(DeclarativeBase):
        pass

    class OwnResult(ResultMixin, Base):
        __tablename__ = "own"

    class OwnProgress(ProgressMixin, Base):
        pass

    with pytest.raises(ConfigurationError, match="do not set __tablename__"):
        Models(OwnResult, OwnProgress)


@pytest.mark.parametrize(
    ("attribute", "column", "reason"),
    [
        (
            "labels",
            mapped_column("own_labels", sa.JSON),
            "has no column labels: do not change the columns",
        ),
        ("log", None, "has no column log"),
        ("return_value", mapped_column(sa.Text), r"return_value is Text\(\) and must be Large"),
        ("error", mapped_column(sa.PickleType), "error is PickleType.* and must be LargeBinary"),
        ("task_id", mapped_column(sa.Uuid), r"task_id is Uuid\(\) and must be String"),
    ],
    ids=["renamed", "left out", "type", "decorated", "task id"],
)
def test_a_column_of_the_mixin_that_is_changed_is_refused(
    attribute: str, column: Any, reason: str
) -> None:
    class Base(DeclarativeBase):
        pass

    class OwnProgress(ProgressMixin, Base):
        pass

    own_result = type("OwnResult", (ResultMixin, Base), {attribute: column})
    with pytest.raises(ConfigurationError, match=reason):
        Models(own_result, OwnProgress)


def test_no_column_of_ours_may_have_another_type() -> None:
    models = build_models(queue=True)
    usual: dict[Any, Any] = {
        ResultMixin: models.Result,
        ProgressMixin: models.Progress,
        StatusMixin: models.Status,
        QueueMixin: models.Queue,
        ScheduleMixin: models.Schedule,
        WorkerMixin: models.Worker,
    }
    for mixin, model in usual.items():
        for column in sa.inspect(model).columns:
            other = mapped_column(sa.ARRAY(sa.Text), primary_key=column.primary_key)
            base = type("Base", (DeclarativeBase,), {})
            own = type("Own", (mixin, base), {column.name: other})
            with pytest.raises(ConfigurationError, match=rf"\.{column.name} is ARRAY.* must be "):
                Models(*{**usual, mixin: own}.values())


def test_a_time_without_its_zone_is_refused() -> None:
    """asyncpg could encode none of ours for it, and every result would be lost."""

    class Base(DeclarativeBase):
        pass

    class OwnResult(ResultMixin, Base):
        queued_at: Mapped[Any] = mapped_column(sa.DateTime)

    class OwnProgress(ProgressMixin, Base):
        pass

    with pytest.raises(ConfigurationError, match=r"queued_at is DateTime\(\) and must be"):
        Models(OwnResult, OwnProgress)


def test_a_column_of_the_mixin_may_have_an_index_or_a_length() -> None:
    class Base(DeclarativeBase):
        pass

    class OwnResult(ResultMixin, Base):
        task_id: Mapped[Any] = mapped_column(sa.String(36))
        task_name: Mapped[str | None] = mapped_column(sa.Text, index=True)

    class OwnProgress(ProgressMixin, Base):
        pass

    assert Models(OwnResult, OwnProgress).results_table.c.task_id.type.length == 36  # type: ignore[attr-defined]  # a TypeEngine for mypy


def test_a_schema_that_only_the_base_knows_is_refused() -> None:
    class Base(DeclarativeBase):
        metadata = sa.MetaData(schema="app")

    class OwnResult(ResultMixin, Base):
        pass

    class OwnProgress(ProgressMixin, Base):
        pass

    with pytest.raises(ConfigurationError, match="set the schema in __table_config__"):
        Models(OwnResult, OwnProgress)


def test_models_of_one_configuration_do_not_share_their_registry() -> None:
    """Two calls on one metadata make no warning about classes of the same name."""
    metadata = sa.MetaData()
    one = build_models("one", metadata=metadata)
    two = build_models("two", metadata=metadata)
    assert sa.inspect(one.Result).registry is not sa.inspect(two.Result).registry
