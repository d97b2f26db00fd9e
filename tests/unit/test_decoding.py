"""backend.decode(): rows as SQLAlchemy's types give them, without a server."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from sqlalchemy.orm import Session, make_transient_to_detached
from taskiq.serializers import JSONSerializer, ORJSONSerializer

from taskiq_sa_pg import (
    MissingColumnsError,
    ResultDecodeError,
    SQLAlchemyResultBackend,
    TaskiqSaPgError,
)
from taskiq_sa_pg.statements import StoredResult
from tests.tasks import result_of
from tests.unit.test_jsonb import JSON_VALUES, stored_by_postgresql

Backend = SQLAlchemyResultBackend[Any]

# None of them is ever started, and there is no event loop.
BACKENDS = {
    "Bytea": Backend("postgresql://nowhere"),
    "Jsonb": Backend("postgresql://nowhere", field_for_payload="Jsonb"),
}
JSONB = BACKENDS["Jsonb"]
every_kind = pytest.mark.parametrize("kind", BACKENDS)

NEEDED = ["is_err", "return_value", "error", "execution_time"]


def columns_of(backend: Backend, task_id: str = "1", **fields: Any) -> dict[str, Any]:
    """A row of all columns, as a select of the model gives them."""
    row = backend.settings.codec.encode_result(
        task_id, result_of(**{"value": None, **fields})
    )._asdict()
    is_jsonb = backend.models.config.field_for_payload == "Jsonb"
    for name in ("labels", "return_value", "error") if is_jsonb else ("labels",):
        if row[name] is not None:
            row[name] = json.loads(stored_by_postgresql(row[name]))
    row["expires_at"] = None
    return row


def texts(columns: dict[str, Any]) -> StoredResult:
    """The same as the backend itself reads it."""
    return StoredResult(
        **{
            name: json.dumps(columns[name])
            if name in {"labels", "return_value", "error"}
            and not isinstance(columns[name], bytes)
            and not (name == "error" and columns[name] is None)
            else columns[name]
            for name in StoredResult._fields
        }
    )


@every_kind
def test_an_instance_and_a_mapping_give_the_whole_result(kind: str) -> None:
    backend = BACKENDS[kind]
    labels = {
        "tenant": "ünï 🙂",
        "n": 2**80,
        "raw": b"\x00",
        "when": datetime(2026, 1, 1, tzinfo=UTC),
    }
    columns = columns_of(
        backend, value=[1, "ü\x00"], labels=labels, log="said", is_err=True, error=KeyError("k", 2)
    )
    for row in (backend.models.Result(**columns), columns):
        result = backend.decode(row)
        assert result.return_value == [1, "ü\x00"]
        assert result.is_err is True
        assert result.execution_time == 0.25
        assert repr(result.error) == "KeyError('k', 2)"
        assert result.labels == backend.settings.codec.decode_result(texts(columns)).labels
        assert result.labels["tenant"] == "ünï 🙂"
        assert result.labels["n"] == 2**80
        assert result.labels["raw"] == b"\x00"
        assert result.log is None
        assert backend.decode(row, with_logs=True).log == "said"


@given(JSON_VALUES)
def test_any_json_comes_back_as_it_was(value: Any) -> None:
    columns = columns_of(JSONB, value=value, labels={"label": value})
    result = JSONB.decode(columns)
    assert repr(result.return_value) == repr(json.loads(json.dumps(value)))
    assert repr(result.labels) == repr({"label": value})


@pytest.mark.parametrize(
    "value",
    [None, 0.1, -0.5, 1e-7, 5e-324, 2**63 - 1, "ü🙂", [1.0], {"$serialized": "x"}],
    ids=ascii,
)
@pytest.mark.parametrize("serializer", [JSONSerializer(), ORJSONSerializer()], ids=type)
def test_the_application_s_json_deserializer_may_be_another(serializer: Any, value: Any) -> None:
    backend = Backend("postgresql://nowhere", field_for_payload="Jsonb", serializer=serializer)
    text = backend.settings.codec.encode_result("1", result_of(value)).return_value
    assert isinstance(text, str)
    for loads in (orjson.loads, lambda t: json.loads(t, parse_float=Decimal)):
        columns = columns_of(backend) | {"return_value": loads(stored_by_postgresql(text))}
        assert repr(backend.decode(columns).return_value) == repr(value)


@every_kind
@pytest.mark.parametrize("name", NEEDED)
def test_a_column_that_is_needed_and_not_there_is_named(kind: str, name: str) -> None:
    backend = BACKENDS[kind]
    columns = columns_of(backend)
    del columns[name]
    for row in (columns, backend.models.Result(**columns)):
        with pytest.raises(
            MissingColumnsError, match=f"has no {name} of table taskiq_results"
        ) as e:
            backend.decode(row)
        assert isinstance(e.value, LookupError)
        assert isinstance(e.value, TaskiqSaPgError)
        assert e.value.args == (name, "taskiq_results")


@every_kind
def test_the_needed_columns_are_enough(kind: str) -> None:
    backend = BACKENDS[kind]
    columns = columns_of(backend, value=7, labels={"a": 1}, log="said")
    few = {name: columns[name] for name in NEEDED}
    for row in (few, backend.models.Result(**few)):
        result = backend.decode(row)
        assert (result.return_value, result.labels, result.log) == (7, {}, None)
        with pytest.raises(MissingColumnsError, match="has no log of"):
            backend.decode(row, with_logs=True)


def test_all_that_is_missing_is_named_at_once() -> None:
    with pytest.raises(
        MissingColumnsError, match="no is_err, return_value, error, execution_time "
    ):
        JSONB.decode({"task_id": "1"})


def test_what_an_instance_has_not_loaded_is_not_asked_for() -> None:
    row = JSONB.models.Result(**columns_of(JSONB))
    make_transient_to_detached(row)
    with Session() as session:
        session.add(row)
        session.expire(row, ["error"])
    with pytest.raises(MissingColumnsError, match="has no error of"):
        JSONB.decode(row)


def test_a_row_of_an_outer_join_that_found_no_result_says_so() -> None:
    empty = dict.fromkeys([*NEEDED, "labels", "task_id"])
    with pytest.raises(MissingColumnsError, match="An outer join has no columns if"):
        JSONB.decode(empty)


@every_kind
def test_an_expired_row_decodes(kind: str) -> None:
    backend = BACKENDS[kind]
    past = datetime.now(UTC) - timedelta(days=1)
    row = backend.models.Result(**columns_of(backend, value=7) | {"expires_at": past})
    assert row.is_expired
    assert backend.decode(row).return_value == 7


@pytest.mark.parametrize("value", [b"garbage", "a text", None, 5], ids=repr)
def test_a_value_that_cannot_be_read_back_names_the_task(value: Any) -> None:
    backend = BACKENDS["Bytea"]
    columns = columns_of(backend, 'o"dd') | {"return_value": value}
    with pytest.raises(ResultDecodeError, match="the result of task 'o\"dd' in table taskiq_resu"):
        backend.decode(columns)
    del columns["task_id"]
    with pytest.raises(ResultDecodeError, match="decode a result in table taskiq_results"):
        backend.decode(columns)


def test_what_no_json_deserializer_should_make_is_a_value_that_cannot_be_read_back() -> None:
    columns = columns_of(JSONB) | {"return_value": {"a": {1, 2}}}
    with pytest.raises(ResultDecodeError, match="json_deserializer returned a set"):
        JSONB.decode(columns)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ResultDecodeError, match="RecursionError"):
        JSONB.decode(columns | {"return_value": deep})


def test_bytes_may_come_in_a_view() -> None:
    backend = BACKENDS["Bytea"]
    columns = columns_of(backend, value="seen")
    columns["return_value"] = memoryview(columns["return_value"])
    assert backend.decode(columns).return_value == "seen"


@pytest.mark.parametrize("row", [None, ("a", "tuple"), "text", 5, object()], ids=type)
def test_what_is_no_row_is_refused(row: Any) -> None:
    with pytest.raises(TypeError, match=rf"decode\(\) takes .* not {type(row).__name__}$"):
        JSONB.decode(row)


def test_a_mapping_may_hold_the_instance() -> None:
    instance = JSONB.models.Result(**columns_of(JSONB, value=7))
    assert JSONB.decode({"Result": instance, "tenant": "acme"}).return_value == 7
    with pytest.raises(TypeError, match="has 2 results"):
        JSONB.decode({"one": instance, "other": instance})
