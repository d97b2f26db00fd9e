"""wait_result(): woken by a notification, or by the regular look; by whoever it was stored."""

import asyncio
import uuid
from typing import Annotated, Any, NamedTuple

import pytest
from pydantic import BaseModel, BeforeValidator
from taskiq import AsyncTaskiqTask

from taskiq_sa_pg import InvalidTaskIdError, ResultIsMissingError, TaskStatus
from taskiq_sa_pg.timings import Timings
from tests.conftest import eventually
from tests.integration.waiters import (
    SOON,
    Backends,
    counted_fetches,
    heard_by,
    insert,
    until_healthy,
    until_waiting,
    waiters_of,
)
from tests.tasks import new_id, progress_of, result_of


class Order(BaseModel):
    number: int


async def test_a_result_that_is_there_comes_at_once(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    await backend.set_result(task_id, result_of({"rows": [1, "ü"]}, labels={"queue": "slow"}))
    for _ in range(2):
        with counted_fetches() as fetches:
            result = await backend.wait_result(task_id, timeout=0)
        assert (result.return_value, result.labels) == ({"rows": [1, "ü"]}, {"queue": "slow"})
        assert len([purpose for purpose in fetches if "read" in purpose]) == 1


@pytest.mark.usefixtures("blind")
async def test_a_notification_wakes_who_waits(each_driver: Backends) -> None:
    waiter, worker = await each_driver.start(), await each_driver.start()
    task_id = new_id()
    waiting = asyncio.create_task(waiter.wait_result(task_id, timeout=SOON))
    await until_healthy(waiter)
    await until_waiting(waiter)
    await worker.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7


@pytest.mark.parametrize("stores", ["waiter", "asyncpg", "psycopg"])
@pytest.mark.usefixtures("blind")
async def test_it_does_not_matter_who_stores(each_driver: Backends, stores: str) -> None:
    waiter = await each_driver.start()
    worker = waiter if stores == "waiter" else await each_driver.start(driver=stores)
    task_ids = [new_id() for _ in range(50)]
    waiting = [asyncio.create_task(waiter.wait_result(i, timeout=SOON)) for i in task_ids]
    await until_healthy(waiter)
    await until_waiting(waiter, 50)
    await asyncio.gather(*[worker.set_result(i, result_of(i)) for i in task_ids])
    assert [(await w).return_value for w in waiting] == task_ids


class Combination(NamedTuple):
    field_for_task_id: str
    driver: str
    is_borrowed: bool


# Each kind, driver and engine with each of the others.
COMBINATIONS = [
    Combination("VarChar", "asyncpg", is_borrowed=False),
    Combination("VarChar", "psycopg", is_borrowed=True),
    Combination("Text", "asyncpg", is_borrowed=True),
    Combination("Text", "psycopg", is_borrowed=False),
    Combination("Uuid", "asyncpg", is_borrowed=False),
    Combination("Uuid", "psycopg", is_borrowed=True),
]


@pytest.mark.parametrize(
    "combination",
    COMBINATIONS,
    ids=lambda c: f"{c.field_for_task_id}-{c.driver}-{'borrowed' if c.is_borrowed else 'owned'}",
)
@pytest.mark.usefixtures("blind")
async def test_every_kind_of_table_driver_and_engine_wakes(
    backends: Backends, combination: Combination
) -> None:
    backend = await backends.start(**combination._asdict())
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    await backend.set_result(task_id, result_of("stored"))
    assert (await waiting).return_value == "stored"


ODD_IDS = {
    "empty": "",
    "space": " ",
    "quotes": "a'b\"c`d\\",
    "newlines": "one\r\ntwo\ttab\x1f\x7f\u2028",
    "json": '["task", 1]',
    "probe": '{"probe": "0"}',
    "null": "null",
    "placeholders": "%s %(task_id)s :task_id $1 {}",
    "unicode": "Zürich-任務-🦆-\u202e-e\u0301",
    "longest": "ü" * 1_346,
    # In JSON six bytes each, and a payload has 7,999.
    "just-fits": "\x01" * 1_332 + "y" * 3,
    "just-too-long": "\x02" * 1_332 + "y" * 4,
    "escapes": "\x03" * 2_692,
}


@pytest.mark.parametrize("kind", ["VarChar", "Text"])
async def test_ids_of_any_content_and_length_wake(backends: Backends, kind: str) -> None:
    """By a notification, which for the longest asks for a look: nobody looks on his own."""
    timings = Timings(between_looks=1000)
    backend = await backends.start(field_for_task_id=kind, timings=timings)
    with counted_fetches() as fetches:
        async with heard_by(backend):

            async def has_looked_for_the_last_time() -> bool:
                return sum("look for results" in purpose for purpose in fetches) == 2

            await eventually(has_looked_for_the_last_time)
            for name, text in ODD_IDS.items():
                waiting = asyncio.create_task(backend.wait_result(text, timeout=SOON))
                await until_waiting(backend, 2)
                await backend.set_result(text, result_of(name))
                assert (await waiting).return_value == name


@pytest.mark.usefixtures("blind")
async def test_all_spellings_of_a_uuid_wake(each_driver: Backends) -> None:
    backend = await each_driver.start(field_for_task_id="Uuid")
    task_id = uuid.uuid4()
    spellings = [str(task_id), task_id.hex.upper(), task_id.urn, f"{{{task_id}}}"]
    waiting = [asyncio.create_task(backend.wait_result(s, timeout=SOON)) for s in spellings]
    await until_healthy(backend)
    await until_waiting(backend, len(spellings))
    await backend.set_result(task_id.hex, result_of(7))
    assert [(await w).return_value for w in waiting] == [7] * len(spellings)


class Id(str):
    """One that prints itself in another way."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"Id({super().__str__()})"


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("waiter", [Id, str])
async def test_an_id_of_a_subclass_wakes_as_a_plain_one(
    backends: Backends, waiter: type[str]
) -> None:
    backend = await backends.start()
    text = new_id()
    async with heard_by(backend):
        waiting = asyncio.create_task(backend.wait_result(waiter(text), timeout=SOON))
        await until_waiting(backend, 2)
        await backend.set_result(text if waiter is Id else Id(text), result_of(7))
        assert (await waiting).return_value == 7


@pytest.mark.usefixtures("blind")
async def test_a_uuid_may_be_given_as_one(backends: Backends) -> None:
    """As rows and asyncpg have it, whose class is another; every method takes it."""
    backend = await backends.start(field_for_task_id="Uuid")
    task_id = uuid.uuid4()
    [row] = await backends.database.fetch("SELECT $1::uuid AS id", task_id)
    assert await backend.get_status(task_id) == TaskStatus(str(task_id), "unknown")
    async with heard_by(backend):
        waiting = [
            asyncio.create_task(backend.wait_result(task_id, timeout=SOON)),
            asyncio.create_task(backend.wait_results([row["id"]], timeout=SOON)),
        ]
        await until_waiting(backend, 3)
        await backend.set_progress(task_id, progress_of(5))
        await backend.set_result(row["id"], result_of(7))
        assert (await waiting[0]).return_value == (await waiting[1])[0].return_value == 7
    assert await backend.is_result_ready(task_id)
    assert (await backend.get_result(task_id.hex)).return_value == 7
    assert (await backend.get_progress(task_id)).meta == 5
    assert [meta async for meta in backend.watch_progress(task_id)] == [progress_of(5)]
    assert list(await backend.get_results([task_id])) == [task_id]
    assert [i async for i, _ in backend.as_completed([task_id])] == [task_id]
    assert await backend.forget([task_id]) == 1
    with pytest.raises(ResultIsMissingError):
        await backend.get_result(task_id)


async def test_ids_that_the_column_cannot_hold_are_refused(backends: Backends) -> None:
    for kind, task_id in (("Uuid", "no uuid"), ("Text", "a\x00b"), ("VarChar", "\ud800")):
        backend = await backends.start(field_for_task_id=kind)
        with pytest.raises(InvalidTaskIdError):
            await backend.wait_result(task_id)


OFTEN = Timings(between_looks=0.05)


@pytest.mark.usefixtures("deaf")
async def test_a_lost_notification_is_made_up_for_by_the_look(each_driver: Backends) -> None:
    backend = await each_driver.start(timings=OFTEN)
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    await backend.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7


@pytest.mark.parametrize("stores", ["sql", "silent"])
async def test_what_nobody_notified_is_found_by_the_look(
    each_driver: Backends, stores: str
) -> None:
    backend = await each_driver.start(timings=OFTEN)
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_healthy(backend)
    await until_waiting(backend)
    if stores == "sql":
        await insert(each_driver.database, task_id, "there")
    else:
        silent = await each_driver.start(notify=False)
        await silent.set_result(task_id, result_of("there"))
    assert (await waiting).return_value == "there"


async def test_without_notifications_waiting_looks_ten_times_a_second(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start(notify=False, timings=Timings(between_looks=1000))
    task_id = new_id()
    waiting = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
    await until_waiting(backend)
    await backend.set_result(task_id, result_of(7))
    assert (await waiting).return_value == 7


@pytest.mark.parametrize("notify", [True, False], ids=["notify", "silent"])
async def test_looks_that_fail_are_warned_of_once_and_made_again(
    each_driver: Backends, caplog: pytest.LogCaptureFixture, notify: bool
) -> None:
    table = f"table_{new_id()}"
    timings = Timings(between_looks=0.02, between_unheard_looks=0.02)
    backend = await each_driver.start(
        table_name=table, run_migrations=True, notify=notify, timings=timings
    )
    waiting = asyncio.create_task(backend.wait_result("late", timeout=SOON))
    await until_waiting(backend)
    await each_driver.database.fetch(f"ALTER TABLE {table} RENAME TO {table}_away")
    with counted_fetches() as fetches:

        async def have_failed() -> bool:
            return len(fetches) >= 3

        await eventually(have_failed)
    await each_driver.database.fetch(f"ALTER TABLE {table}_away RENAME TO {table}")
    await backend.set_result("late", result_of(7))
    assert (await waiting).return_value == 7
    assert caplog.text.count("polling for results failed, waiting clients keep waiting") == 1


async def test_a_thousand_waiters_share_one_statement_a_look(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three seconds apart, that is one statement in three seconds; five a second are allowed."""
    backend = await each_driver.start(timings=OFTEN)
    waiting = [asyncio.create_task(backend.wait_result(new_id())) for _ in range(1000)]
    await until_healthy(backend)
    await until_waiting(backend, 1000)
    looks = 0
    look = waiters_of(backend).look

    async def count() -> None:
        nonlocal looks
        await look()
        looks += 1

    monkeypatch.setattr(waiters_of(backend), "look", count)
    with counted_fetches() as fetches:

        async def has_looked_twice() -> bool:
            return looks == 2

        await eventually(has_looked_twice)
        assert len(fetches) <= looks + 1
    for waiter in waiting:
        waiter.cancel()
    await asyncio.wait(waiting)


async def test_a_task_gets_its_declared_return_type(backends: Backends) -> None:
    backend = await backends.start()
    right, wrong, failed = new_id(), new_id(), new_id()
    await backend.set_result(right, result_of({"number": 7}))
    await backend.set_result(wrong, result_of("no order"))
    error = ValueError("no", 7)
    await backend.set_result(failed, result_of(None, is_err=True, error=error))

    async def wait(task_id: str, return_type: Any = Order) -> Any:
        task: AsyncTaskiqTask[Any] = AsyncTaskiqTask(task_id, backend, return_type)
        return await backend.wait_result(task, timeout=0)

    assert (await wait(right)).return_value == Order(number=7)
    assert (await wait(right, None)).return_value == {"number": 7}
    assert (await backend.wait_result(right, timeout=0)).return_value == {"number": 7}
    assert (await wait(wrong)).return_value == "no order"
    result = await wait(failed)
    assert (result.is_err, result.return_value, result.error.args) == (True, None, error.args)
    with pytest.raises(ValueError, match="no"):
        result.raise_for_error()


class Odd:
    """pydantic has no schema for it."""


def refuse(_: Any) -> None:
    raise RuntimeError("refused")


UNUSABLE = {
    "no schema": Odd,
    "a validator that raises": Annotated[Any, BeforeValidator(refuse)],
    "no hash": Annotated[int, []],
}


@pytest.mark.parametrize("kind", UNUSABLE.values(), ids=UNUSABLE)
async def test_a_return_type_that_cannot_be_restored_loses_no_result(
    backends: Backends, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await backends.start(keep_results=False)
    tasks: list[AsyncTaskiqTask[Any]] = [AsyncTaskiqTask(new_id(), backend, kind) for _ in "ab"]
    for wait in (
        backend.wait_results,
        lambda tasks: asyncio.gather(*map(backend.wait_result, tasks)),
    ):
        for task in tasks:
            await backend.set_result(task.task_id, result_of(7))
        assert [result.return_value for result in await wait(tasks)] == [7, 7]
    await backend.set_result(tasks[0].task_id, result_of(7))
    assert (await backend.get_result(tasks[0].task_id, return_type=kind)).return_value == 7
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if tasks[0].task_id in text]) == 3


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_the_log_comes_only_with_logs(backends: Backends, keep_results: bool) -> None:
    backend = await backends.start(keep_results=keep_results)
    for with_logs, log in ((False, None), (True, "line\nline")):
        task_id = new_id()
        await backend.set_result(task_id, result_of(1, log="line\nline"))
        result = await backend.wait_result(task_id, SOON, with_logs)
        assert result.log == log
        assert await backend.is_result_ready(task_id) is keep_results


@pytest.mark.parametrize("task", [None, 5, b"x"])
async def test_what_is_neither_a_task_nor_an_id_is_refused(backends: Backends, task: Any) -> None:
    backend = await backends.start()
    with pytest.raises(InvalidTaskIdError):
        await backend.wait_result(task)
    with pytest.raises(InvalidTaskIdError):
        await backend.wait_results([task])
