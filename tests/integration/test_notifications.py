"""What is sent after a commit, as any client of PostgreSQL hears it; and what others may send."""

import asyncio
import json
from typing import Any

import pytest

from taskiq_sa_pg import StorageError
from taskiq_sa_pg.database.engine import keep_notifications
from taskiq_sa_pg.timings import Timings
from taskiq_sa_pg.waiting import Waiters
from tests.conftest import engine_of, eventually
from tests.integration.waiters import (
    SOON,
    Backends,
    channel_of,
    heard_by,
    listener_of,
    overheard,
    table_of,
    until_waiting,
)
from tests.tasks import new_id, progress_of, result_of

Heard = list[tuple[str, str]]


async def until_heard(heard: Heard, number: int) -> list[str]:
    """The ids that were told, once there are so many."""

    def ids() -> list[str]:
        return [i for _, payload in heard if payload[0] == "[" for i in json.loads(payload)]

    async def are_heard() -> bool:
        return len(ids()) >= number

    await eventually(are_heard)
    return ids()


async def test_results_and_progress_are_told_on_channels_named_after_their_tables(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start()
    channel = channel_of(each_driver.database)
    ids = [f"{new_id()}-ü\"'\n" for _ in range(2)]
    async with overheard(each_driver.database, channel, f"{channel}_progress") as heard:
        await backend.set_result(ids[0], result_of(1))
        await until_heard(heard, 1)
        await backend.set_progress(ids[1], progress_of(1))
        await until_heard(heard, 2)
    assert [(channel, json.loads(payload)) for channel, payload in heard] == [
        (channel, [ids[0]]),
        (f"{channel}_progress", [ids[1]]),
    ]


async def test_the_default_channel_is_no_other_package_s(backends: Backends) -> None:
    backend = await backends.start(table_name="taskiq_results", run_migrations=True)
    task_id = new_id()
    channel = "taskiq_sa_pg.taskiq_results"
    async with overheard(backends.database, channel, "taskiq_results") as heard:
        await backend.set_result(task_id, result_of(1))

        async def is_told() -> bool:
            return (channel, f'["{task_id}"]') in heard

        await eventually(is_told)
    # Of every other test's backends on this channel too.
    assert {told_on for told_on, _ in heard} == {channel}


async def test_uuids_are_told_in_their_usual_spelling(each_driver: Backends) -> None:
    backend = await each_driver.start(field_for_task_id="Uuid")
    spelling = "{A0EEBC99-9C0B4EF8BB6D6BB9BD380A11}"
    async with overheard(each_driver.database, channel_of(each_driver.database, "Uuid")) as heard:
        await backend.set_result(spelling, result_of(1))
        assert await until_heard(heard, 1) == ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]


async def test_many_results_share_few_notifications_and_each_is_told_once(
    each_driver: Backends,
) -> None:
    backend = await each_driver.start()
    ids = [new_id() for _ in range(1_000)]
    async with overheard(each_driver.database, channel_of(each_driver.database)) as heard:
        await asyncio.gather(*[backend.set_result(i, result_of(1)) for i in ids])
        assert sorted(await until_heard(heard, len(ids))) == sorted(ids)
    assert len(heard) < 20


@pytest.mark.parametrize(("at_once", "pauses"), [(1, (0, 3600)), (2, (3600, 0))])
async def test_the_pause_after_one_id_is_another_than_after_several(
    at_once: int, pauses: tuple[int, int], backends: Backends
) -> None:
    """The one in the way would last an hour."""
    timings = Timings(after_notification=pauses[0], after_notifications=pauses[1])
    notifier = (await backends.start(timings=timings)).runtime.notifier
    channel = channel_of(backends.database)
    ids = [new_id() for _ in range(3 * at_once)]
    async with overheard(backends.database, channel) as heard:
        for start in range(0, len(ids), at_once):
            notifier.announce(channel, ids[start : start + at_once])
            assert await until_heard(heard, start + at_once) == ids[: start + at_once]


async def test_what_is_told_is_committed(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[asyncio.Task[bool]] = []

    def check(_waiters: Waiters, _channel: str, payload: str) -> None:
        checks.extend(asyncio.create_task(reader.is_result_ready(i)) for i in json.loads(payload))

    monkeypatch.setattr(Waiters, "hear", check)
    backend, reader = [await each_driver.start() for _ in range(2)]
    async with heard_by(reader):
        for _ in range(20):
            await asyncio.gather(*[backend.set_result(new_id(), result_of(1)) for _ in range(5)])

        async def are_all_heard() -> bool:
            return len(checks) == 100

        await eventually(are_all_heard)
        assert set(await asyncio.gather(*checks)) == {True}


async def test_what_is_not_stored_is_not_told(each_driver: Backends) -> None:
    backend = await each_driver.start()
    database = each_driver.database
    tables = [table_of(database), f"{table_of(database)}_progress"]
    for table in tables:
        await database.fetch(f"ALTER TABLE \"{table}\" ADD CHECK (task_id <> 'unwanted')")
    task_id = new_id()
    channel = channel_of(database)
    async with overheard(database, channel, f"{channel}_progress") as heard:
        with pytest.raises(StorageError):
            await backend.set_result("unwanted", result_of(1))
        with pytest.raises(StorageError):
            await backend.set_progress("unwanted", progress_of(1))
        await backend.set_result(task_id, result_of(1))
        await until_heard(heard, 1)
        await backend.set_progress(task_id, progress_of(1))
        assert await until_heard(heard, 2) == [task_id] * 2
    assert len(heard) == 2


async def test_shutdown_tells_what_was_stored(each_driver: Backends) -> None:
    backend = await each_driver.start()
    task_id = new_id()
    async with overheard(each_driver.database, channel_of(each_driver.database)) as heard:
        await backend.set_result(task_id, result_of(1))
        await backend.shutdown()
        assert await until_heard(heard, 1) == [task_id]


async def test_without_notify_nothing_is_told(each_driver: Backends) -> None:
    silent = await each_driver.start(notify=False)
    backend = await each_driver.start()
    channel = channel_of(each_driver.database)
    async with overheard(each_driver.database, channel, f"{channel}_progress") as heard:
        await silent.set_result(new_id(), result_of(1))
        await silent.set_progress(new_id(), progress_of(1))
        await silent.shutdown()
        # Notifications come in the order of their commits.
        await backend.set_result("last", result_of(1))
        assert await until_heard(heard, 1) == ["last"]
    assert len(heard) == 1


async def test_of_too_many_at_once_everybody_is_told_to_look(each_driver: Backends) -> None:
    timings = Timings(max_pending_notifications=10)
    notifier = (await each_driver.start(timings=timings)).runtime.notifier
    channel = channel_of(each_driver.database)
    async with overheard(each_driver.database, channel) as heard:
        notifier.announce(channel, [new_id() for _ in range(11)])
        notifier.announce(channel, ["later"])
        await notifier.close()
        notifier.announce(channel, ["last"])
        assert await until_heard(heard, 1) == ["last"]
    assert [payload for _, payload in heard] == ["[]", '["last"]']


async def test_what_a_pooled_connection_is_told_does_not_pile_up(backends: Backends) -> None:
    """As behind a pooler whose servers listen for clients that have gone."""
    timings = Timings(keep_connection=0)
    backend = await backends.start(driver="psycopg", pool_size=1, timings=timings)
    channel, engine = channel_of(backends.database), engine_of(backend)
    async with engine.connect() as connection:
        await connection.exec_driver_sql(f'LISTEN "{channel}"')
        await connection.commit()
    async with overheard(backends.database, channel) as heard:
        for number in range(1, 4):
            await backend.set_result(new_id(), result_of(1))
            await until_heard(heard, number)
    async with engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        keep_notifications(driver)
        assert [told async for told in driver.notifies(timeout=0)] == []
        await connection.invalidate()


async def test_failing_to_tell_is_warned_of_and_no_error_of_the_caller(
    each_driver: Backends, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = await each_driver.start()
    with monkeypatch.context() as patch:
        patch.setattr("taskiq_sa_pg.waiting.notifier.pack", lambda _: ["x" * 8_000])
        await backend.set_result("untold", result_of(1))
        await backend.runtime.notifier.close()
    assert (
        "waiting clients will find 1 results or tasks later, by polling: cannot send notifications"
        in caplog.text
    )
    async with overheard(each_driver.database, channel_of(each_driver.database)) as heard:
        await backend.set_result("told", result_of(1))
        assert await until_heard(heard, 1) == ["told"]


async def test_what_cannot_be_told_does_not_pile_up(
    backends: Backends, caplog: pytest.LogCaptureFixture
) -> None:
    """While a batch is on its way, no more ids are kept than would be told one by one."""
    timings = Timings(max_pending_notifications=10)
    notifier = (await backends.start(timings=timings)).runtime.notifier
    channel = "x" * 64  # which PostgreSQL refuses
    for _ in range(100):
        notifier.announce(channel, [new_id() for _ in range(6)])
    await notifier.close()
    assert "waiting clients will find 12 results or tasks later, by polling" in caplog.text


GARBAGE = {
    "empty": "",
    "text": "garbage",
    "number": "7",
    "huge number": "9" * 7_000,
    "null": "null",
    "true": "true",
    "string": '"a string"',
    "object": '{"probe": "of somebody"}',
    "object after a space": ' {"a": 1}',
    "unfinished": '["a',
    "nothing": "[]",
    "odd items": '[null, 1e999, -0.0, NaN, {"a": []}, "\\ud800", "\\u0000"]',
    "nested": "[" * 900 + "]" * 900,
    "deeply nested": "[" * 3_900 + "]" * 3_900,
    "deeply unfinished": "[" * 7_999,
    "many": f"[{','.join(['0'] * 3_900)}]",
    "long": f'["{"ü" * 3_900}"]',
}


async def test_whatever_anybody_sends_does_no_harm(each_driver: Backends) -> None:
    backend = await each_driver.start()
    channel = channel_of(each_driver.database)
    async with heard_by(backend):
        [listening] = await each_driver.listening()
        for name, payload in GARBAGE.items():
            task_id = new_id()
            result = asyncio.create_task(backend.wait_result(task_id, timeout=SOON))
            progress = asyncio.create_task(anext(backend.watch_progress(task_id, timeout=SOON)))
            await until_waiting(backend, 3)
            told = json.dumps([task_id])  # and what is true by no means
            for told_on in (channel, f"{channel}_progress"):
                await each_driver.database.fetch(
                    "SELECT pg_notify($1, $2), pg_notify($1, $3)", told_on, payload, told
                )
            await backend.set_progress(task_id, progress_of(name))
            assert (await progress).meta == name
            await backend.set_result(task_id, result_of(name))
            assert (await result).return_value == name
            assert listener_of(backend).is_healthy, name
            assert await each_driver.listening() == [listening], name
