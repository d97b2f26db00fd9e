"""What the pages show of tasks, and where their links lead."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from sqlalchemy import text
from taskiq.serializers import JSONSerializer

from taskiq_sa_pg import SQLAlchemyResultBackend, TaskStatus
from taskiq_sa_pg.ui import app, dashboard
from tests.conftest import BackendFactory, Database
from tests.tasks import new_id, progress_of
from tests.ui.conftest import ORIGIN, OWN, Backend, client_of, raised, store
from tests.ui.html import Document, check

HOUR = timedelta(hours=1)


async def page_of(
    client: httpx.AsyncClient, path: str, status: int = 200, **query: Any
) -> Document:
    answer = await client.get(path, params=query or None)
    assert answer.status_code == status, answer.text
    return check(answer.text, str(answer.url), "/")


async def age(tables: Database, task_id: str, by: timedelta) -> None:
    await tables.fetch(
        "UPDATE taskiq_results SET finished_at = finished_at - $2::interval WHERE task_id = $1",
        *(task_id, by),
    )


async def set_status(backend: Backend, state: Any, ago: float = 5, **fields: Any) -> str:
    task_id = new_id()
    at = datetime.now(UTC) - timedelta(seconds=ago)
    started_at = at if state == "started" else None
    await backend.set_status(TaskStatus(task_id, state, "shop:pack", 0, at, started_at, **fields))
    return task_id


async def test_an_empty_dashboard_says_what_to_do_next(reader: httpx.AsyncClient) -> None:
    assert "No task finished in the last hour" in (await page_of(reader, "")).text
    assert ".kiq()" in (await page_of(reader, "", window="7d")).text
    assert "No task has finished yet" in (await page_of(reader, "tasks")).text


async def test_the_overview_counts_what_finished_in_its_window(
    backend: Backend, reader: httpx.AsyncClient, tables: Database
) -> None:
    await store(backend, 1, execution_time=0.5)
    await store(backend, error=raised(ValueError("no")), execution_time=1.5)
    await age(tables, await store(backend, 2, execution_time=60.0), 3 * HOUR)
    await age(tables, await store(backend, 2, execution_time=60.0), 200 * HOUR)
    page = await page_of(reader, "")
    assert re.search(r"Finished\s*2\s*in the last hour", page.text)
    assert re.search(r"Failed\s*1\s*50 % of all", page.text)
    assert "1 succeeded, 1 failed" in page.text
    assert "Tasks took 1 s (median)" in str(page.elements)
    assert "Tasks waited 2 s (median)" in str(page.elements)
    wider = await page_of(reader, "", window="6h")
    assert re.search(r"Finished\s*3\s*in the last 6 hours", wider.text)
    assert re.search(
        r"Finished\s*3\s*in the last 7 days", (await page_of(reader, "", window="7d")).text
    )
    assert "last hour" in (await page_of(reader, "", window="<script>")).text


async def test_charts_have_titles_units_and_words_for_those_who_cannot_see_them(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    await store(backend, 1)
    page = await page_of(reader, "")
    charts = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert [chart["role"] for chart in charts] == ["img"] * 3
    assert all("in the last hour" in chart["aria-label"] for chart in charts)
    for words in ("Finished per minute", "Execution time", "Time in the queue", "60 min", "now"):
        assert words in page.text
    assert len([tag for tag, _ in page.elements if tag == "title"]) == 1 + 3 * 60
    assert "250 ms" in page.text


async def test_what_runs_has_a_bar_and_what_waits_is_told(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    done = await set_status(backend, "started", worker="worker-7")
    await backend.set_progress(done, progress_of({"done": 3, "total": 8}, "resizing"))
    other = await set_status(backend, "started", ago=90)
    await backend.set_progress(other, progress_of(None, "looking for a box"))
    queued = await set_status(backend, "queued", ago=300)
    await set_status(backend, "queued", ago=20)
    page = await page_of(reader, "")
    [bar] = [attributes for tag, attributes in page.elements if tag == "progress"]
    assert (bar["value"], bar["max"]) == ("375", "1000")
    for words in ("3 of 8", "resizing", "looking for a box", "worker-7", "1 min 30 s", "5 min"):
        assert words in page.text
    assert [link.partition("id=")[2] for link in page.links("task")] == [queued, other, done]


async def test_without_track_the_overview_says_how_to_see_more(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend()
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        page = await page_of(client, "")
        assert page.text.count('needs track="started"') == 2
        assert 'track="started"' in (await page_of(client, "workers")).text
        assert 'track="started"' in (await page_of(client, "task", 404, id="x")).text


async def test_from_the_overview_to_the_traceback_of_a_failed_task(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    await store(backend, 1)
    error = raised(LookupError("order 7 has no items\nat all"))
    await store(backend, error=error, args="[7]", kwargs='{"user": "ada"}', labels={"user": 42})
    page = await page_of(reader, "")
    [link] = page.links("tasks")[1:]  # the first is in the navigation
    page = await page_of(reader, link)
    [link] = page.links("task")
    page = await page_of(reader, link)
    for words in ("Traceback", "in raised", "order 7 has no items\nat all", "ada", "user", "42"):
        assert words in page.text


FILTERS: list[dict[str, str]] = [
    {"outcome": "failed"},
    {"name": "shop:wanted"},
    {"worker": "worker-9"},
    {"label": "user=42"},
    {"label": " user = 42 "},
    {"argument": "order_id=7"},
    {"argument": "0=first"},
    {"argument": "-1=first"},
    {"argument": "7"},
    {"argument": "=first"},
    {"outcome": "failed", "label": "user=42", "argument": "7", "window": "all"},
]


async def test_filters(backend: Backend, reader: httpx.AsyncClient) -> None:
    wanted = await store(
        backend,
        error=ValueError(),
        name="shop:wanted",
        worker="worker-9",
        args='["first"]',
        kwargs='{"order_id": 7}',
        labels={"user": 42},
    )
    await store(backend, args='["second"]', kwargs='{"order_id": 8}', labels={"user": 43})
    for query in FILTERS:
        page = await page_of(reader, "tasks", **query)
        assert [link.partition("id=")[2] for link in page.links("task")] == [wanted], query
        page = await page_of(reader, "tasks", **query | {"name": "shop:other"})
        assert "No matching task finished" in page.text
    assert len((await page_of(reader, "tasks", outcome="?", window="?")).links("task")) == 2


@pytest.mark.parametrize(
    ("query", "words"),
    [({"label": "user"}, "user=42"), ({"after": "x"}, "after"), ({"name": "\0"}, "NUL")],
)
async def test_what_cannot_be_looked_for_is_told(
    reader: httpx.AsyncClient, query: dict[str, str], words: str
) -> None:
    page = await page_of(reader, "tasks", 400, **query)
    assert words in page.text


async def test_pages_of_a_list_skip_no_task_and_repeat_none(
    backend: Backend, reader: httpx.AsyncClient, tables: Database
) -> None:
    stored = {await store(backend, n) for n in range(120)}
    await tables.fetch("UPDATE taskiq_results SET finished_at = date_trunc('hour', finished_at)")
    seen: list[str] = []
    url: str | None = "tasks?name=shop%3Apack"
    while url is not None:
        answer = await reader.get(url)
        page = check(answer.text, str(answer.url), "/")
        seen += [link.partition("id=")[2] for link in page.links("task")]
        following = [a["href"] for tag, a in page.elements if a.get("rel") == "next"]
        url = urljoin(str(answer.url), following[0]) if following else None
    assert len(seen) == 120
    assert set(seen) == stored


async def test_an_empty_page_offers_to_look_back_further(
    backend: Backend, reader: httpx.AsyncClient, tables: Database
) -> None:
    await age(tables, await store(backend), 40 * 24 * HOUR)
    page = await page_of(reader, "tasks")
    for words in ("in the last 24 hours", "in the last 7 days", "in the last 30 days"):
        assert f"No task finished {words}" in page.text
        [link] = [link for link in page.links("tasks") if "window=" in link]
        page = await page_of(reader, link)
    assert len(page.links("task")) == 1


async def test_a_finished_task(backend: Backend, reader: httpx.AsyncClient) -> None:
    value = {"receipt": 9_007_199_254_740_993, "lines": ["a\nb"], "ratio": 0.1}
    task_id = await store(backend, value, execution_time=65.0, waited=0.2, labels={"_retries": 2})
    page = await page_of(reader, "task", id=task_id)
    for words in ("9007199254740993", '"a\\nb"', "succeeded", "worker-1", "waited 200 ms"):
        assert words in page.text
    assert re.search(r"ran 1 min 5 s", page.text)
    assert re.search(r"Attempt\s*3", page.text)
    assert "Not recorded, or redacted" in page.text
    text = await store(backend, "Dear customer,\n\n  packed.\n")
    assert "Dear customer,\n\n  packed.\n" in (await page_of(reader, "task", id=text)).text


async def test_a_task_that_is_not_finished_has_a_page(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    queued = await page_of(reader, "task", id=await set_status(backend, "queued"))
    assert "to come" in queued.text
    started = await set_status(backend, "started", worker="worker-7")
    await backend.set_progress(started, progress_of(0.25))
    page = await page_of(reader, "task", id=started)
    for words in ("started", "worker-7", "25%", "runs 5"):
        assert words in page.text
    live = next(attributes for _, attributes in page.elements if attributes.get("id") == "live")
    assert live["data-events"].endswith(f"follow?id={started}")
    only_progress = new_id()
    await backend.set_progress(only_progress, progress_of([1, 4]))
    assert "1 of 4" in (await page_of(reader, "task", id=only_progress)).text


async def test_a_task_that_is_retried_shows_the_failure_and_what_is_to_come(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    task_id = await store(backend, error=raised(ValueError("first attempt")))
    now = datetime.now(UTC)
    await backend.set_status(TaskStatus(task_id, "retrying", "shop:pack", 1, now))
    page = await page_of(reader, "task", id=task_id)
    for words in ("retrying", "Next attempt", "first attempt"):
        assert words in page.text


async def test_a_task_that_has_expired(backend: Backend, tables: Database, reader: Any) -> None:
    task_id = await store(backend, "gone")
    await tables.fetch("UPDATE taskiq_results SET expires_at = now() - interval '1 s'")
    page = await page_of(reader, "task", id=task_id)
    assert "expired" in page.text
    assert "gone" not in page.text


async def test_an_unknown_task_may_mean_several_things(
    reader: httpx.AsyncClient, start_backend: BackendFactory
) -> None:
    page = await page_of(reader, "task", 404, id="nobody")
    assert "nobody" in page.text
    assert "There is no task with this id" in page.text
    assert "keep_results" not in page.text
    assert (await page_of(reader, "task", 404)).text.count("(no id)") == 1
    once = await start_backend(keep_results=False, field_for_task_id="Uuid", table_name="once")
    async with client_of(dashboard(once, authorize=lambda _: "read")) as client:
        assert "keep_results=False" in (await page_of(client, "task", 404, id=new_id())).text
        assert "Uuid" in (await page_of(client, "task", 404, id="nobody")).text


async def test_a_result_that_is_read_once_is_only_looked_at(start_backend: BackendFactory) -> None:
    backend = await start_backend(field_for_payload="Jsonb", keep_results=False)
    task_id = await store(backend, "still there")
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        assert "still there" in (await page_of(client, "task", id=task_id)).text
        await page_of(client, "tasks")
    assert (await backend.get_result(task_id)).return_value == "still there"


async def test_to_forget_asks_first(backend: Backend, client: httpx.AsyncClient) -> None:
    task_id = await store(backend)
    page = await page_of(client, "task", id=task_id)
    [link] = page.links("forget")
    page = await page_of(client, link)
    assert "Forget this task?" in page.text
    assert page.links("task") == [f"task?id={task_id}"]
    [form] = [attributes for tag, attributes in page.elements if tag == "form"]
    assert form["method"] == "post"
    assert "action" not in form  # the page's own URL
    answer = await client.post(link, headers=OWN)
    assert "has been deleted" in answer.text
    await page_of(client, "task", 404, id=task_id)


async def test_there_is_no_page_but_ours(client: httpx.AsyncClient) -> None:
    for path in ("nowhere", "tasks/1", "a/b/c"):
        answer = await client.get(path)
        assert answer.status_code == 404
        check(answer.text, str(answer.url), "/")
    answer = await client.post("tasks", headers=OWN)
    assert answer.status_code == 405
    assert "GET" in answer.headers["Allow"]


async def test_postgresql_that_is_away_is_told(tables: Database, reader: Any) -> None:
    await tables.fetch("ALTER TABLE taskiq_results RENAME TO away")
    try:
        for path in ("", "tasks", "task?id=1"):
            page = await page_of(reader, path, 503)
            assert "PostgreSQL" in page.text
    finally:
        await tables.fetch("ALTER TABLE away RENAME TO taskiq_results")


@asynccontextmanager
async def locked(backend: Backend) -> AsyncIterator[None]:
    """Nobody else can read the results."""
    async with backend.database.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE taskiq_results IN ACCESS EXCLUSIVE MODE"))
        yield


async def test_a_page_does_not_wait_as_long_as_the_backend_tries(
    backend: Backend, reader: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "SECONDS", 0.1)
    async with locked(backend):
        for path in ("", "tasks", "task?id=1"):
            assert "PostgreSQL does not answer" in (await page_of(reader, path, 503)).text
    monkeypatch.undo()
    await page_of(reader, "")


async def test_pages_leave_connections_for_the_application(
    backend: Backend,
    reader: httpx.AsyncClient,
    tables: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "SECONDS", 0.5)
    most = 0
    async with locked(backend):
        asked = [asyncio.create_task(reader.get("tasks")) for _ in range(12)]
        while not all(task.done() for task in asked):
            rows = await tables.fetch(
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                "AND datname = current_database() AND query LIKE '%taskiq_results%'"
            )
            most = max(most, rows[0][0])
    assert 1 < most <= 3
    assert {task.result().status_code for task in asked} == {503}


async def test_a_search_that_takes_too_long_says_what_to_do(start_backend: BackendFactory) -> None:
    backend = await start_backend(command_timeout=0.3)
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client, locked(backend):
        page = await page_of(client, "tasks", 503)
    assert "The query took too long" in page.text
    assert "a shorter time window" in page.text


async def test_labels_stand_below_the_arguments(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    task_id = await store(backend, 1, labels={"user": 42})
    await backend.set_progress(task_id, progress_of({"x": 1}))
    running = await set_status(backend, "started")
    await backend.set_progress(running, progress_of({"x": 1}))
    expected = {
        task_id: [["Arguments", "Labels"], ["Return value", "Facts", "Progress"]],
        running: [["Facts"], ["Progress"]],
    }
    for each, columns in expected.items():
        answer = await reader.get("task", params={"id": each})
        parts = answer.text.split('<div class="column">')[1:]
        assert [re.findall("<h2 [^>]*>([^<]*)<", part) for part in parts] == columns


async def test_each_dashboard_shows_its_own_backend(
    backend: Backend, start_backend: BackendFactory
) -> None:
    other: SQLAlchemyResultBackend[Any] = await start_backend(table_name="others")
    await store(backend, name="shop:ours")
    async with (
        client_of(dashboard(backend, authorize=lambda _: "read", title="Ours")) as ours,
        client_of(dashboard(other, authorize=lambda _: "read"), f"{ORIGIN}/") as theirs,
    ):
        page = await page_of(ours, "tasks")
        assert "ours" in page.text
        assert "Ours" in page.text
        assert "shop:ours" not in (await page_of(theirs, "tasks")).text


async def test_a_task_that_is_lost_with_its_worker(
    backend: Backend, reader: httpx.AsyncClient, tables: Database
) -> None:
    await tables.fetch(
        "INSERT INTO taskiq_results_workers (worker, started_at, seen_at) "
        "VALUES ('dead', now() - interval '2 h', now() - interval '1 h'), ('alive', now(), now())"
    )
    task_id = await set_status(backend, "started", ago=4_000, worker="dead")
    page = await page_of(reader, "task", id=task_id)
    assert re.search(r"lost.*its worker stopped responding.*Lost", page.text, re.DOTALL)
    page = await page_of(reader, "workers")
    assert "1 worker without a heartbeat for a minute" in page.text
    assert re.search(r"silent\s+dead\s+1\s+1 h ago\s+2 h ago", page.text)
    assert re.search(r"alive\s+alive\s+0\s", page.text)


async def test_what_cannot_be_decoded_is_told(
    start_backend: BackendFactory, database: Database
) -> None:
    backend = await start_backend(serializer=JSONSerializer(), track="started")
    task_id = await store(backend, 1)
    await backend.set_progress(task_id, progress_of(50, "half of it"))
    await database.fetch("UPDATE taskiq_results_progress SET meta = 'x'")
    await database.fetch("UPDATE taskiq_results SET return_value = 'x'")
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        page = await page_of(client, "task", id=task_id)
        assert page.text.count("cannot decode") == 2
        assert "half of it" in page.text


async def test_it_stands_alone_with_a_lifespan(backend: Backend) -> None:
    """A server asks for one even where there is nothing to start."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[str] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await dashboard(backend, authorize=lambda _: "read")({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
