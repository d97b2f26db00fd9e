"""GET /: finished tasks a page at a time, for those who may list them."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import HTTPException, Request

from tests.conftest import Database
from tests.endpoints.served import FRAMEWORKS, Backend, client_of, make_app
from tests.tasks import new_id, result_of

FIELDS = {
    "task_id", "outcome", "task_name", "worker", "attempt", "error_type", "execution_time",
    "queued_at", "started_at", "finished_at", "expires_at", "labels",
}  # fmt: skip


def everybody(request: Request) -> bool:
    return True


@pytest.fixture
async def three(backend: Backend, tables: Database) -> AsyncIterator[list[str]]:
    """The ids of three finished tasks, the latest first; the second has failed."""
    ids = [new_id() for _ in range(3)]
    for number, task_id in enumerate(ids):
        error = ValueError("no") if number == 1 else None
        labels = {"user": 40 + number, "note": "<b>"}
        await backend.set_result(
            task_id, result_of("secret", is_err=error is not None, error=error, labels=labels)
        )
        await tables.fetch(
            "UPDATE taskiq_results SET task_name = $2, worker = $3, args = $4, kwargs = $5,"
            " finished_at = now() - make_interval(hours => $6) WHERE task_id = $1",
            task_id,
            f"shop:task{number}",
            f"host:{number}",
            f'[{number}, "x"]',
            f'{{"order_id": {number}}}',
            number,
        )
    yield ids
    await backend.forget(ids)


@pytest.fixture(params=FRAMEWORKS)
async def client(
    request: pytest.FixtureRequest, backend: Backend
) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(make_app(backend, request.param, may_list=everybody)) as client:
        yield client


async def ids(client: httpx.AsyncClient, query: str) -> list[str]:
    response = await client.get(f"/tasks/?{query}")
    assert response.status_code == 200, response.text
    return [record["task_id"] for record in response.json()["records"]]


async def test_records_have_no_values(client: httpx.AsyncClient, three: list[str]) -> None:
    response = await client.get("/tasks/")
    assert response.headers["Cache-Control"] == "no-store"
    records = response.json()["records"]
    assert [record["task_id"] for record in records] == three
    assert {frozenset(record) for record in records} == {frozenset(FIELDS)}
    assert records[1] | {"finished_at": ""} == {
        "task_id": three[1],
        "outcome": "failed",
        "task_name": "shop:task1",
        "worker": "host:1",
        "attempt": 0,
        "error_type": "ValueError",
        "execution_time": 0.25,
        "queued_at": None,
        "started_at": None,
        "finished_at": "",
        "expires_at": None,
        "labels": {"user": 41, "note": "<b>"},
    }
    assert "secret" not in response.text


async def test_each_condition_finds_its_tasks(client: httpx.AsyncClient, three: list[str]) -> None:
    first, second, third = three
    found = {
        "": three,
        "outcome=failed": [second],
        "outcome=succeeded": [first, third],
        "name=shop:task2": [third],
        "worker=host:0": [first],
        "label=user=41": [second],
        "label=user%3D41&label=note=%3Cb%3E": [second],
        "label=user=41&label=note=x": [],
        "argument=order_id=2": [third],
        "argument=0=1": [second],
        "argument=x": three,
        "argument==x": three,
        "argument==x=": [],
        "argument=-1=x&argument=0=2": [third],
        "argument=0=1&argument=order_id=1": [second],
        "argument=0=1&argument=order_id=2": [],
        "window=5400": [first, second],
        "limit=2": [first, second],
        "name=": [],
        "name=%27%3B--": [],
    }
    for query, expected in found.items():
        assert await ids(client, query) == expected, query


async def test_pages_follow_each_other(client: httpx.AsyncClient, three: list[str]) -> None:
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = (await client.get("/tasks/", params={"limit": 1, **after})).json()
        seen += [record["task_id"] for record in page["records"]]
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert seen == three


async def test_a_query_that_makes_no_sense_is_422(client: httpx.AsyncClient) -> None:
    for query in (
        "outcome=running",
        "limit=0",
        "limit=501",
        "limit=x",
        "window=0",
        "window=nan",
        "window=-1",
        "window=1e300",
        "after=here",
        "after=%00",
        "after=9999-99-99T99:99:99.999999Z~1",
        "name=%00",
        "label=user",
        "label=%00=1",
        "argument=1&argument=2",
        "argument=0=1&argument=0=2",
        "label=user=41&label=user=42",
        f"argument={'9' * 5_000}=1",
        f"argument={2**40}=1",
    ):
        response = await client.get(f"/tasks/?{query}")
        assert response.status_code == 422, query
        assert "postgres" not in response.text.lower() or "hold" in response.text


@pytest.mark.usefixtures("three")
async def test_hostile_texts_find_nothing(client: httpx.AsyncClient) -> None:
    for text in ("%ED%A0%80", "%F0%9F%8D%B0", "x" * 20_000, "%25%22%5D%5C"):
        for name in ("name", "label=", "argument", "argument=order_id"):
            query = f"{name}={text}" if name != "label=" else f"label={text}={text}"
            assert await ids(client, query) == [], query


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_there_is_no_list_unless_somebody_may_see_it(
    backend: Backend, three: list[str], framework: str
) -> None:
    async with client_of(make_app(backend, framework, may_see=lambda *_: True)) as client:
        assert (await client.get("/tasks/")).status_code in {404, 405}
    for nobody in (False, None):
        app = make_app(backend, framework, may_list=lambda request, nobody=nobody: nobody)
        async with client_of(app) as client:
            response = await client.get("/tasks/")
            assert response.status_code == 403
            assert three[0] not in response.text


async def test_a_condition_limits_what_is_listed(backend: Backend, three: list[str]) -> None:
    async def may_list(request: Request) -> Any:
        user = request.headers.get("user")
        if user is None:
            raise HTTPException(401)
        return backend.models.Result.labels["user"].astext == user

    async with client_of(make_app(backend, may_list=may_list)) as client:
        assert (await client.get("/tasks/")).status_code == 401
        for user, expected in {"41": [three[1]], "42": [three[2]], "' OR true --": []}.items():
            response = await client.get("/tasks/", headers={"user": user})
            assert [record["task_id"] for record in response.json()["records"]] == expected
        response = await client.get("/tasks/?outcome=failed", headers={"user": "42"})
        assert response.json() == {"records": [], "next": None}


@pytest.mark.parametrize("answer", [[], (), "", 1, "all"], ids=repr)
async def test_what_is_neither_true_nor_a_condition_lists_nothing(
    backend: Backend, three: list[str], answer: Any
) -> None:
    async with client_of(make_app(backend, may_list=lambda request: answer)) as client:
        with pytest.raises(TypeError):
            await client.get("/tasks/")


async def test_a_database_that_cannot_be_asked_is_503(
    client: httpx.AsyncClient, tables: Database
) -> None:
    await tables.fetch("ALTER TABLE taskiq_results RENAME TO elsewhere")
    try:
        response = await client.get("/tasks/")
    finally:
        await tables.fetch("ALTER TABLE elsewhere RENAME TO taskiq_results")
    assert response.status_code == 503
    assert "taskiq" not in response.text
