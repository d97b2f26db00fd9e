"""Every Python block of README.md runs, in order and in one namespace; what it makes works."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from taskiq import TaskiqResult

from taskiq_sa_pg.engines import make_engine
from tests.conftest import BackendFactory, Database

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def readme(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that README.md's blocks define."""
    monkeypatch.setenv("TASKIQ_SA_PG_DSN", database.dsn)
    module = ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # where taskiq looks for its tasks
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    document.namespace = vars(module)
    for example in document.examples():
        example.evaluate()
    yield document.namespace
    del sys.modules["quickstart"]  # progress.py has imported it, with this test's address


async def test_the_query_of_the_last_hours_failures_counts_them_by_type(
    readme: dict[str, Any], database: Database, start_backend: BackendFactory
) -> None:
    backend = await start_backend()
    failure = TaskiqResult(
        is_err=True, return_value=None, execution_time=0.1, error=ValueError("wrong")
    )
    await backend.set_result("failed", failure)
    await backend.set_result("failed too", failure)
    await backend.set_result(
        "succeeded", TaskiqResult(is_err=False, return_value=1, execution_time=0.1)
    )
    engine = make_engine(database.dsn)
    async with AsyncSession(engine) as session:
        counts = await readme["failures_of_the_last_hour"](session)
    await engine.dispose()
    assert counts == {"ValueError": 2}


def test_the_models_of_the_application_and_of_the_backend_are_made(readme: dict[str, Any]) -> None:
    assert set(readme["Base"].metadata.tables) == {"taskiq_results", "taskiq_results_progress"}
    assert readme["backend"].models.config.field_for_task_id == "Uuid"
