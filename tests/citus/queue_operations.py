"""What can be done with the queue and schedules, and what the dashboard and endpoints show."""

import asyncio
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from taskiq_sa_pg import SQLAlchemyBroker, TaskStatus
from taskiq_sa_pg.ui import dashboard
from tests.citus.places import Place
from tests.conftest import eventually
from tests.endpoints.served import follow, make_app, served
from tests.integration.brokers import SOON, acknowledge, id_of, listening, send, take, working
from tests.integration.schedulers import NOON, Scheduler, greet, schedule
from tests.tasks import progress_of, result_of


def task_of(broker: SQLAlchemyBroker) -> Any:
    task = broker.find_task("add")
    assert task is not None
    return task


async def tasks_are_sent_executed_and_sent_again(place: Place) -> None:
    broker = await place.broker()
    backend: Any = broker.result_backend
    task = task_of(broker)
    async with working(broker):
        sent = await asyncio.gather(*[task.kiq(i, 1) for i in range(20)])
        results = await asyncio.gather(*[each.wait_result(timeout=SOON) for each in sent])
        assert [result.return_value for result in results] == list(range(1, 21))
        again = await backend.resend(broker, sent[0].task_id)
        assert (await again.wait_result(timeout=SOON)).return_value == 1
    page = await backend.find(name="add", label={"rerun_of": sent[0].task_id})
    assert [record.task_id for record in page.records] == [again.task_id]
    found = await backend.find(argument=7, name="add", window=60)
    assert sent[7].task_id in {record.task_id for record in found.records}


async def queued_tasks_have_a_status(place: Place) -> None:
    broker, view = await place.broker(), place.new_ids()[0]
    backend: Any = broker.result_backend
    task_ids = [await send(broker, i, name="add", queue_name=view) for i in place.new_ids(3)]
    asking = await place.backend()
    states = await asyncio.gather(*[asking.get_status(i) for i in (*task_ids, *place.new_ids())])
    assert [status.state for status in states] == ["queued"] * 3 + ["unknown"]
    await backend.set_status(TaskStatus(task_ids[0], "started", worker="us"))
    assert (await asking.get_status(task_ids[0])).state == "started"
    async with listening(broker.listening_to(view)) as messages:
        await acknowledge(*await take(messages, 3))
    await backend.forget(task_ids)


async def tasks_are_sent_with_the_transaction_of_a_session(place: Place) -> None:
    broker = await place.broker()
    task = task_of(broker)
    engine = place.engine()
    async with working(broker):
        async with AsyncSession(engine) as session:
            lost = await broker.in_session(session).kiq(task, 1, 1)
            await session.rollback()
            sent = await broker.in_session(session).kiq(task, 1, 2)
            await session.commit()
        assert (await sent.wait_result(timeout=SOON)).return_value == 3
        assert not await lost.is_ready()


async def tasks_are_sent_with_the_transaction_of_a_synchronous_session(place: Place) -> None:
    broker = await place.broker()
    engine = create_engine(place.tables.dsn("psycopg"))

    def enqueue() -> Any:
        with Session(engine) as session:
            sent = broker.in_session(session).kiq_sync(task_of(broker), 2, 2)
            session.commit()
            return sent

    sent = await asyncio.to_thread(enqueue)
    engine.dispose()
    async with working(broker):
        assert (await sent.wait_result(timeout=SOON)).return_value == 4


async def tasks_are_parked_released_and_discarded(place: Place) -> None:
    broker, name = await place.broker(), place.new_ids()[0]
    task_ids = [await send(broker, i, name="add", queue_name=name) for i in place.new_ids(3)]
    park = "UPDATE taskiq_results_queue SET available_at = 'infinity', deliveries = 6"
    await place.tables.fetch(f"{park} WHERE queue_name = $1", name)
    [count] = [each for each in await broker.get_queues() if each.queue_name == name]
    assert (count.task_name, count.waiting, count.parked) == ("add", 0, 3)
    assert {each.task_id for each in await broker.get_parked(name)} == set(task_ids)
    assert await broker.release_parked(task_ids[:1]) == 1
    assert await broker.discard_parked(task_ids[:2]) == 1
    assert await broker.release_parked(queue_name=name) == 1
    view = broker.listening_to(name)
    async with listening(view) as messages:
        taken = await take(messages, 2)
        assert {id_of(broker, message) for message in taken} == {task_ids[0], task_ids[2]}
        await acknowledge(*taken)


async def a_task_that_kills_its_workers_is_parked_with_an_error(place: Place) -> None:
    broker = await place.broker(max_deliveries=1)
    task_id = await send(broker, place.new_ids()[0], name="add")
    await place.tables.fetch(
        "UPDATE taskiq_results_queue SET deliveries = 2 WHERE task_id::text = $1", task_id
    )
    backend: Any = broker.result_backend
    async with working(broker):
        assert (await backend.wait_result(task_id, timeout=SOON)).is_err
    assert await broker.discard_parked([task_id]) == 1


async def leases_are_renewed(place: Place) -> None:
    broker, name = await place.broker(lease=0.6), place.new_ids()[0]
    is_done = asyncio.Event()

    @broker.task(task_name=name)
    async def wait() -> str:
        await is_done.wait()
        return "done"

    query = "SELECT available_at FROM taskiq_results_queue WHERE task_name = $1"
    async with working(broker):
        sent = await wait.kiq()
        ends = set()
        async with asyncio.timeout(SOON):
            while len(ends) < 3:
                ends.update(row["available_at"] for row in await place.tables.fetch(query, name))
        is_done.set()
        assert (await sent.wait_result(timeout=SOON)).return_value == "done"


async def schedules_are_stored_and_sent_once(place: Place) -> None:
    brokers = [SQLAlchemyBroker(**place.arguments) for _ in range(2)]
    for broker in brokers:
        broker.is_scheduler_process = True
        broker.register_task(greet, task_name="greet")
    schedulers = [Scheduler(broker) for broker in brokers]
    for scheduler in schedulers:
        await scheduler.start()
        place.stack.push_async_callback(scheduler.stop)
    first, second = schedulers
    by_interval, once, by_cron = place.new_ids(3)
    await first.source.add_schedule(schedule(by_interval, interval=3600))
    await first.source.add_schedule(schedule(once, time=NOON))
    await first.source.add_schedule(schedule(by_cron, cron="0 0 1 1 *"))
    for scheduler in schedulers:
        await scheduler.update()
    await asyncio.gather(*[scheduler.look(NOON) for scheduler in schedulers])
    rows = await place.tables.fetch("DELETE FROM taskiq_results_queue RETURNING task_name")
    assert [row["task_name"] for row in rows] == ["greet"] * 2
    listed = {each.schedule_id for each in await brokers[0].get_schedules()}
    assert listed == {by_interval, by_cron}
    for schedule_id in listed:
        await second.source.delete_schedule(schedule_id)
    assert await first.source.get_schedules() == []


async def the_dashboard_shows_every_page(place: Place) -> None:
    broker = await place.broker()
    backend: Any = broker.result_backend
    finished, running = place.new_ids(2)
    await backend.set_result(finished, result_of(1))
    await backend.set_status(TaskStatus(running, "started", "task", worker="us"))
    await backend.set_progress(running, progress_of(1))
    app = dashboard(backend, broker=broker, authorize=lambda _: "write")
    async with served(app) as client:
        for window in ("1h", "6h", "24h", "7d"):
            answer = await client.get(f"/?window={window}")
            assert answer.status_code == 200, answer.text
        for page in ("tasks", f"task?id={finished}", f"task?id={running}", "workers", "queues"):
            assert (await client.get(f"/{page}")).status_code == 200, page
        for page in ("parked", "schedules", "healthz"):
            assert (await client.get(f"/{page}")).status_code == 200, page
        async with client.stream("GET", f"/follow?id={running}") as response:
            lines = response.aiter_lines()
            async with asyncio.timeout(SOON):
                while not (await anext(lines)).startswith("event:"):
                    pass
                await backend.set_result(running, result_of(2))
                while await anext(lines) != "event: end":
                    pass


async def endpoints_serve_tasks_and_their_events(place: Place) -> None:
    backend, [task_id] = await place.backend(track="started"), place.new_ids()
    await backend.set_progress(task_id, progress_of(1))
    async with served(make_app(backend, may_list=lambda _: True)) as client:
        following = asyncio.create_task(follow(client, task_id))

        async def is_followed() -> bool:
            return backend.runtime.waiters.waiting > 0

        await eventually(is_followed)
        await backend.set_result(task_id, result_of(7))
        async with asyncio.timeout(SOON):
            events = await following
        assert [name for name, _ in events][-1] == "result"
        assert (await client.get(f"/tasks/{task_id}")).json()["value"] == 7
        assert (await client.get("/tasks/")).status_code == 200


OPERATIONS = [
    tasks_are_sent_executed_and_sent_again,
    queued_tasks_have_a_status,
    tasks_are_sent_with_the_transaction_of_a_session,
    tasks_are_sent_with_the_transaction_of_a_synchronous_session,
    tasks_are_parked_released_and_discarded,
    a_task_that_kills_its_workers_is_parked_with_an_error,
    leases_are_renewed,
    schedules_are_stored_and_sent_once,
    the_dashboard_shows_every_page,
    endpoints_serve_tasks_and_their_events,
]
