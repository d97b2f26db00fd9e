"""What a result backend does, whatever its columns' types, its engine's owner and its driver."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import event
from taskiq.depends.progress_tracker import TaskState

from taskiq_sa_pg import InvalidTaskIdError, ResultIsMissingError, SQLAlchemyResultBackend
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.models import PayloadField, TaskIdField
from tests.conftest import Database, NewDatabase, assert_nothing_checked_out, engine_of
from tests.tasks import new_id, progress_of, result_of

Backend = SQLAlchemyResultBackend[Any]


class Combination(NamedTuple):
    """One way to set a backend up."""

    field_for_task_id: TaskIdField = "VarChar"
    field_for_payload: PayloadField = "Bytea"
    engine: str = "owned"
    driver: str = "asyncpg"

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def table_name(self) -> str:
        """The table of these types."""
        return f"results_{self.field_for_task_id}_{self.field_for_payload}"


# Every two values of two dimensions meet.
COMBINATIONS = [
    Combination("VarChar", "Bytea", "owned", "asyncpg"),
    Combination("VarChar", "Jsonb", "borrowed", "psycopg"),
    Combination("Text", "Bytea", "borrowed", "psycopg"),
    Combination("Text", "Jsonb", "owned", "asyncpg"),
    Combination("Uuid", "Bytea", "owned", "psycopg"),
    Combination("Uuid", "Jsonb", "borrowed", "asyncpg"),
]
DRIVERS = [Combination(driver="asyncpg"), Combination(driver="psycopg")]
ANY_TEXT_ID = COMBINATIONS[:4]
UUID_IDS = COMBINATIONS[4:]


@pytest.fixture(scope="module")
def tables(new_database: NewDatabase) -> Iterator[Database]:
    """A schema with a results table of every type, which the tests share: their task ids differ."""
    database = new_database()

    async def make() -> None:
        await database.create()
        for combination in COMBINATIONS:
            backend = new_backend(database, combination, run_migrations=True)
            await backend.startup()
            await backend.shutdown()

    asyncio.run(make())
    yield database
    asyncio.run(database.drop())


def new_backend(database: Database, combination: Combination, **kwargs: Any) -> Backend:
    return Backend(
        database.dsn_of(combination.driver),
        table_name=combination.table_name,
        field_for_task_id=combination.field_for_task_id,
        field_for_payload=combination.field_for_payload,
        **kwargs,
    )


@pytest.fixture(params=COMBINATIONS, ids=str)
async def backend(tables: Database, request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    """A started backend, of each combination; at the end it holds no connection."""
    combination: Combination = request.param
    owner = new_backend(tables, combination, check_schema="off")
    await owner.startup()
    engine = engine_of(owner)
    backend = owner
    if combination.engine == "borrowed":
        backend = Backend(engine=engine, models=owner.models)
        await backend.startup()
    yield backend
    await backend.shutdown()
    assert_nothing_checked_out(engine)
    await owner.shutdown()


async def test_a_result_is_ready_once_it_is_stored(backend: Backend) -> None:
    task_id = new_id()
    assert await backend.is_result_ready(task_id) is False
    await backend.set_result(task_id, result_of(None))
    assert await backend.is_result_ready(task_id) is True
    assert await backend.is_result_ready(new_id()) is False


async def test_a_result_comes_back_as_often_as_it_is_asked_for(backend: Backend) -> None:
    task_id = new_id()
    value = {"rows": [1, 2.5, None, True, "ü€'\"\\%s"], "empty": {}}
    labels = {"queue": "slow", "priority": 3, "nested": {"a": [1]}}
    await backend.set_result(task_id, result_of(value, labels=labels))
    for _ in range(2):
        result = await backend.get_result(task_id)
        assert result.return_value == value
        assert result.labels == labels
        assert (result.is_err, result.error, result.log) == (False, None, None)
        assert result.execution_time == 0.25


async def test_an_error_comes_back_as_the_exception_it_was(backend: Backend) -> None:
    task_id = new_id()
    failure = result_of(None, is_err=True, error=ValueError("no", 7))
    await backend.set_result(task_id, failure)
    result = await backend.get_result(task_id)
    assert result.is_err is True
    assert isinstance(result.error, ValueError)
    assert result.error.args == ("no", 7)
    with pytest.raises(ValueError, match="no"):
        result.raise_for_error()


async def test_the_log_comes_only_with_logs(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1, log="line\nline"))
    assert (await backend.get_result(task_id)).log is None
    assert (await backend.get_result(task_id, with_logs=True)).log == "line\nline"
    assert (await backend.get_results([task_id], with_logs=True))[task_id].log == "line\nline"


async def test_a_result_of_an_equal_or_later_attempt_overwrites(backend: Backend) -> None:
    task_id = new_id()
    stored = []
    for attempt, value in ((None, 1), (None, 2), (1, 3), ("1", 4), (3, 5), (2, 6), (None, 7)):
        labels = {} if attempt is None else {"_retries": attempt}
        await backend.set_result(task_id, result_of(value, labels=labels, log=str(value)))
        result = await backend.get_result(task_id, with_logs=True)
        assert result.log == str(result.return_value)
        stored.append(result.return_value)
    assert stored == [1, 2, 3, 4, 5, 5, 5]


async def test_results_that_are_not_stored_are_told(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [new_id() for _ in range(9)]

    async def told_of(attempt: int, task_ids: list[str]) -> list[str]:
        caplog.clear()
        result = result_of(attempt, labels={"_retries": attempt})
        await asyncio.gather(*[backend.set_result(i, result) for i in (*task_ids, new_id())])
        return [text for text in caplog.messages if "of a later attempt or message" in text]

    assert await told_of(1, ids) == []
    [text] = await told_of(0, ids[:1])
    assert text.startswith("1 results")
    assert text.endswith(
        f"later attempt or message: {uuid.UUID(ids[0]) if uuids_in(backend) else ids[0]}"
    )
    texts = await told_of(0, ids)
    assert sum(int(text.partition(" ")[0]) for text in texts) == 9
    assert texts[-1].endswith(", ...")


def uuids_in(backend: Backend) -> bool:
    return backend.models.config.field_for_task_id == "Uuid"


async def test_overwriting_replaces_every_field(backend: Backend) -> None:
    task_id = new_id()
    failure = result_of(1, is_err=True, error=ValueError("no"), log="log", labels={"a": 1})
    await backend.set_result(task_id, failure)
    await backend.set_result(task_id, result_of(2, execution_time=9.0))
    result = await backend.get_result(task_id, with_logs=True)
    assert (result.is_err, result.error, result.log, result.labels) == (False, None, None, {})
    assert (result.return_value, result.execution_time) == (2, 9.0)


async def test_get_results_returns_those_that_are_ready(backend: Backend) -> None:
    first, second, unknown, progressing = (new_id() for _ in range(4))
    await backend.set_result(first, result_of(1))
    await backend.set_result(second, result_of(2))
    await backend.set_progress(progressing, progress_of(None, TaskState.STARTED))
    results = await backend.get_results([first, unknown, second, first, progressing, second])
    assert {i: r.return_value for i, r in results.items()} == {first: 1, second: 2}
    assert await backend.get_results([unknown]) == {}
    assert await backend.get_results(iter([])) == {}


async def test_a_missing_result_is_an_error_that_names_it(backend: Backend) -> None:
    task_id = new_id()
    with pytest.raises(ResultIsMissingError) as caught:
        await backend.get_result(task_id)
    assert task_id in str(caught.value)
    assert backend.models.config.table_name in str(caught.value)


async def test_progress_makes_no_task_ready_and_outlives_its_result(backend: Backend) -> None:
    task_id = new_id()
    assert await backend.get_progress(task_id) is None
    await backend.set_progress(task_id, progress_of({"done": 1}, TaskState.STARTED))
    assert await backend.is_result_ready(task_id) is False
    with pytest.raises(ResultIsMissingError):
        await backend.get_result(task_id)
    await backend.set_result(task_id, result_of(1))
    assert await backend.get_progress(task_id) == progress_of({"done": 1}, TaskState.STARTED)
    await backend.set_progress(task_id, progress_of({"done": 2}, TaskState.SUCCESS))
    assert await backend.get_progress(task_id) == progress_of({"done": 2}, TaskState.SUCCESS)
    assert (await backend.get_result(task_id)).return_value == 1


async def test_progress_is_replaced_and_not_merged(backend: Backend) -> None:
    task_id = new_id()
    for state, meta in (
        (TaskState.STARTED, {"done": 1, "of": 9}),
        ("halfway", {"done": 5}),
        ("halfway", ["a", "list"]),
        (TaskState.FAILURE, None),
        (TaskState.RETRY, 0),
    ):
        await backend.set_progress(task_id, progress_of(meta, state))
        assert await backend.get_progress(task_id) == progress_of(meta, state)


async def test_a_result_kept_once_is_deleted_as_it_is_read(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    engine = engine_of(backend)
    once = Backend(engine=engine, keep_results=False, models=backend.models)
    await once.startup()
    assert await once.is_result_ready(task_id)
    assert (await once.get_result(task_id)).return_value == 1
    assert not await backend.is_result_ready(task_id)
    with pytest.raises(ResultIsMissingError):
        await once.get_result(task_id)
    await once.shutdown()


@pytest.mark.parametrize("backend", DRIVERS, indirect=True, ids=str)
@pytest.mark.parametrize("keep_results", [True, False])
async def test_get_results_takes_any_number_of_ids(backend: Backend, keep_results: bool) -> None:
    task_ids = [new_id() for _ in range(450)]  # more than two statements take
    stored = task_ids[::2]
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in stored])
    reader = Backend(engine=engine_of(backend), keep_results=keep_results, models=backend.models)
    await reader.startup()
    results = await reader.get_results(i for i in [*task_ids, *task_ids])
    assert {i: r.return_value for i, r in results.items()} == {i: i for i in stored}
    assert len(await backend.get_results(stored)) == (len(stored) if keep_results else 0)


ODD_IDS = [
    "",
    " ",
    "order-42",
    "ünï€🙂",
    'it\'s "quoted" `so`',
    "100%",
    "%s %(task_id)s :task_id $1 {x} \\",
    "a,b}{NULL",
    "NULL",
    "line\r\nline\ttab\x01",
    "'; DROP TABLE results; --",
    "x" * 2000,
    "é" * 1_346,
]


@pytest.mark.parametrize("backend", ANY_TEXT_ID, indirect=True, ids=str)
async def test_any_text_can_be_a_task_id(backend: Backend) -> None:
    await asyncio.gather(*[backend.set_result(i, result_of(i)) for i in ODD_IDS])
    await asyncio.gather(*[backend.set_progress(i, progress_of(i)) for i in ODD_IDS])
    for task_id in ODD_IDS:
        assert await backend.is_result_ready(task_id)
        assert (await backend.get_result(task_id)).return_value == task_id
        assert await backend.get_progress(task_id) == progress_of(task_id)
    results = await backend.get_results(ODD_IDS)
    assert {i: r.return_value for i, r in results.items()} == {i: i for i in ODD_IDS}


@pytest.mark.parametrize("backend", UUID_IDS, indirect=True, ids=str)
async def test_a_uuid_is_one_task_id_however_it_is_written(backend: Backend) -> None:
    task_id = uuid.uuid4()
    await backend.set_result(task_id.hex, result_of(1))
    spellings = [task_id.hex, str(task_id), str(task_id).upper()]
    for written in spellings:
        assert await backend.is_result_ready(written)
    assert list(await backend.get_results(spellings)) == spellings


@pytest.mark.parametrize(
    ("backend", "task_id"),
    [
        (Combination(), "a\x00b"),
        (Combination(), "\ud800"),
        (Combination(), 7),
        (Combination("Uuid"), "order-42"),
        (Combination("Uuid"), ""),
    ],
    indirect=["backend"],
    ids=str,
)
async def test_an_id_that_no_column_holds_is_refused_before_any_statement(
    backend: Backend, task_id: Any
) -> None:
    statements: list[str] = []

    @event.listens_for(engine_of(backend).sync_engine, "before_cursor_execute")
    def count(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    for call in (
        backend.set_result(task_id, result_of(1)),
        backend.is_result_ready(task_id),
        backend.get_result(task_id),
        backend.get_results([new_id(), task_id]),
        backend.set_progress(task_id, progress_of(1)),
        backend.get_progress(task_id),
    ):
        with pytest.raises(InvalidTaskIdError) as caught:
            await call
        assert repr(task_id) in str(caught.value)
    assert statements == []
    await backend.is_result_ready(new_id())
    assert len(statements) == 1


async def test_one_id_where_several_are_expected_is_refused() -> None:
    backend = Backend("postgresql://")
    with pytest.raises(TypeError, match=r"several tasks, not one str"):
        await backend.get_results("order-42")


async def test_two_backends_share_one_engine_and_keep_to_their_tables(tables: Database) -> None:
    engine = make_engine(tables.dsn, pool_size=1)
    first, second = (
        Backend(engine=engine, table_name=f"results_VarChar_{payload}", field_for_payload=payload)
        for payload in ("Bytea", "Jsonb")
    )
    await first.startup()
    await second.startup()
    task_id = new_id()
    await first.set_result(task_id, result_of("first"))
    await second.set_progress(task_id, progress_of(2))
    assert not await second.is_result_ready(task_id)
    assert await first.get_progress(task_id) is None
    await first.shutdown()
    await second.set_result(task_id, result_of("second"))
    assert (await second.get_result(task_id)).return_value == "second"
    await second.shutdown()
    await engine.dispose()
