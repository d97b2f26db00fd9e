"""GET /{task_id}: each status, who may see it, and ids that no task can have."""

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from taskiq.depends.progress_tracker import TaskState

from taskiq_sa_pg import ConfigurationError, TaskStatus
from taskiq_sa_pg.fastapi import task_router
from taskiq_sa_pg.starlette import task_routes
from tests.conftest import BackendFactory, Database
from tests.endpoints.served import FRAMEWORKS, Backend, client_of, make_app
from tests.tasks import new_id, progress_of, result_of

AT = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
NOT_FOUND = {"detail": "no such task"}

HOSTILE = {
    "NUL": "%00",
    "NUL inside": "a%00b",
    "lone surrogate": "%ED%A0%80",
    "not UTF-8": "%FF",
    "too long": "x" * 3_000,
    "slash": "a%2Fb",
    "path": "..%2F..%2Fetc",
    "SQL": "'%3B%20--",
    "HTML": "%3Cscript%3E",
    "emoji": "%F0%9F%8D%B0",
    "space": "%20",
}


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def get(backend: Backend, task_id: str, **options: Any) -> httpx.Response:
    async with client_of(make_app(backend, **options)) as client:
        return await client.get(f"/tasks/{task_id}")


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_a_success_is_200_with_its_value_and_times(backend: Backend, framework: str) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of({"items": [1, "zwei", None]}))
    response = await get(backend, task_id, framework=framework)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    assert "Retry-After" not in response.headers
    answer = response.json()
    finished_at = datetime.fromisoformat(answer.pop("finished_at"))
    assert abs(datetime.now(UTC) - finished_at) < timedelta(minutes=1)
    assert answer == {
        "task_id": task_id,
        "state": "succeeded",
        "task_name": None,
        "attempt": 0,
        "queued_at": None,
        "started_at": None,
        "execution_time": 0.25,
        "progress": None,
        "value": {"items": [1, "zwei", None]},
        "error": None,
    }


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ValueError("no <b>such</b> item"),
            {"type": "ValueError", "message": "no <b>such</b> item"},
        ),
        (OddError(), {"type": "OddError", "message": ""}),
        (KeyError("\ud800"), {"type": "KeyError", "message": "'\\ud800'"}),
    ],
)
async def test_a_failure_is_200_with_its_error_and_no_traceback(
    backend: Backend, error: Exception, told: dict[str, str]
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of("unseen", is_err=True, error=error))
    response = await get(backend, task_id)
    assert response.status_code == 200
    answer = response.json()
    assert (answer["state"], answer["value"], answer["error"]) == ("failed", None, told)
    assert "Traceback" not in response.text


async def test_a_failure_without_an_exception_is_a_failure(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(None, is_err=True))
    answer = (await get(backend, task_id)).json()
    assert answer["state"] == "failed"
    assert answer["error"] is not None


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_a_task_that_has_not_finished_is_202_with_its_status_and_progress(
    backend: Backend, framework: str
) -> None:
    task_id = new_id()
    status = TaskStatus(task_id, "started", "shop:pack", 1, AT, AT + timedelta(seconds=1), "host:1")
    await backend.set_status(status)
    await backend.set_progress(task_id, progress_of({"done": 3}))
    response = await get(backend, task_id, framework=framework, retry_after=7)
    assert response.status_code == 202
    assert response.headers["Retry-After"] == "7"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.json() == {
        "task_id": task_id,
        "state": "started",
        "task_name": "shop:pack",
        "attempt": 1,
        "queued_at": "2030-01-02T03:04:05.678901Z",
        "started_at": "2030-01-02T03:04:06.678901Z",
        "finished_at": None,
        "execution_time": None,
        "progress": {"state": "running", "meta": {"done": 3}},
        "value": None,
        "error": None,
    }


@pytest.mark.parametrize("state", ["queued", "retrying"])
async def test_what_is_tracked_is_told(backend: Backend, state: Any) -> None:
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, state, queued_at=AT))
    response = await get(backend, task_id)
    assert (response.status_code, response.json()["state"]) == (202, state)


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_an_unknown_task_is_404(backend: Backend, framework: str) -> None:
    response = await get(backend, new_id(), framework=framework)
    assert response.status_code == 404
    assert response.headers["Cache-Control"] == "no-store"
    assert "no such task" in response.text


async def test_without_track_an_unknown_task_is_404_until_it_has_progress_or_as_it_is_told(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend()
    task_id = new_id()
    assert (await get(backend, task_id)).status_code == 404
    response = await get(backend, task_id, unknown="pending")
    assert (response.status_code, response.json()["state"]) == (202, "pending")
    await backend.set_progress(task_id, progress_of(1, TaskState.STARTED))
    response = await get(backend, task_id)
    assert (response.status_code, response.json()["state"]) == (202, "pending")
    assert response.json()["progress"] == {"state": "STARTED", "meta": 1}


@pytest.mark.parametrize("unknown", ["not_found", "pending"])
async def test_an_expired_result_is_410_until_it_is_pruned(
    start_backend: BackendFactory, database: Database, unknown: str
) -> None:
    backend = await start_backend(result_ttl=60)
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))
    assert (await get(backend, task_id, unknown=unknown)).status_code == 200
    await database.fetch("UPDATE taskiq_results SET expires_at = now() - interval '1 second'")
    response = await get(backend, task_id, unknown=unknown)
    assert response.status_code == 410
    assert response.json() == {"detail": "the result has expired"}
    await backend.prune()
    status = 404 if unknown == "not_found" else 202
    assert (await get(backend, task_id, unknown=unknown)).status_code == status


async def test_a_get_deletes_nothing_where_results_are_read_once(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend(keep_results=False)
    task_id = new_id()
    await backend.set_result(task_id, result_of("once"))
    for _ in range(2):
        assert (await get(backend, task_id)).json()["value"] == "once"
    assert (await backend.get_result(task_id)).return_value == "once"
    assert (await get(backend, task_id)).status_code == 404


async def test_a_result_that_is_deleted_as_it_is_looked_at_is_404(
    start_backend: BackendFactory,
) -> None:
    """Readers who take it and requests at the same time: each gets the whole result, or none."""
    backend = await start_backend(keep_results=False)
    async with client_of(make_app(backend)) as client:
        statuses: list[int] = []
        for _ in range(10):
            task_id = new_id()
            await backend.set_result(task_id, result_of(1))
            asked = [client.get(f"/tasks/{task_id}") for _ in range(5)]
            *responses, _ = await asyncio.gather(*asked, backend.get_result(task_id))
            statuses += [response.status_code for response in responses]
    assert set(statuses) <= {200, 404}


async def test_a_value_that_cannot_be_read_back_is_a_failure_that_is_logged(
    backend: Backend, tables: Database, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of("fine"))
    await tables.fetch(
        "UPDATE taskiq_results SET return_value = '\\x00' WHERE task_id = $1", task_id
    )
    response = await get(backend, task_id)
    assert response.status_code == 200
    answer = response.json()
    assert answer["state"] == "failed"
    assert answer["error"] == {
        "type": "ResultDecodeError",
        "message": "the stored result cannot be read",
    }
    assert any(task_id in record.getMessage() for record in caplog.records)


async def test_progress_that_cannot_be_read_back_is_left_out(
    backend: Backend, tables: Database
) -> None:
    task_id = new_id()
    await backend.set_status(TaskStatus(task_id, "started"))
    await backend.set_progress(task_id, progress_of(1))
    await tables.fetch(
        "UPDATE taskiq_results_progress SET meta = '\\x00' WHERE task_id = $1", task_id
    )
    response = await get(backend, task_id)
    assert (response.status_code, response.json()["progress"]) == (202, None)


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_a_database_that_cannot_be_asked_is_503_which_is_logged_and_not_told(
    backend: Backend, tables: Database, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "taskiq_sa_pg.endpoints")
    await tables.fetch("ALTER TABLE taskiq_results RENAME TO elsewhere")
    try:
        response = await get(backend, new_id(), framework=framework, retry_after=3)
    finally:
        await tables.fetch("ALTER TABLE elsewhere RENAME TO taskiq_results")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "3"
    assert "the results cannot be read now" in response.text
    assert "taskiq" not in response.text
    assert any("taskiq_results" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("path", ["/tasks/{}", "/tasks/{}/events"])
async def test_hostile_ids_are_404(backend: Backend, framework: str, path: str) -> None:
    asked = []

    def may_see(request: Request, task_id: str) -> bool:
        asked.append(task_id)
        return True

    async with client_of(make_app(backend, framework, may_see=may_see)) as client:
        for kind, task_id in HOSTILE.items():
            assert (await client.get(path.format(task_id))).status_code == 404, kind
    for task_id in asked:
        assert "\x00" not in task_id, "what PostgreSQL cannot hold is not for may_see"
        assert len(task_id) < 3_000


@pytest.mark.parametrize("path", ["/tasks/{}", "/tasks/{}/events"])
async def test_an_id_that_is_no_uuid_is_404_and_each_spelling_of_one_is_the_same_task(
    start_backend: BackendFactory, path: str
) -> None:
    backend = await start_backend(field_for_task_id="Uuid")
    task_id = uuid4()
    await backend.set_result(task_id, result_of(1))
    asked = []

    async def may_see(request: Request, task_id: str) -> bool:
        asked.append(task_id)
        return True

    async with client_of(make_app(backend, may_see=may_see)) as client:
        for none in ("1", "%00", "%F0%9F%8D%B0", "'; --", "x" * 3_000):
            assert (await client.get(path.format(none))).status_code == 404
        assert asked == []
        for spelling in (str(task_id), task_id.hex, str(task_id).upper(), f"{{{task_id}}}"):
            assert (await client.get(path.format(spelling))).status_code == 200
    assert set(asked) == {str(task_id)}


def sync_see(request: Request, task_id: str) -> bool:
    return request.headers.get("user") == "ada"


async def async_see(request: Request, task_id: str) -> bool:
    return sync_see(request, task_id)


@pytest.mark.parametrize(
    ("may_see", "framework"), [(sync_see, "fastapi"), (async_see, "starlette")]
)
@pytest.mark.parametrize("path", ["/tasks/{}", "/tasks/{}/events"])
async def test_a_task_that_may_not_be_seen_is_as_an_unknown_one(
    backend: Backend, may_see: Any, framework: str, path: str
) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of("secret"))
    async with client_of(make_app(backend, framework, may_see=may_see)) as client:
        seen = await client.get(path.format(task_id), headers={"user": "ada"})
        hidden = await client.get(path.format(task_id), headers={"user": "tim"})
        unknown = await client.get(path.format(new_id()), headers={"user": "ada"})
    assert seen.status_code == 200
    assert (hidden.status_code, hidden.content) == (404, unknown.content)
    assert hidden.headers == unknown.headers


async def test_may_see_may_answer_otherwise_and_its_errors_show_nothing(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of("secret"))

    def log_in(request: Request, task_id: str) -> bool:
        raise HTTPException(401, "log in first")

    def break_down(request: Request, task_id: str) -> bool:
        raise RuntimeError("broken")

    response = await get(backend, task_id, may_see=log_in)
    assert (response.status_code, response.json()) == (401, {"detail": "log in first"})
    with pytest.raises(RuntimeError, match="broken"):
        await get(backend, task_id, may_see=break_down)


async def test_dependencies_guard_every_route(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_result(task_id, result_of(1))

    def login(request: Request) -> None:
        if "user" not in request.headers:
            raise HTTPException(401)

    app = FastAPI()
    router = task_router(
        backend, may_list=lambda request: True, prefix="/tasks", dependencies=[Depends(login)]
    )
    app.include_router(router)
    async with client_of(app) as client:
        for path in ("/tasks/", f"/tasks/{task_id}", f"/tasks/{task_id}/events"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers={"user": "ada"})).status_code == 200


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_nothing_but_get_is_allowed(backend: Backend, framework: str) -> None:
    async with client_of(make_app(backend, framework, may_list=lambda request: True)) as client:
        for path in ("/tasks/", "/tasks/1", "/tasks/1/events"):
            for method in ("HEAD", "POST", "PUT", "DELETE"):
                assert (await client.request(method, path)).status_code == 405


@pytest.mark.parametrize(
    "options",
    [
        {"may_see": True},
        {"may_list": True},
        {"unknown": "404"},
        {"retry_after": 0},
        {"retry_after": 1.5},
        {"heartbeat": 0},
        {"heartbeat": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [task_router, task_routes])
def test_arguments_that_cannot_work_are_refused(make: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=name):
        make(Backend("postgresql://host/database"), **options)


@pytest.mark.parametrize("make", [task_router, task_routes])
def test_a_broker_is_no_backend(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="backend must be a SQLAlchemyResultBackend"):
        make(object())


async def test_openapi_has_the_models(backend: Backend) -> None:
    async with client_of(make_app(backend, may_list=lambda request: True)) as client:
        schema = (await client.get("/openapi.json")).json()
    task = schema["paths"]["/tasks/{task_id}"]["get"]["responses"]
    json_of = "application/json"
    for status in ("200", "202"):
        assert task[status]["content"][json_of]["schema"]["$ref"].endswith("/TaskAnswer")
    for status in ("404", "410", "503"):
        assert task[status]["content"][json_of]["schema"]["$ref"].endswith("/Problem")
    events = schema["paths"]["/tasks/{task_id}/events"]["get"]["responses"]
    assert list(events["200"]["content"]) == ["text/event-stream"]
    assert {"204", "404", "410"} <= events.keys()
    listing = schema["paths"]["/tasks/"]["get"]
    assert listing["responses"]["200"]["content"][json_of]["schema"]["$ref"].endswith("/TaskPage")
    assert {parameter["name"] for parameter in listing["parameters"]} == {
        "outcome", "name", "worker", "label", "argument", "window", "after", "limit"
    }  # fmt: skip
    models = schema["components"]["schemas"]
    assert {"TaskAnswer", "TaskError", "Progress", "TaskSummary"} <= models.keys()
    for name in ("TaskAnswer", "Progress", "TaskPage"):
        assert models[name]["required"] == list(models[name]["properties"])


async def test_an_application_can_have_the_tasks_of_two_backends(backend: Backend) -> None:
    app = FastAPI()
    app.include_router(task_router(backend, tags=["one"]), prefix="/one")
    app.include_router(task_router(backend, tags=["two"]), prefix="/two")
    schema = app.openapi()
    ids = [of["get"]["operationId"] for of in schema["paths"].values()]
    assert len(set(ids)) == len(ids) == 4


async def test_an_id_forges_no_line_of_the_log(
    backend: Backend, tables: Database, caplog: pytest.LogCaptureFixture
) -> None:
    task_id = f"{new_id()}\nERROR: forged"
    await backend.set_result(task_id, result_of("fine"))
    await tables.fetch(
        "UPDATE taskiq_results SET return_value = '\\x00' WHERE task_id = $1", task_id
    )
    assert (await get(backend, quote(task_id))).status_code == 200
    [logged] = [record for record in caplog.records if "endpoints" in record.name]
    assert "\n" not in logged.getMessage()
