"""The broker's queues, its parked tasks and its schedules on pages."""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from html import unescape
from urllib.parse import urlencode

import httpx
import pytest

from taskiq_sa_pg import SQLAlchemyBroker
from taskiq_sa_pg.database import make_engine
from taskiq_sa_pg.ui import dashboard
from taskiq_sa_pg.ui.when import cron_in_words
from tests.conftest import Database
from tests.ui.conftest import OWN, Backend, client_of

NONE = "\u2013"

HOSTILE = "<script>alert('x')</script>\x1b\u202e"

FILL = """
    INSERT INTO taskiq_results_queue
        (task_id, queue_name, task_name, message, available_at, worker, deliveries, queued_at)
    SELECT 'p' || i, 'mail', 'shop:send', '', 'infinity', 'host:1', 6, now() - interval '1 h' / i
    FROM generate_series(1, 3) AS i;
    INSERT INTO taskiq_results_queue (task_id, task_name, message, available_at, worker) VALUES
        ('waits', 'shop:pay', '', now() - interval '5 min', NULL),
        ('waits too', 'shop:pay', '', now(), NULL),
        ('delayed', 'shop:pay', '', now() + interval '1 h', NULL),
        ('running', 'shop:pay', '', now() + interval '1 min', 'host:1');
"""


@pytest.fixture
async def broker(database: Database, backend: Backend) -> AsyncIterator[SQLAlchemyBroker]:
    """Started, with tables of its own beside those of the backend."""
    broker = SQLAlchemyBroker(database.dsn, check_schema="off").with_result_backend(backend)
    engine = make_engine(database.direct_dsn)
    tables = [broker.models.queue_table, broker.models.schedules_table]
    async with engine.begin() as connection:
        await connection.run_sync(
            broker.models.metadata.create_all, tables=[each for each in tables if each is not None]
        )
    await engine.dispose()
    await broker.startup()
    yield broker
    await broker.shutdown()


@pytest.fixture
async def writer(backend: Backend, broker: SQLAlchemyBroker) -> AsyncIterator[httpx.AsyncClient]:
    app = dashboard(backend, broker=broker, authorize=lambda _: "write")
    async with client_of(app) as client:
        yield client


@pytest.fixture
async def onlooker(backend: Backend, broker: SQLAlchemyBroker) -> AsyncIterator[httpx.AsyncClient]:
    app = dashboard(backend, broker=broker, authorize=lambda _: "read")
    async with client_of(app) as client:
        yield client


async def parked_ids(database: Database) -> list[str]:
    query = "SELECT task_id FROM taskiq_results_queue WHERE available_at = 'infinity' ORDER BY 1"
    return [row["task_id"] for row in await database.fetch(query)]


async def fill(database: Database, script: str = FILL) -> None:
    for statement in filter(str.strip, script.split(";")):
        await database.fetch(statement)


async def text_of(client: httpx.AsyncClient, url: str) -> str:
    page = await client.get(url)
    assert page.status_code == 200, page.text
    return page.text


def row_of(page: str, word: str) -> str:
    """The table's row with a word, without its markup."""
    [row] = [row for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL) if word in row]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", row)).split())


async def test_queues_are_shown_with_their_depth(
    onlooker: httpx.AsyncClient, database: Database
) -> None:
    assert "The queues are empty" in await text_of(onlooker, "queues")
    await fill(database)
    page = await text_of(onlooker, "queues")
    assert row_of(page, "pay") == "default pay shop 2 5 min 1 1 0"
    assert row_of(page, "send") == f"mail send shop 0 {NONE} 0 0 3"
    assert 'href="./parked?queue=mail&amp;task=shop%3Asend"' in page
    assert "the oldest for 5 min" in page


async def test_counting_stops_and_says_so(onlooker: httpx.AsyncClient, database: Database) -> None:
    await database.fetch(
        "INSERT INTO taskiq_results_queue (task_id, task_name, message) "
        "SELECT i, 't', '' FROM generate_series(1, 10001) i"
    )
    assert row_of(await text_of(onlooker, "queues"), "10,000").startswith("default t 10,000+ ")


@pytest.mark.parametrize("query", ["", "id=", "id=p1&all=1"])
async def test_a_change_is_of_one_task_or_of_all(writer: httpx.AsyncClient, query: str) -> None:
    for page in ("release", "discard"):
        assert (await writer.get(f"{page}?{query}")).status_code == 400
        assert (await writer.post(f"{page}?{query}", headers=OWN)).status_code == 400


async def test_parked_tasks_are_found_by_queue_and_task(
    onlooker: httpx.AsyncClient, database: Database
) -> None:
    assert "No task is parked" in await text_of(onlooker, "parked")
    await fill(database)
    page = await text_of(onlooker, "parked")
    assert row_of(page, ">p1<") == "send shop mail 5 host:1 1 h ago p1"
    assert page.index(">p1<") < page.index(">p3<"), "the first that was sent first"
    assert "p1" in await text_of(onlooker, "parked?queue=mail&task=shop:send")
    for query in ("queue=other", "task=shop:pay", "queue=mail&task=shop"):
        assert "No parked task matches the filter" in await text_of(onlooker, f"parked?{query}")


async def test_one_is_released_after_a_question(
    writer: httpx.AsyncClient, database: Database
) -> None:
    await fill(database)
    assert 'href="./release?id=p1"' in await text_of(writer, "parked")
    question = await text_of(writer, "release?id=p1")
    assert "Release task p1?" in question
    assert await parked_ids(database) == ["p1", "p2", "p3"], "it has only asked"
    done = await writer.post("release?id=p1", headers=OWN)
    assert (done.status_code, done.headers["location"]) == (303, "./parked?released=1")
    assert await parked_ids(database) == ["p2", "p3"]
    assert "1 task released" in await text_of(writer, "parked?released=1")


async def test_all_of_a_filter_are_discarded_after_a_question(
    writer: httpx.AsyncClient, database: Database
) -> None:
    await fill(database)
    await database.fetch("UPDATE taskiq_results_queue SET queue_name='q' WHERE task_id = 'p2'")
    page = await text_of(writer, "parked?queue=mail")
    assert 'href="./discard?all=1&amp;queue=mail"' in page
    question = await text_of(writer, "discard?all=1&queue=mail")
    assert "Discard 2 parked tasks in queue mail?" in question
    assert 'href="./parked?queue=mail"' in question
    done = await writer.post("discard?all=1&queue=mail", headers=OWN)
    assert done.headers["location"] == "./parked?queue=mail&discarded=2"
    assert await parked_ids(database) == ["p2"]
    nothing_left = await writer.get("discard?all=1&queue=mail")
    assert nothing_left.status_code == 303


@pytest.mark.parametrize("page", ["release", "discard"])
async def test_nothing_changes_without_the_right_to(
    writer: httpx.AsyncClient, onlooker: httpx.AsyncClient, database: Database, page: str
) -> None:
    """Nor without an Origin of its own, nor by a GET, nor without saying which."""
    await fill(database)
    assert "Release" not in await text_of(onlooker, "parked")
    for url in (f"{page}?id=p1", f"{page}?all=1"):
        assert (await onlooker.get(url)).status_code == 403
        assert (await onlooker.post(url, headers=OWN)).status_code == 403
        assert (await writer.post(url)).status_code == 403
        foreign = await writer.post(url, headers={"Origin": "http://evil.test"})
        assert foreign.status_code == 403
        assert (await writer.get(url)).status_code == 200
    for url in (page, f"{page}?queue=mail", f"{page}?id=p1&all=1"):
        assert (await writer.post(url, headers=OWN)).status_code == 400
    assert await parked_ids(database) == ["p1", "p2", "p3"]


async def test_hostile_names_are_text_and_lead_back_to_themselves(
    writer: httpx.AsyncClient, database: Database
) -> None:
    task_id = f"{HOSTILE}\r\n&id=p1"
    await database.fetch(
        "INSERT INTO taskiq_results_queue (task_id, queue_name, task_name, message, available_at, "
        "worker) VALUES ($1, $2, $2, '', 'infinity', $2)",
        task_id,
        HOSTILE,
    )
    await database.fetch(
        "INSERT INTO taskiq_results_schedules (schedule_id, task_name, interval, message) "
        "VALUES ($1, $1, interval '1 s', $2)",
        HOSTILE,
        json.dumps({"args": [HOSTILE, 2**70], "kwargs": {}, "cron_offset": None}).encode(),
    )
    for url in ("queues", "parked", f"release?{urlencode({'id': task_id})}", "schedules"):
        page = await text_of(writer, url)
        assert "<script>alert" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page
    assert str(2**70) in page
    url = f"discard?{urlencode({'id': task_id})}"
    assert url in (await text_of(writer, "parked")).replace("&amp;", "&")
    assert (await writer.post(url, headers=OWN)).status_code == 303
    assert await parked_ids(database) == []
    for url in ("parked?queue=a%00", "parked?task=" + "x" * 9000):
        assert (await writer.get(url)).status_code == 400
    assert (await writer.post("release?id=a%00", headers=OWN)).status_code == 404


async def test_schedules_are_shown_in_words(
    onlooker: httpx.AsyncClient, database: Database
) -> None:
    assert "Nothing is scheduled" in await text_of(onlooker, "schedules")
    message = json.dumps({"args": [1], "kwargs": {"to": "me"}, "cron_offset": "Europe/Berlin"})
    await database.fetch(
        "INSERT INTO taskiq_results_schedules (schedule_id, task_name, cron, interval, time, "
        "message, last_tick) VALUES "
        "('c', 'report', '30 6 * * 1-5', NULL, NULL, $1, NULL),"
        "('i', 'sweep', NULL, interval '10 min', NULL, 'x', now() - interval '1 h'),"
        "('t', 'remind', NULL, NULL, now() + interval '2 days 1 h', $1, NULL)",
        message.encode(),
    )
    page = await text_of(onlooker, "schedules")
    cron = row_of(page, "report")
    assert cron.startswith("report at 06:30 on Monday to Friday, Europe/Berlin 30 6 * * 1-5 never")
    assert '1, to="me"' in cron
    assert " in " in cron
    assert row_of(page, "sweep") == "sweep every 10 min 1 h ago 50 min ago overdue not JSON i"
    assert "1 schedule should have been sent before now" in page
    assert " in 2 d " in row_of(page, "remind")


async def test_without_our_broker_there_are_no_such_pages(
    backend: Backend, reader: httpx.AsyncClient
) -> None:
    assert "queues" not in await text_of(reader, "")
    for page in ("queues", "parked", "schedules", "release?id=x"):
        assert (await reader.get(page)).status_code == 404


async def test_what_cannot_be_asked_says_what_to_do(backend: Backend, database: Database) -> None:
    """A broker that is not started, and one without tables."""
    broker = SQLAlchemyBroker(database.dsn, check_schema="off").with_result_backend(backend)
    async with client_of(dashboard(backend, broker=broker, authorize=lambda _: "read")) as client:
        assert 'href="./queues"' in await text_of(client, "")
        page = await client.get("queues")
        assert page.status_code == 503
        assert "await broker.startup()" in page.text
        await broker.startup()
        for name in ("queues", "parked", "schedules"):
            page = await client.get(name)
            assert page.status_code == 503
            assert "taskiq-sa-pg upgrade --queue" in page.text
        await broker.shutdown()


async def test_a_table_of_another_shape_is_not_taken_for_a_missing_one(
    onlooker: httpx.AsyncClient, database: Database
) -> None:
    await database.fetch("ALTER TABLE taskiq_results_queue RENAME deliveries TO another")
    page = await onlooker.get("parked")
    assert page.status_code == 503
    assert "upgrade --queue" not in page.text


async def test_models_without_schedules_have_no_page_of_them(
    backend: Backend, broker: SQLAlchemyBroker
) -> None:
    broker.models = replace(broker.models, Schedule=None)
    async with client_of(dashboard(backend, broker=broker, authorize=lambda _: "read")) as client:
        assert 'href="./schedules"' not in await text_of(client, "queues")
        assert (await client.get("schedules")).status_code == 404


@pytest.mark.parametrize(
    ("cron", "words"),
    [
        ("* * * * *", "every minute"),
        ("*/5 * * * *", "every 5 minutes"),
        ("0 * * * *", "every hour"),
        ("30 * * * *", "30 minutes past every hour"),
        ("1 */2 * * *", "every 2 hours, 1 minute past"),
        ("5 4 * * *", "at 04:05 every day"),
        ("0 8,12,18 * * mon", "at 08:00, 12:00 and 18:00 on Monday"),
        ("0 0 1 * *", "at 00:00 on day 1 of the month"),
        ("0 0 1 1,7 *", "at 00:00 on day 1 of the month in January and July"),
        ("* * * * 0", "every minute on Sunday"),
        # What has no short words.
        ("0-5 * * * *", ""),
        ("0-5 4 * * *", ""),
        ("0 0 13 * 5", ""),
        ("0 0 * * 9", ""),
        ("0 0 * 13 *", ""),
        ("nonsense", ""),
        ("a b c d e", ""),
    ],
)
def test_cron_expressions_have_words(cron: str, words: str) -> None:
    assert cron_in_words(cron) == words
