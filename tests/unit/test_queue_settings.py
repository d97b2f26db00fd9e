"""What a broker is told: its arguments, and the labels of its tasks."""

from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from taskiq import BrokerMessage

from taskiq_sa_pg import ConfigurationError, InvalidTaskIdError, SQLAlchemyBroker, build_models
from taskiq_sa_pg.broker.sender import row_of
from taskiq_sa_pg.broker.settings import QueueSettings
from taskiq_sa_pg.exceptions import TaskAbandonedError

MODELS = build_models(queue=True)
UUIDS = build_models(field_for_task_id="Uuid", queue=True)
DSN = "postgresql://user@localhost/app"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("queue_name", ""),
        ("queue_name", 5),
        ("queue_name", "a\x00b"),
        ("queue_name", "\ud800"),
        ("queue_name", "q" * 1001),
        ("queue_name", "\u4e00" * 334),
        ("lease", 0),
        ("lease", "60"),
        ("max_deliveries", 0),
        ("max_deliveries", 2.5),
        ("max_deliveries", 32_767),
        ("notify", "false"),
        ("run_migrations", 1),
        ("check_schema", "maybe"),
        ("startup_timeout", -1),
        ("max_connections", 0),
        ("retry_timeout", -1),
        ("command_timeout", 0),
    ],
    ids=repr,
)
def test_an_argument_that_cannot_work_is_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{argument} must be"):
        SQLAlchemyBroker(DSN, models=MODELS, **{argument: value})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "give either dsn= .* or engine="),
        ({"dsn": DSN, "queue_names": "q"}, "no argument queue_names: did you mean queue_name?"),
        ({"dsn": DSN, "max_delivery": 3}, "Invalid argument.*max_delivery"),
        ({"dsn": DSN, "notify": False, "listen_dsn": DSN}, "listen_dsn needs notify=True"),
        ({"dsn": DSN, "models": build_models("other")}, "needs the model of its queue"),
        ({"dsn": DSN, "models": "models"}, "models must be a Models, not str"),
        (
            {"dsn": DSN, "models": MODELS, "table_name": "t"},
            "pass names and types to the models only",
        ),
        (
            {"engine": create_async_engine(DSN.replace(":", "+asyncpg:", 1)), "pool_size": 2},
            "pool_size",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_arguments_that_contradict_each_other_say_so(arguments: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        SQLAlchemyBroker(**arguments)


def test_models_are_built_from_names_and_types() -> None:
    broker = SQLAlchemyBroker(DSN, table_name="t", field_for_task_id="Uuid", schema="s")
    assert broker.models.queue_table is not None
    assert broker.models.queue_table.fullname == "s.t_queue"
    assert broker.models.config.field_for_task_id == "Uuid"
    again = SQLAlchemyBroker(DSN, table_name="t", field_for_task_id="Uuid", schema="s")
    assert again.models is broker.models


@pytest.mark.parametrize("names", [(), ("",), ("mail", 5), ("a\x00b",)], ids=repr)
def test_a_view_needs_names(names: Any) -> None:
    with pytest.raises(ConfigurationError, match="queue"):
        SQLAlchemyBroker(DSN, models=MODELS).listening_to(*names)


def message_of(task_id: str = "a", **labels: Any) -> BrokerMessage:
    return BrokerMessage(task_id=task_id, task_name="task", message=b"m", labels=labels)


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ({}, ("orders", 0, 0.0)),
        ({"queue_name": "mail", "priority": 9, "delay": 2}, ("mail", 9, 2.0)),
        ({"priority": "3", "delay": "0.25"}, ("orders", 3, 0.25)),
        ({"priority": 3.0, "delay": 1e-3}, ("orders", 3, 0.001)),
        ({"priority": None, "delay": None, "queue_name": None}, ("orders", 0, 0.0)),
        ({"unknown": "x"}, ("orders", 0, 0.0)),
    ],
    ids=repr,
)
def test_labels_say_where_and_when_a_task_goes(labels: Any, row: Any) -> None:
    found = row_of(QueueSettings(models=MODELS, queue_name="orders"), message_of(**labels))
    assert (found.queue_name, found.priority, found.available_at) == row
    assert type(found.priority) is int
    assert (found.task_id, found.task_name, found.message) == ("a", "task", b"m")


@pytest.mark.parametrize("label", ["priority", "delay"])
@pytest.mark.parametrize("value", ["", "x", -1, "-1", "nan", float("inf"), [], {}, b"x"], ids=repr)
def test_a_label_that_cannot_work_is_named(label: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        row_of(QueueSettings(models=MODELS), message_of(**{label: value}))
    assert f"the label {label} must be a " in str(caught.value)
    assert repr(value) in str(caught.value)


def test_task_ids_are_those_of_the_column() -> None:
    settings = QueueSettings(models=UUIDS)
    row = row_of(settings, message_of("00000000000000000000000000000001"))
    assert row.task_id.int == 1
    with pytest.raises(InvalidTaskIdError):
        row_of(settings, message_of("not a uuid"))


def test_an_abandoned_task_says_how_often_it_was_delivered() -> None:
    text = str(TaskAbandonedError("order-1", 5))
    assert "'order-1' was delivered 5 times" in text
    assert "taskiq-sa-pg release" in text


def test_no_secret_of_a_session_is_told() -> None:
    url = "postgresql+psycopg://u:s3cret@/other?host=elsewhere&password=s3cret&sslpassword=s3cret"
    session = Session(create_engine(url))
    with pytest.raises(ConfigurationError, match=r"u:\*\*\*@/other\?host=elsewhere, but") as info:
        SQLAlchemyBroker(DSN, models=MODELS).in_session(session)
    assert "s3cret" not in str(info.value)
