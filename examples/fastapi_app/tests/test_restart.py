"""The web server ends and starts again while a task runs and a browser follows it."""

import signal

import httpx
import pytest

from examples.fastapi_app.conftest import (
    is_served,
    packing_stopped,
    place_order,
    stream,
    web_process,
)
from tests.conftest import eventually
from tests.faults.servers import free_ports

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_task_is_followed_across_a_restart_of_the_web_server(dsn: str) -> None:
    (port,) = free_ports(1)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        with web_process(port) as process:
            await eventually(lambda: is_served(client), 30)
            task = await place_order(client, 8)
            events = stream(client, task)
            _, seen = await anext(events)
            async with packing_stopped(dsn):
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)
            await events.aclose()
        with web_process(port):
            await eventually(lambda: is_served(client), 30)
            again = [event async for event in stream(client, task)]
    assert again[0][0] == "progress"
    assert again[0][1]["packed"] >= seen["packed"]
    assert again[-1][0] == "result"
    assert again[-1][1]["state"] == "succeeded"
