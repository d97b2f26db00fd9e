"""Values through a real PostgreSQL: what set_result() takes, get_result() returns."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import pytest
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import select
from taskiq import AsyncTaskiqTask, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.serializers import (
    CBORSerializer,
    JSONSerializer,
    MSGPackSerializer,
    ORJSONSerializer,
    PickleSerializer,
)

from taskiq_sa_pg import ResultDecodeError, ResultSerializationError, SQLAlchemyResultBackend
from taskiq_sa_pg.engines import make_engine
from tests.tasks import result_of

Backend = SQLAlchemyResultBackend[Any]
BackendFactory = Callable[..., Awaitable[Backend]]


class Order(BaseModel):
    """A task's return type."""

    id: UUID
    total: Decimal
    placed_at: datetime
    lines: tuple[str, ...] = ()


@dataclass
class Point:
    x: int
    y: tuple[int, ...]


class Rejected(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


ORDER = Order(id=UUID(int=7), total=Decimal("9.90"), placed_at=datetime(2024, 2, 29, tzinfo=UTC))

CONFIGURATIONS: dict[str, tuple[str, type[TaskiqSerializer]]] = {
    "pickle": ("Bytea", PickleSerializer),
    "json": ("Bytea", JSONSerializer),
    "orjson": ("Bytea", ORJSONSerializer),
    "msgpack": ("Bytea", MSGPackSerializer),
    "cbor": ("Bytea", CBORSerializer),
    "jsonb": ("Jsonb", JSONSerializer),
    "jsonb-orjson": ("Jsonb", ORJSONSerializer),
}
PLAIN = [name for name in CONFIGURATIONS if name != "pickle"]
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)

SCALARS: list[Any] = [
    *(None, True, False, 0, -1, 2**63 - 1, 0.1, -0.0, 1e16, 1e300, 5e-324, "", "Grüße 😀"),
    *([], {}, [[]], {"": {}}, {"b": 1, "a": [None, 1.5]}, "NaN", "\\u0000", "a\x00b"),
    *({"$serialized": "x"}, {"$bytes": "x"}, [{"$serialized": 1}]),
]
SPECIAL_TEXTS = ["\ud800", "\udfff😀", {"\udc80": 1}]
OBJECTS: list[tuple[Any, Any]] = [
    (Order, ORDER),
    (list[Order], [ORDER, ORDER]),
    (Point, Point(1, (2, 3))),
    (datetime, datetime(2024, 7, 1, 2, 30, 0, 123456, tzinfo=ZoneInfo("Europe/Berlin"))),
    (datetime, datetime(2024, 2, 29, 12)),  # noqa: DTZ001 - naive ones come back naive
    (date, date(2024, 2, 29)),
    (timedelta, timedelta(days=-1, microseconds=1)),
    (Decimal, Decimal("1.50")),
    (UUID, UUID(int=1)),
    (bytes, "Grüße".encode()),
    (tuple[int, ...], (1, 2)),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (dict[int, str], {1: "a"}),
]
PICKLED: list[Any] = [
    *(value for _, value in OBJECTS),
    *SPECIAL_TEXTS,
    *(bytes(range(256)), 2**200, math.inf, -math.inf, {(1, "a"): {2: (3,)}}, range(3)),
]
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["$serialized", "1e5", "\\u0000"]),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text(st.characters()) | st.just("$serialized"), inner, max_size=4)
    ),
    max_leaves=15,
)


async def start(start_backend: BackendFactory, name: str) -> Backend:
    payload, serializer = CONFIGURATIONS[name]
    return await start_backend(field_for_payload=payload, serializer=serializer())


async def store(backend: Backend, value: Any, **fields: Any) -> str:
    task_id = uuid4().hex
    await backend.set_result(task_id, result_of(value, **fields))
    return task_id


async def returned(backend: Backend, value: Any) -> Any:
    result = await backend.get_result(await store(backend, value))
    assert not result.is_err, result.error
    return result.return_value


def assert_alike(value: Any, original: Any) -> None:
    assert type(value) is type(original)
    assert value == original
    if isinstance(original, float):
        assert math.copysign(1, value) == math.copysign(1, original)


def examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """The same examples in every run; they are stored outside, because @given cannot await."""
    found = []

    @seed(0)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate])
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


@every_configuration
async def test_json_values_come_back(start_backend: BackendFactory, name: str) -> None:
    backend = await start(start_backend, name)
    for value in SCALARS:
        assert_alike(await returned(backend, value), value)


async def test_pickle_returns_equal_values_of_the_same_type(start_backend: BackendFactory) -> None:
    backend = await start_backend()
    for value in PICKLED:
        assert_alike(await returned(backend, value), value)
    assert math.isnan(await returned(backend, math.nan))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("declared", "value"),
    OBJECTS,
    ids=[f"{index} {getattr(t, '__name__', t)}" for index, (t, _) in enumerate(OBJECTS)],
)
async def test_wait_result_gives_the_declared_type(
    start_backend: BackendFactory, name: str, declared: Any, value: Any
) -> None:
    backend = await start(start_backend, name)
    task_id = await store(backend, value)
    task: AsyncTaskiqTask[Any] = AsyncTaskiqTask(task_id, backend, return_type=declared)
    result = await task.wait_result(check_interval=0.01, timeout=10)
    assert not result.is_err, result.error
    assert_alike(result.return_value, value)


@pytest.mark.parametrize("name", ["json", "jsonb"])
async def test_json_keeps_what_jsonb_alone_cannot_hold(
    start_backend: BackendFactory, name: str
) -> None:
    backend = await start(start_backend, name)
    for value in [*SPECIAL_TEXTS, math.inf, -math.inf, 2**200, [-1e16, {"\x00": "\x00"}]]:
        assert_alike(await returned(backend, value), value)
    assert math.isnan(await returned(backend, math.nan))


async def test_any_json_value_comes_back_from_jsonb(start_backend: BackendFactory) -> None:
    backend = await start_backend(field_for_payload="Jsonb")
    for value in examples(JSON_VALUES, 200):
        read = await returned(backend, value)
        # Like ==, but NaN equals itself, and 1 neither 1.0 nor True.
        assert repr_sorted(read) == repr_sorted(value)


def repr_sorted(value: Any) -> str:
    """The repr without the order of names, which jsonb does not keep."""
    if isinstance(value, dict):
        return repr(sorted((name, repr_sorted(part)) for name, part in value.items()))
    return repr([repr_sorted(part) for part in value]) if type(value) is list else repr(value)


@pytest.mark.parametrize("name", ["jsonb", "jsonb-orjson"])
async def test_jsonb_can_be_filtered_in_sql(
    start_backend: BackendFactory, name: str, database: Any
) -> None:
    backend = await start(start_backend, name)
    small = await store(backend, {"total": 5, "kind": "a"})
    large = await store(backend, {"total": 6, "kind": "b"})
    await store(backend, {"total": math.inf, "text": "\x00"})  # wrapped, or null
    Result = backend.models.Result  # noqa: N806 - a class
    engine = make_engine(database.psycopg_dsn)
    async with engine.connect() as connection:
        over_5 = select(Result.task_id).where(Result.return_value["total"].as_integer() > 5)
        of_kind = select(Result.task_id).where(Result.return_value["kind"].as_string() == "a")
        assert (await connection.scalars(over_5)).all() == [large]
        assert (await connection.scalars(of_kind)).all() == [small]
    await engine.dispose()


async def test_jsonb_keeps_errors_and_progress_as_json(
    start_backend: BackendFactory, database: Any
) -> None:
    backend = await start_backend(field_for_payload="Jsonb")
    error = ValueError("bad", 5)
    await backend.set_result(
        "t1", TaskiqResult(is_err=True, return_value=None, execution_time=0.1, error=error)
    )
    await backend.set_progress("t1", TaskProgress(state="half", meta={"done": 5}))
    [row] = await database.fetch(
        "SELECT error->'exceptions'->0->'args'->>0 AS arg, p.meta->>'done' AS done "
        "FROM taskiq_results JOIN taskiq_results_progress p USING (task_id)"
    )
    assert tuple(row) == ("bad", "5")


@every_configuration
async def test_exceptions_labels_log_and_progress_come_back(
    start_backend: BackendFactory, name: str
) -> None:
    backend = await start(start_backend, name)
    error = Rejected(code=5)
    error.__cause__ = ValueError("a\x00b", b"\xff")
    stored: TaskiqResult[Any] = TaskiqResult(
        is_err=True,
        return_value=None,
        execution_time=0.1,
        labels={"raw": b"\x00\xff", "text": "a\x00b", "n": 1e300, "w": {"$serialized": "x"}},
        log="line\x00",
    )
    stored.error = error  # past validation, which would rebuild it
    await backend.set_result("t1", stored)
    result = await backend.get_result("t1", with_logs=True)
    assert isinstance(result.error, Rejected)
    assert (str(result.error), result.error.code) == ("code 5", 5)
    assert isinstance(result.error.__cause__, ValueError)
    assert result.error.__cause__.args == ("a\x00b", b"\xff")
    assert result.labels == stored.labels
    assert result.log == "line\\x00"
    await backend.set_progress("t1", TaskProgress(state="a\x00b", meta=["\x00", 1e300]))
    progress = await backend.get_progress("t1")
    assert progress is not None
    assert (progress.state, progress.meta) == ("a\\x00b", ["\x00", 1e300])


@every_configuration
async def test_what_cannot_be_stored_answers_the_waiter_with_an_error(
    start_backend: BackendFactory, name: str
) -> None:
    backend = await start(start_backend, name)
    for value in (lambda: None, (n for n in [1]), object.__new__):
        if value is object.__new__ and name == "pickle":
            continue  # pickled by its name
        task: AsyncTaskiqTask[Any] = AsyncTaskiqTask(await store(backend, value), backend)
        result = await task.wait_result(check_interval=0.01, timeout=10)
        assert result.is_err
        assert type(result.error) is ResultSerializationError


@every_configuration
async def test_50_megabytes_come_back(start_backend: BackendFactory, name: str) -> None:
    backend = await start(start_backend, name)
    value = "x" * 50_000_000
    assert await returned(backend, value) == value


async def test_50_megabytes_that_jsonb_cannot_hold_come_back(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend(field_for_payload="Jsonb")
    value = "x" * 50_000_000 + "\x00"
    assert await returned(backend, value) == value


@pytest.mark.parametrize("name", ["pickle", "json", "msgpack", "jsonb"])
@pytest.mark.parametrize("bottom", ["x", "\x00"], ids=ascii)
async def test_400_levels_come_back(start_backend: BackendFactory, name: str, bottom: str) -> None:
    backend = await start(start_backend, name)
    value: Any = bottom
    for _ in range(200):
        value = [{"a": value}]
    assert await returned(backend, value) == value


@every_configuration
async def test_a_row_of_another_serializer_stays_and_is_told(
    start_backend: BackendFactory, name: str, database: Any
) -> None:
    backend = await start_backend(
        field_for_payload=CONFIGURATIONS[name][0],
        serializer=CONFIGURATIONS[name][1](),
        keep_results=False,
    )
    task_id = await store(backend, [1])
    damage = """'{"$serialized": "x"}'""" if name.startswith("jsonb") else r"'\xc1ff'"
    await database.fetch(f"UPDATE taskiq_results SET return_value = {damage}")
    with pytest.raises(ResultDecodeError, match=f"{task_id}.* taskiq_results"):
        await backend.get_result(task_id)
    assert len(await database.fetch("SELECT FROM taskiq_results")) == 1
