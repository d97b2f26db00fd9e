"""Ids and payloads that PostgreSQL or the user does not want, beside others that it does."""

import asyncio
import random
import string
from typing import Any

import pytest
from taskiq.serializers import JSONSerializer, PickleSerializer

from taskiq_sa_pg import (
    InvalidTaskIdError,
    PayloadTooLargeError,
    ResultDecodeError,
    ResultSerializationError,
    SignedSerializer,
)
from tests.conftest import BackendFactory, Database
from tests.tasks import progress_of, result_of

LONGEST = 2692


def incompressible(length: int) -> str:
    return "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=length))


@pytest.mark.parametrize("kind", ["VarChar", "Text"])
async def test_the_longest_id_is_stored_and_a_longer_one_is_refused(
    kind: str, start_backend: BackendFactory
) -> None:
    backend = await start_backend(field_for_task_id=kind)
    longest = incompressible(LONGEST)
    await backend.set_result(longest, result_of(1))
    await backend.set_progress(longest, progress_of(1))
    assert (await backend.wait_result(longest, timeout=5)).return_value == 1
    for longer in (longest + "x", "ü" * (LONGEST // 2) + "x", "x" * 100_000):
        for call in (
            backend.set_result(longer, result_of(1)),
            backend.set_progress(longer, progress_of(1)),
            backend.is_result_ready(longer),
            backend.get_result(longer),
            backend.wait_result(longer),
        ):
            with pytest.raises(InvalidTaskIdError, match="longer than the 2692 bytes") as caught:
                await call
            assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("kind", "odd"),
    [("VarChar", "a\x00b"), ("Text", "\ud800"), ("VarChar", "x" * 3000), ("Uuid", "no uuid")],
)
async def test_the_neighbours_of_an_id_that_is_refused_are_stored(
    kind: str, odd: str, start_backend: BackendFactory
) -> None:
    backend = await start_backend(field_for_task_id=kind)
    task_ids = [f"{number:032x}" for number in range(100)]
    task_ids[50] = odd
    outcomes = await asyncio.gather(
        *[backend.set_result(task_id, result_of(task_id)) for task_id in task_ids],
        return_exceptions=True,
    )
    assert isinstance(outcomes.pop(50), InvalidTaskIdError)
    assert outcomes == [None] * 99
    del task_ids[50]
    assert set(await backend.get_results(task_ids)) == set(task_ids)


@pytest.mark.parametrize("payload", ["Bytea", "Jsonb"])
async def test_a_result_that_is_too_large_becomes_an_error(
    payload: str, start_backend: BackendFactory
) -> None:
    backend = await start_backend(field_for_payload=payload, max_payload_bytes=1000)
    serializer = JSONSerializer() if payload == "Jsonb" else PickleSerializer()
    overhead = len(serializer.dumpb("x" * 900)) - 900
    sizes = {"fits": 1000 - overhead, "small": 1, "too large": 1001 - overhead, "huge": 5_000_000}
    await asyncio.gather(
        *[backend.set_result(name, result_of("x" * size)) for name, size in sizes.items()]
    )
    results = await backend.get_results(sizes)
    for name in ("small", "fits"):
        assert (results[name].is_err, results[name].return_value) == (False, "x" * sizes[name])
    for name in ("too large", "huge"):
        result = results[name]
        assert (result.is_err, result.return_value) == (True, None)
        assert isinstance(result.error, PayloadTooLargeError)
        assert "the return value takes" in str(result.error)
        assert "the limit is 1000" in str(result.error)


@pytest.mark.parametrize("track", [None, "started"])
async def test_what_postgresql_finds_too_large_becomes_an_error(
    database: Database, start_backend: BackendFactory, track: str | None
) -> None:
    """As jsonb does with many numbers, each of which takes more than in JSON."""
    backend = await start_backend(field_for_payload="Jsonb", track=track)
    await database.fetch(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE 'exceeds the maximum' USING ERRCODE = '54000'; END $$"
    )
    await database.fetch(
        "CREATE TRIGGER refuse BEFORE INSERT ON taskiq_results FOR EACH ROW "
        "WHEN (length(NEW.return_value::text) > 100) EXECUTE FUNCTION refuse()"
    )
    values = {str(number): [7] * (100 if number == 5 else 1) for number in range(10)}
    labels = {"queue": "a"}
    await asyncio.gather(
        *[backend.set_result(i, result_of(value, labels=labels)) for i, value in values.items()]
    )
    results = await backend.get_results(values)
    assert {i: result.return_value for i, result in results.items()} == values | {"5": None}
    assert [i for i, result in results.items() if result.is_err] == ["5"]
    assert isinstance(results["5"].error, ResultSerializationError)
    assert "type list: " in str(results["5"].error)
    assert "exceeds the maximum" in str(results["5"].error)
    assert results["5"].labels == labels


async def test_an_exception_that_is_too_large_leaves_its_name(
    start_backend: BackendFactory,
) -> None:
    backend = await start_backend(max_payload_bytes=1000)
    await backend.set_result("task", result_of(None, is_err=True, error=ValueError("x" * 5000)))
    result = await backend.get_result("task")
    assert result.is_err
    assert isinstance(result.error, ResultSerializationError)
    assert "ValueError" in str(result.error)
    assert "the limit is 1000" in str(result.error)


@pytest.mark.parametrize("payload", ["Bytea", "Jsonb"])
async def test_the_error_for_a_result_may_exceed_the_limit(
    payload: str, start_backend: BackendFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """And the one for a value that cannot be serialized, whose causes are long."""

    class Unserializable:
        def __reduce__(self) -> str:
            raise TypeError("cannot be copied" + "x" * 5000)

    backend = await start_backend(field_for_payload=payload, max_payload_bytes=100)
    values = {"too large": "x" * 101, "unserializable": Unserializable()}
    for task_id, value in values.items():
        await backend.set_result(task_id, result_of(value))
    results = await backend.get_results(values)
    assert isinstance(results["too large"].error, PayloadTooLargeError)
    assert "the return value takes" in str(results["too large"].error)
    assert isinstance(results["unserializable"].error, ResultSerializationError)
    assert "cannot serialize the return value" in str(results["unserializable"].error)
    assert len(caplog.records) == 2
    assert not [record for record in caplog.records if record.exc_info]


async def test_progress_that_is_too_large_is_refused(start_backend: BackendFactory) -> None:
    backend = await start_backend(max_payload_bytes=100)
    await backend.set_progress("task", progress_of("before"))
    with pytest.raises(PayloadTooLargeError, match="the progress metadata"):
        await backend.set_progress("task", progress_of("x" * 100))
    assert (await backend.get_progress("task")).meta == "before"


@pytest.mark.parametrize("keep_results", [True, False], ids=["kept", "taken"])
async def test_a_payload_without_a_signature_is_refused_and_stays(
    database: Database, start_backend: BackendFactory, keep_results: bool
) -> None:
    key = "a key of 16 bytes"
    forger = await start_backend()
    reader: Any = await start_backend(
        serializer=SignedSerializer(PickleSerializer(), [key]), keep_results=keep_results
    )
    await forger.set_result("forged", result_of("forged"))
    await forger.set_progress("forged", progress_of("forged"))
    await reader.set_result("signed", result_of("signed"))
    for read in (reader.get_result, reader.get_progress):
        with pytest.raises(ResultDecodeError, match="not signed with one of the keys"):
            await read("forged")
    assert (await reader.get_result("signed")).return_value == "signed"
    rows = await database.fetch("SELECT FROM taskiq_results WHERE task_id = 'forged'")
    assert len(rows) == 1
