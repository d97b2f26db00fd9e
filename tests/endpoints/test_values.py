"""Values that JSON cannot hold are told all the same, and are never a 500."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel

from taskiq_sa_pg.endpoints import Progress, TaskAnswer, TaskPage, TaskSummary
from taskiq_sa_pg.endpoints.answers import to_json
from tests.endpoints.served import Backend, client_of, make_app
from tests.tasks import new_id, progress_of, result_of


class Custom:
    pass


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


@dataclass
class Point:
    x: int
    y: float


class Parcel(BaseModel):
    label: str


def cycle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def deep(levels: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested]
    return nested


JSON_ABLE = {
    "bytes": (b"\xff\x00", "_wA="),
    "bytes as a key": ({b"\xff": 1}, {"_w==": 1}),
    "NaN": ([math.nan, math.inf, -math.inf], [None, None, None]),
    "big integer": (2**200, 2**200),
    "set": ({1}, [1]),
    "tuple": ((1, (2,)), [1, [2]]),
    "tuple as a key": ({(1, 2): 3}, {"1,2": 3}),
    "None as a key": ({None: 1}, {"None": 1}),
    "decimal": (Decimal("1.10"), "1.10"),
    "time": (datetime(2030, 1, 2, tzinfo=UTC), "2030-01-02T00:00:00Z"),
    "dataclass": (Point(1, 2.5), {"x": 1, "y": 2.5}),
    "model": (Parcel(label="<b>"), {"label": "<b>"}),
    "lone surrogate": ("\ud800", "\ud800"),
    "NUL": ("\x00", "\x00"),
}


async def test_a_value_has_its_json_able_form(backend: Backend) -> None:
    async with client_of(make_app(backend)) as client:
        for kind, (value, expected) in JSON_ABLE.items():
            task_id = new_id()
            await backend.set_result(task_id, result_of(value))
            response = await client.get(f"/tasks/{task_id}")
            assert response.status_code == 200, kind
            assert response.json()["value"] == expected, kind


@pytest.mark.parametrize(
    "make",
    [Custom, Unspeakable, cycle, lambda: deep(100_000), lambda: 10**5_000, lambda: {"\ud800": 1}],
    ids=["custom", "unspeakable", "cycle", "deep", "too big", "surrogate as a key"],
)
def test_what_has_none_is_described(make: Callable[[], Any]) -> None:
    value = make()
    answer = TaskAnswer.model_construct(
        **{**dict(TaskAnswer(task_id="1", state="succeeded")), "value": value}
    )
    told = json.loads(to_json(answer))
    assert told["task_id"] == "1"
    assert isinstance(told["value"], str)
    assert 0 < len(told["value"]) <= 500
    assert "0x" not in told["value"], "no addresses of memory"


def test_a_part_that_json_cannot_hold_leaves_the_others_as_they_are() -> None:
    answer = TaskAnswer(task_id="1", state="succeeded", value={"a": 1, "b": Custom()})
    value = json.loads(to_json(answer))["value"]
    assert value["a"] == 1
    assert "Custom" in value["b"]


def test_progress_and_lists_keep_their_form_around_what_is_described() -> None:
    answer = TaskAnswer(task_id="1", state="started", progress=Progress(state="x", meta=10**5_000))
    assert json.loads(to_json(answer))["progress"] == {"state": "x", "meta": "<int>"}
    summary = TaskSummary.model_construct(task_id="1", labels={"n": 10**5_000})
    page = json.loads(to_json(TaskPage.model_construct(records=[summary, summary], next=None)))
    assert page == {"records": [{"task_id": "1", "labels": "<dict>"}] * 2, "next": None}


async def test_progress_that_json_cannot_hold_is_told(backend: Backend) -> None:
    task_id = new_id()
    await backend.set_progress(task_id, progress_of({"part": b"\xff", "ratio": math.nan}))
    async with client_of(make_app(backend)) as client:
        response = await client.get(f"/tasks/{task_id}")
    assert response.json()["progress"]["meta"] == {"part": "_w==", "ratio": None}
