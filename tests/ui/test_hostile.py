"""What a task wrote is shown as it is, and does nothing: no markup, no pickle."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from taskiq import InMemoryBroker
from taskiq.serializers import CBORSerializer, JSONSerializer, ORJSONSerializer, PickleSerializer

from taskiq_sa_pg import SignedSerializer, TaskMetadataMiddleware, TaskStatus
from taskiq_sa_pg.codec.jsonb import wrap
from taskiq_sa_pg.ui import dashboard
from taskiq_sa_pg.ui.charts import HEIGHT
from tests.conftest import BackendFactory, Database
from tests.tasks import new_id, progress_of
from tests.ui.conftest import OWN, Backend, client_of, raised, store
from tests.ui.html import check

EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><style>*{}</style>{{ 7*7 }}{% if %}"
    "<hx-partial>javascript:alert(3)\u202eevil\u200b"
)
# Where a browser would take it for something else than text.
SIGNS = ("<script>alert", "<img src=x", "<style>", "<hx-partial", "\u202e", "\u200b")


async def hostile_page(client: Any, path: str, status: int = 200, **query: Any) -> str:
    answer = await client.get(path, params=query or None)
    assert answer.status_code == status, answer.text
    for sign in SIGNS:
        assert sign not in answer.text
    return str(check(answer.text, str(answer.url), "/").text)


async def test_everything_that_a_task_wrote_is_escaped(start_backend: BackendFactory) -> None:
    backend = await start_backend(
        field_for_payload="Jsonb", field_for_task_id="Text", track="started"
    )
    documents = {"args": json.dumps([EVIL]), "kwargs": json.dumps({EVIL: EVIL})}
    fields = {"name": EVIL, "worker": EVIL, "labels": {EVIL: EVIL}, **documents}
    values = await store(backend, {EVIL: EVIL}, task_id=f"value{EVIL}", **fields)
    error = raised(type(EVIL, (ValueError,), {})(EVIL))
    failed = await store(backend, error=error, task_id=f"error{EVIL}", **fields)
    running = f"running{EVIL}"
    await backend.set_status(TaskStatus(running, "started", EVIL, worker=EVIL))
    await backend.set_progress(running, progress_of({EVIL: EVIL}, EVIL))
    broker = InMemoryBroker()
    app = dashboard(backend, authorize=lambda _: "write", broker=broker, title=f"Tasks {EVIL}")
    async with client_of(app) as client:
        await hostile_page(client, "")
        assert "7*7" in await hostile_page(client, "tasks")
        for task_id in (values, failed, running):
            assert "7*7" in await hostile_page(client, "task", id=task_id)
            for change in ("forget", "rerun"):
                await hostile_page(client, change, id=task_id)
        assert "\\u202eevil\\u200b" in await hostile_page(client, "task", id=failed)
        await hostile_page(client, "task", 404, id=EVIL)
        await hostile_page(client, EVIL, 404)
        for name in ("outcome", "name", "worker", "argument", "window"):
            await hostile_page(client, "tasks", **{name: EVIL})
        await hostile_page(client, "tasks", label=f"{EVIL}={EVIL}")
        await hostile_page(client, "tasks", 400, after=EVIL)
        answer = await client.post("forget", params={"id": values}, headers=OWN)
        assert not any(sign in answer.text for sign in SIGNS)
        assert not await backend.is_result_ready(values)


async def test_invisible_characters_are_shown(backend: Backend) -> None:
    task_id = await store(backend, "a\x07b\x1b[31m\x85\ud800 tab\tline\nend", name="shop:\x7f")
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        text = await hostile_page(client, "task", id=task_id)
    assert "a␇b␛[31m\\u0085\\ud800 tab\tline\nend" in text
    assert "␡" in text


async def test_huge_values_are_cut_and_long_ids_are_links(start_backend: BackendFactory) -> None:
    backend = await start_backend(field_for_payload="Jsonb", field_for_task_id="Text")
    long_id = "i" * 2_000 + "/../?#%20&+ ü"
    await store(backend, "v" * 1_000_000, task_id=long_id, args=json.dumps([10**400, "a" * 10**6]))
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        answer = await client.get("tasks")
        [link] = check(answer.text, str(answer.url), "/").links("task")
        answer = await client.get(link)
        assert answer.status_code == 200
        assert "950,000 more characters" in answer.text
        assert "1" + "0" * 400 in answer.text
        assert len(answer.text) < 400_000


async def test_names_of_any_length_make_no_long_page(backend: Backend) -> None:
    huge = "n" * 1_000_000
    labels = {f"label{n}": "x" * 1_000 for n in range(5_000)}
    done = await store(backend, name=huge, worker=huge, labels=labels)
    running = new_id()
    await backend.set_status(TaskStatus(running, "started", huge, worker=huge))
    await backend.set_progress(running, progress_of({"x": huge}, huge))
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        for path in ("", "tasks", f"task?id={done}", f"task?id={running}"):
            answer = await client.get(path)
            assert answer.status_code == 200
            assert len(answer.text) < 120_000, path
        page = check((await client.get(f"task?id={done}")).text, "/", "/")
        assert "more, too many for this page" in page.text


async def test_odd_labels_ids_and_positions(backend: Backend) -> None:
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        odd: list[Any] = [["x"], {"x": 1}, 7, None, "x" * 1_000_000]
        for value in odd:
            task_id = await store(backend, labels={"rerun_of": value})
            text = await hostile_page(client, "task", id=task_id)
            assert "Run again from" not in text
        await hostile_page(client, "tasks", argument="9" * 5_000 + "=1")
        await hostile_page(client, "tasks", argument="[" * 5_000)
        # Not a stream that breaks off, which browsers would ask for again and again.
        await hostile_page(client, "follow", 404, id="\0")


@pytest.mark.parametrize("seconds", ["Infinity", "NaN", "-3"])
async def test_times_that_are_none(backend: Backend, tables: Database, seconds: str) -> None:
    task_id = await store(backend, 1, waited=-60)
    await tables.fetch("UPDATE taskiq_results SET execution_time = $1::text::float8", seconds)
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        for path in ("tasks", f"task?id={task_id}"):
            assert (await client.get(path)).status_code == 200
        overview = await client.get("")
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', overview.text)
    assert lines
    for point in " ".join(lines).split():
        assert 0 <= float(point.partition(",")[2]) <= HEIGHT


async def test_what_is_nested_too_deeply_is_told(backend: Backend, tables: Database) -> None:
    task_id = await store(backend, 1)
    deep = "[" * 5_000 + "]" * 5_000
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        for column in ("args", "labels", "return_value"):
            await tables.fetch(f"UPDATE taskiq_results SET {column} = $1::text::jsonb", deep)
            answer = await client.get("task", params={"id": task_id})
            assert answer.status_code == 500
            assert "nested too deeply" in answer.text


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("is_signed", [False, True])
async def test_nothing_is_unpickled_unless_the_application_says_so(
    start_backend: BackendFactory, database: Database, tmp_path: Path, is_signed: bool
) -> None:
    flag = tmp_path / "unpickled"
    serializer: Any = PickleSerializer()
    if is_signed:
        serializer = SignedSerializer(serializer, ["a secret of the tests"])
    backend = await start_backend(serializer=serializer, track="started")
    dumped = backend.settings.codec.serializer.dumpb(Bomb(flag))
    serializer.loadb(dumped)
    flag.unlink()  # so the test would see it
    stored = [
        await store(backend, 1, args="[]", kwargs="{}"),
        await store(backend, error=ValueError("text of it")),
    ]
    await database.fetch(
        "UPDATE taskiq_results SET return_value = $1, error = CASE WHEN is_err THEN $1::bytea END",
        dumped,
    )
    labels = json.dumps({"bomb": wrap(dumped)})
    await database.fetch("UPDATE taskiq_results SET labels = $1::jsonb", labels)
    running = new_id()
    await backend.set_status(TaskStatus(running, "started", "shop:pack"))
    await backend.set_progress(running, progress_of(50, "half of it"))
    await database.fetch("UPDATE taskiq_results_progress SET meta = $1", dumped)
    broker = InMemoryBroker().with_result_backend(backend)
    app = dashboard(backend, authorize=lambda _: "write", broker=broker)
    async with client_of(app) as client:
        paths = ["", "tasks", "tasks?label=bomb%3Dx", "workers"]
        paths += [
            f"{page}?id={t}" for t in (*stored, running) for page in ("task", "forget", "rerun")
        ]
        paths += [f"follow?id={task_id}" for task_id in stored]
        for path in paths:
            assert (await client.get(path)).status_code == 200, path
        page = await client.get("task", params={"id": stored[0]})
        assert "show_values=True" in page.text
        assert "PickleSerializer" in page.text or is_signed
        page = await client.get("task", params={"id": stored[1]})
        assert "text of it" in page.text
        assert "half of it" in (await client.get("task", params={"id": running})).text
        answer = await client.post("rerun", params={"id": stored[0]}, headers=OWN)
        assert answer.status_code == 409
        assert "show_values=True" in answer.text
        assert not flag.exists()
    shows = dashboard(backend, authorize=lambda _: "read", show_values=True)
    async with client_of(shows) as client:
        await client.get("task", params={"id": stored[0]})
    assert flag.exists()  # so the test would have seen it


@pytest.mark.parametrize(
    ("serializer", "is_shown"),
    [
        (JSONSerializer(), True),
        (ORJSONSerializer(), True),
        (SignedSerializer(JSONSerializer(), ["a secret of the tests"]), True),
        (CBORSerializer(), False),
        (PickleSerializer(), False),
        (type("Own", (JSONSerializer,), {})(), False),
    ],
)
async def test_values_of_json_are_shown(
    start_backend: BackendFactory, serializer: Any, is_shown: bool
) -> None:
    backend = await start_backend(serializer=serializer)
    task_id = await store(backend, "what it returned")
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        page = await client.get("task", params={"id": task_id})
        assert ("what it returned" in page.text) == is_shown
        assert ("show_values=True" in page.text) != is_shown


async def test_values_of_any_kind_are_shown_if_the_application_says_so(
    start_backend: BackendFactory, database: Database
) -> None:
    backend = await start_backend()
    values = [{(1, 2): {3}}, b"\xff", pickle.PickleError("as a value"), 1e999]
    stored = [await store(backend, value) for value in values]
    broken = await store(backend, 1)
    await database.fetch("UPDATE taskiq_results SET return_value = 'x' WHERE task_id = $1", broken)
    app = dashboard(backend, authorize=lambda _: "read", show_values=True)
    async with client_of(app) as client:
        shown = [await hostile_page(client, "task", id=task_id) for task_id in stored]
        assert "{(1, 2): {3}}" in shown[0]
        assert "b'\\xff'" in shown[1]
        assert "PickleError('as a value')" in shown[2]
        assert "Infinity" in shown[3]
        assert "cannot decode" in await hostile_page(client, "task", id=broken)


async def test_a_task_is_run_again_once_somebody_has_said_so(start_backend: BackendFactory) -> None:
    backend = await start_backend(field_for_payload="Jsonb", track="started")
    broker = InMemoryBroker(await_inplace=True).with_result_backend(backend)
    broker.add_middlewares(TaskMetadataMiddleware(record_args=True))
    ran: list[int] = []

    @broker.task("shop:pack")
    async def pack(order_id: int) -> int:
        ran.append(order_id)
        return order_id

    sent = await pack.kicker().with_labels(user="ada").kiq(7)
    app = dashboard(backend, authorize=lambda _: "write", broker=broker)
    async with client_of(app) as client:
        page = await client.get("task", params={"id": sent.task_id})
        [link] = check(page.text, str(page.url), "/").links("rerun")
        assert "Run this task again?" in (await client.get(link)).text
        assert ran == [7]
        answer = await client.post(link, headers=OWN)
        assert answer.status_code == 303
        assert answer.headers["Location"].startswith("./task?id=")
        assert ran == [7, 7]
        page = await client.get(answer.headers["Location"])
        assert sent.task_id in page.text
        again = check(page.text, str(page.url), "/").links("task")
        assert again == [f"./task?id={sent.task_id}"]
        first = await client.get(again[0])
        [later] = [
            a for a in check(first.text, str(first.url), "/").links("tasks") if "rerun_of" in a
        ]
        assert len(check((await client.get(later)).text, str(first.url), "/").links("task")) == 1
        unrecorded = await store(backend, 1)
        answer = await client.post("rerun", params={"id": unrecorded}, headers=OWN)
        assert answer.status_code == 409
        assert "not recorded" in answer.text
        answer = await client.post("rerun", params={"id": "nobody"}, headers=OWN)
        assert answer.status_code == 404


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


async def test_an_error_that_has_no_text_is_shown(backend: Backend) -> None:
    task_id = await store(backend, error=raised(SpeechlessError()))
    async with client_of(dashboard(backend, authorize=lambda _: "read")) as client:
        page = await hostile_page(client, "task", id=task_id)
    assert "(no text: str() raised RuntimeError)" in page
