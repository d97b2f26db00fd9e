"""Which statements go straight to asyncpg, past SQLAlchemy, and that the others do not stay."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncConnection

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.database import Database as Connected
from tests.conftest import BackendFactory, Database, eventually
from tests.integration.databases import Databases, address, session_of
from tests.tasks import progress_of, result_of

NUMBERS = sa.select(sa.func.generate_series(1, 5).column_valued("number"))
NUMBER = NUMBERS.selected_columns[0]
AT_LEAST = NUMBERS.where(sa.bindparam("least", type_=sa.Integer) <= NUMBER)


class Executions:
    """Counts the statements that SQLAlchemy executes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        execute = AsyncConnection.execute

        async def counting(connection: AsyncConnection, *args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return await execute(connection, *args, **kwargs)

        monkeypatch.setattr(AsyncConnection, "execute", counting)


@pytest.fixture
def executions(monkeypatch: pytest.MonkeyPatch) -> Executions:
    return Executions(monkeypatch)


@pytest.fixture
async def opened(database: Database) -> AsyncIterator[Connected]:
    databases = Databases(address(database, "asyncpg"))
    yield await databases.open(max_connections=1)
    await databases.close()


async def values_of(opened: Connected, statement: Any, **parameters: Any) -> list[Any]:
    return [value for (value,) in await opened.fetch(statement, parameters, "ask")]


STATEMENTS: dict[str, tuple[Any, dict[str, Any], list[Any]]] = {
    "no values": (NUMBERS, {}, [1, 2, 3, 4, 5]),
    "a parameter": (AT_LEAST, {"least": 4}, [4, 5]),
    "a limit": (NUMBERS.limit(1), {}, [1]),
    "a limit and a parameter": (AT_LEAST.limit(1), {"least": 3}, [3]),
    "a text": (sa.select(sa.literal("it's")), {}, ["it's"]),
    "a text to compare with": (NUMBERS.where(sa.cast(NUMBER, sa.Text) == "2"), {}, [2]),
    "an array": (sa.select(sa.literal([2, 3], ARRAY(sa.Integer))), {}, [[2, 3]]),
    "a value that its type converts": (
        sa.select(sa.cast(sa.literal({"a": [1]}, JSONB), sa.Text)),
        {},
        ['{"a": [1]}'],
    ),
    "a value that the parameters replace": (
        sa.select(sa.bindparam("word", "own", sa.Text)),
        {"word": "given"},
        ["given"],
    ),
}


@pytest.mark.parametrize("name", STATEMENTS)
async def test_a_statement_with_values_of_its_own_stays_past_sqlalchemy(
    name: str, opened: Connected, executions: Executions
) -> None:
    statement, parameters, expected = STATEMENTS[name]
    for _ in range(2):  # compiled, and known
        assert await values_of(opened, statement, **parameters) == expected
    assert executions.number == 0


def table_with_a_default() -> tuple[sa.Table, list[int]]:
    """A table of which SQLAlchemy has to call a function for each row, and its answers."""
    answers: list[int] = []

    def answer() -> int:
        answers.append(len(answers))
        return answers[-1]

    columns = (
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("own", sa.Integer, default=answer),
    )
    return sa.Table("with_default", sa.MetaData(), *columns), answers


async def test_after_a_statement_that_sqlalchemy_completes_the_next_goes_past_it_again(
    opened: Connected, database: Database, executions: Executions
) -> None:
    table, answers = table_with_a_default()
    await database.fetch("CREATE TABLE with_default (id int PRIMARY KEY, own int)")
    one = sa.insert(table).values(id=sa.bindparam("number"))
    two = sa.insert(table).values([{"id": sa.bindparam("a")}, {"id": sa.bindparam("b")}])
    session = await session_of(opened)
    for number in (1, 2):
        await opened.fetch(one, {"number": number}, "store")
        assert executions.number == number
        assert await session_of(opened) == session
        assert executions.number == number
    await opened.fetch(two, {"a": 3, "b": 4}, "store")
    assert executions.number == 3
    # In AUTOCOMMIT, as all the others: everybody sees them.
    rows = await database.fetch("SELECT id, own FROM with_default ORDER BY id")
    assert list(map(tuple, rows)) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert answers == [0, 1, 2, 3]
    assert await session_of(opened) == session


async def test_an_in_works_and_its_neighbours_go_past_sqlalchemy(
    opened: Connected, executions: Executions
) -> None:
    expanding = NUMBERS.where(NUMBER.in_(sa.bindparam("chosen", expanding=True)))
    for number, (statement, parameters, expected) in enumerate(
        [
            (NUMBERS.where(NUMBER.in_([2, 4])), {}, [2, 4]),
            (NUMBERS.where(NUMBER.in_([])), {}, []),
            (NUMBERS.where(NUMBER.not_in([1, 2])).limit(1), {}, [3]),
            (expanding, {"chosen": [5]}, [5]),
            (expanding, {"chosen": [1, 2]}, [1, 2]),
        ],
        start=1,
    ):
        assert await values_of(opened, statement, **parameters) == expected
        assert await values_of(opened, NUMBERS.limit(1)) == [1]
        assert executions.number == number


@pytest.mark.parametrize(
    ("statement", "parameters", "said"),
    [
        (sa.select(1 / sa.bindparam("n", type_=sa.Integer)), {"n": 0}, "division by zero"),
        (sa.select(sa.bindparam("n", type_=JSONB)), {"n": object()}, "not JSON serializable"),
        (NUMBERS.where(NUMBER.in_([1]), 1 / (NUMBER - 1) == 1), {}, "division by zero"),
    ],
    ids=["refused", "no value of its type", "through SQLAlchemy"],
)
async def test_after_an_error_the_connection_is_still_of_use(
    statement: Any,
    parameters: dict[str, Any],
    said: str,
    opened: Connected,
    executions: Executions,
) -> None:
    session = await session_of(opened)
    with pytest.raises(StorageError, match=f"cannot ask: .*{said}"):
        await opened.fetch(statement, parameters, "ask")
    number = executions.number
    assert await session_of(opened) == session
    assert executions.number == number


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "through SQLAlchemy"])
async def test_a_value_that_the_driver_cannot_encode_leaves_no_transaction_open(
    opened: Connected, database: Database, is_direct: bool
) -> None:
    """Else it would hold its locks until the connection is used again."""
    await database.fetch("CREATE TABLE numbers (number int, other int)")
    other = sa.Column("other", sa.Integer, default=None if is_direct else lambda: 1)
    numbers = sa.Table("numbers", sa.MetaData(), sa.Column("number", sa.Integer), other)
    statement = sa.insert(numbers).values(number=sa.bindparam("value"))
    with pytest.raises(StorageError, match="invalid input"):
        await opened.fetch(statement, {"value": "no number"}, "ask")

    async def none_is_open() -> bool:
        return not await database.fetch(
            "SELECT FROM pg_stat_activity "
            "WHERE application_name = 'ours' AND xact_start IS NOT NULL"
        )

    await eventually(none_is_open)


async def test_a_connection_whose_statement_was_cancelled_is_not_used_again(
    opened: Connected, database: Database
) -> None:
    """Nobody knows what of its answer is still to come."""
    call = asyncio.create_task(opened.fetch(sa.select(sa.func.pg_sleep(60)), {}, "sleep"))
    asleep: list[Any] = []

    async def is_asleep() -> bool:
        asleep[:] = await database.fetch(
            "SELECT pid FROM pg_stat_activity "
            "WHERE application_name = 'ours' AND wait_event = 'PgSleep'"
        )
        return bool(asleep)

    await eventually(is_asleep)
    call.cancel()
    await asyncio.wait([call])
    assert await session_of(opened) != asleep[0]["pid"]


async def test_what_a_backend_does_all_day_goes_past_sqlalchemy(
    start_backend: BackendFactory, executions: Executions
) -> None:
    backend = await start_backend(
        run_migrations=True, track="started", progress_ttl=60, result_ttl=60, notify=False
    )
    executions.number = 0
    await backend.set_result("a", result_of(1))
    await backend.set_progress("a", progress_of(1))
    assert await backend.is_result_ready("a")
    assert (await backend.get_result("a")).return_value == 1
    assert (await backend.get_progress("a")).meta == 1
    assert (await backend.get_status("a")).state == "succeeded"
    await backend.get_running()
    assert await backend.forget(["a"]) == 1
    assert executions.number == 0


async def test_with_psycopg_every_statement_goes_through_sqlalchemy(
    database: Database, executions: Executions
) -> None:
    databases = Databases(address(database, "psycopg"))
    opened = await databases.open()
    for number in (1, 2, 3):
        assert await values_of(opened, NUMBERS.limit(1)) == [1]
        assert executions.number == number
    await databases.close()
