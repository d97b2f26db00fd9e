"""The shop's tasks, through its web server."""

import asyncio
import signal
from contextlib import aclosing
from types import ModuleType
from typing import Any
from uuid import uuid4

import httpx
import pytest
from taskiq import TaskiqResult

from examples.fastapi_app.conftest import (
    Event,
    execute,
    is_served,
    packing_stopped,
    place_order,
    stream,
    web_process,
)
from tests.conftest import eventually
from tests.faults.servers import free_ports

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def collect(client: httpx.AsyncClient, task: str) -> list[Event]:
    return [event async for event in stream(client, task)]


async def test_an_order_is_packed_and_its_parcel_is_the_result(client: httpx.AsyncClient) -> None:
    response = await client.post("/orders", json={"customer": "Zoë 'Z' 100%", "quantity": 2})
    assert response.status_code == 202
    order = response.json()
    task = response.headers["Location"]
    assert task == f"/tasks/{order['task_id']}"
    await collect(client, task)
    response = await client.get(task)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["state"], answer["error"]) == ("succeeded", None)
    assert answer["value"] == {"label": f"No. {order['order_id']} for Zoë 'Z' 100%", "items": 2}


async def test_a_task_that_runs_is_accepted_and_has_no_result(
    client: httpx.AsyncClient, dsn: str
) -> None:
    async with packing_stopped(dsn):
        task = await place_order(client, 1)

        async def is_started() -> bool:
            response = await client.get(task)
            assert response.status_code == 202
            assert (response.json()["value"], response.json()["error"]) == (None, None)
            assert response.json()["state"] in {"queued", "started"}
            return bool(response.json()["state"] == "started")

        await eventually(is_started)
    await collect(client, task)
    assert (await client.get(task)).status_code == 200


@pytest.mark.parametrize("path", ["/tasks/{}", "/tasks/{}/events"])
async def test_a_task_of_no_order_is_not_found_and_neither_is_an_id_that_is_none(
    client: httpx.AsyncClient, shop: ModuleType, path: str
) -> None:
    of_no_order = str(uuid4())
    await shop.backend.set_result(of_no_order, failure_without_order())
    for task_id in (uuid4(), of_no_order, "1", "%00", "%F0%9F%8D%B0", "'; --"):
        assert (await client.get(path.format(task_id))).status_code == 404


@pytest.mark.parametrize(
    "order",
    [
        '{"customer": "Ada", "quantity": 0}',
        '{"customer": "Ada", "quantity": 2147483648}',
        '{"customer": "", "quantity": 1}',
        '{"customer": "NUL \\u0000", "quantity": 1}',
    ],
)
async def test_an_order_that_cannot_be_stored_is_refused(
    client: httpx.AsyncClient, order: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = await client.post("/orders", content=order, headers=headers)
    assert response.status_code == 422


async def test_progress_comes_in_order_and_the_result_ends_the_stream(
    client: httpx.AsyncClient,
) -> None:
    events = await collect(client, await place_order(client, 5))
    *progress, (last, status) = events
    packed = [data["packed"] for name, data in progress if name == "progress"]
    assert len(packed) == len(progress) > 1
    assert packed == sorted(set(packed))
    assert {data["ordered"] for _, data in progress} == {5}
    assert (last, status["state"]) == ("result", "succeeded")


async def test_a_finished_task_has_its_last_progress_and_its_result(
    client: httpx.AsyncClient,
) -> None:
    task = await place_order(client, 2)
    events = await collect(client, task)
    assert await collect(client, task) == events[-2:]
    assert [name for name, _ in events[-2:]] == ["progress", "result"]


async def test_who_comes_back_gets_the_current_progress_first(
    client: httpx.AsyncClient, dsn: str
) -> None:
    task = await place_order(client, 4)
    async with aclosing(stream(client, task)) as events:
        _, seen = await anext(events)
    async with packing_stopped(dsn):
        again = stream(client, task)
        name, current = await anext(again)
    assert name == "progress"
    assert seen["packed"] <= current["packed"] < 4
    rest = [event async for event in again]
    assert all(data["packed"] > current["packed"] for _, data in rest[:-1])
    assert rest[-1][0] == "result"


async def test_a_client_that_leaves_leaves_no_waiter_and_no_connection(
    client: httpx.AsyncClient, dsn: str, shop: ModuleType
) -> None:
    waiters = shop.backend.runtime.waiters

    async def is_waited_for() -> bool:
        return waiters.waiting > 0 and shop.engine.pool.checkedout() == 0

    async def is_at_rest() -> bool:
        return waiters.waiting == 0 and shop.engine.pool.checkedout() == 0

    async with packing_stopped(dsn):
        task = await place_order(client, 1)
        async with client.stream("GET", f"{task}/events"):
            await eventually(is_waited_for)
        await eventually(is_at_rest)
        assert (await client.get(task)).status_code == 202
    await collect(client, task)
    await eventually(is_at_rest)


async def test_more_clients_than_connections_follow_one_task(client: httpx.AsyncClient) -> None:
    task = await place_order(client, 4)
    first, *others = await asyncio.gather(*[collect(client, task) for _ in range(40)])
    for events in (first, *others):
        packed = [data["packed"] for _, data in events[:-1]]
        assert packed == sorted(set(packed))
        assert events[-1] == first[-1]
    assert first[-1][1]["state"] == "succeeded"


async def test_a_failed_task_tells_its_error(client: httpx.AsyncClient) -> None:
    task = await place_order(client, 12)
    events = await collect(client, task)
    response = await client.get(task)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["state"], answer["value"]) == ("failed", None)
    assert answer["error"] == {
        "type": "OutOfStockError",
        "message": "12 ordered, and only 10 in stock",
    }
    assert events[-1] == ("result", answer)


async def test_orders_are_listed_with_their_states_the_latest_first(
    client: httpx.AsyncClient, shop: ModuleType, dsn: str
) -> None:
    packed, failed = await place_order(client, 1, "Grace"), await place_order(client, 12, "Tim")
    _, events = await asyncio.gather(collect(client, packed), collect(client, failed))
    await shop.backend.set_result(str(uuid4()), failure_without_order())
    async with packing_stopped(dsn):
        running = await place_order(client, 1, "Ada")
        response = await client.get("/orders?limit=3")
    assert response.status_code == 200
    first, second, third = response.json()
    assert [f"/tasks/{order['task_id']}" for order in (first, second, third)] == [
        running,
        failed,
        packed,
    ]
    assert (first["state"], first["value"], first["error"]) == ("pending", None, None)
    assert (second["customer"], second["quantity"]) == ("Tim", 12)
    assert (second["state"], second["error"]) == ("failed", events[-1][1]["error"])
    assert (third["state"], third["value"]["items"]) == ("succeeded", 1)
    ids = [order["order_id"] for order in (await client.get("/orders")).json()]
    assert ids == sorted(ids, reverse=True)
    assert (await client.get("/orders?limit=-1")).status_code == 422
    await collect(client, running)


def failure_without_order() -> TaskiqResult[Any]:
    return TaskiqResult(is_err=True, return_value=None, execution_time=0, error=ValueError())


async def test_results_that_cannot_be_read_are_said_to_be_unavailable(
    client: httpx.AsyncClient, dsn: str
) -> None:
    task = await place_order(client, 1)
    await collect(client, task)
    await execute(dsn, "ALTER TABLE taskiq_results RENAME TO elsewhere")
    try:
        response = await client.get(task)
    finally:
        await execute(dsn, "ALTER TABLE elsewhere RENAME TO taskiq_results")
    assert response.status_code == 503
    assert response.json() == {"detail": "the results cannot be read now"}
    assert (await client.get(task)).status_code == 200


async def test_the_page_is_served(client: httpx.AsyncClient) -> None:
    response = await client.get("/")
    assert response.headers["Content-Type"].startswith("text/html")
    assert "<progress" in response.text


async def test_a_task_is_followed_across_the_end_of_a_web_server(
    client: httpx.AsyncClient, dsn: str
) -> None:
    """By a server in another process, which knows nothing of the first."""
    (port,) = free_ports(1)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as first_client:
        with web_process(port) as process:
            await eventually(lambda: is_served(first_client), 30, pause=0.1)
            task = await place_order(first_client, 4)
            events = stream(first_client, task)
            _, seen = await anext(events)
            async with packing_stopped(dsn):
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)
            await events.aclose()
    again = await collect(client, task)
    assert again[0][0] == "progress"
    assert again[0][1]["packed"] >= seen["packed"]
    assert again[-1][0] == "result"
    assert again[-1][1]["state"] == "succeeded"
