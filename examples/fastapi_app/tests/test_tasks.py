"""The shop's tasks, as a client of its web server sees them."""

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

RUNNING = {"state": "running", "value": None, "error": None}


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
    assert response.json() == {
        "state": "succeeded",
        "value": {"label": f"No. {order['order_id']} for Zoë 'Z' 100%", "items": 2},
        "error": None,
    }


async def test_a_task_that_runs_is_accepted_and_has_no_result(
    client: httpx.AsyncClient, dsn: str
) -> None:
    async with packing_stopped(dsn):
        task = await place_order(client, 1)
        response = await client.get(task)
        assert (response.status_code, response.json()) == (202, RUNNING)
    await collect(client, task)
    assert (await client.get(task)).status_code == 200


@pytest.mark.parametrize("path", ["/tasks/{}", "/tasks/{}/events"])
async def test_an_unknown_task_is_not_found_and_an_id_that_is_none_is_refused(
    client: httpx.AsyncClient, path: str
) -> None:
    assert (await client.get(path.format(uuid4()))).status_code == 404
    for invalid in ("1", "%00", "%F0%9F%8D%B0", "'; --"):
        assert (await client.get(path.format(invalid))).status_code == 422


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


async def test_a_failed_task_tells_its_error_and_is_listed_with_its_order(
    client: httpx.AsyncClient, shop: ModuleType
) -> None:
    succeeded, failed = await place_order(client, 1, "Grace"), await place_order(client, 12, "Tim")
    _, events = await asyncio.gather(collect(client, succeeded), collect(client, failed))
    response = await client.get(failed)
    assert response.status_code == 200
    assert response.json() == {
        "state": "failed",
        "value": None,
        "error": {"type": "OutOfStockError", "message": "12 ordered, and only 10 in stock"},
    }
    assert events[-1] == ("result", response.json())
    await shop.backend.set_result(str(uuid4()), failure_without_order())
    response = await client.get("/failures")
    assert response.status_code == 200
    (failure,) = [row for row in response.json() if row["customer"] in {"Grace", "Tim"}]
    assert f"/tasks/{failure['task_id']}" == failed
    assert (failure["customer"], failure["quantity"]) == ("Tim", 12)
    assert failure["error_type"] == "shop.tasks.OutOfStockError"
    assert "ValueError" not in {row["error_type"] for row in response.json()}
    finished = [row["finished_at"] for row in response.json()]
    assert finished == sorted(finished, reverse=True)
    assert (await client.get("/failures?limit=1")).json() == response.json()[:1]
    assert (await client.get("/failures?limit=-1")).status_code == 422


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
    """By one that is another process, so that nothing is left of the first."""
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
