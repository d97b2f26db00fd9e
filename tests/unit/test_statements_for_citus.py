"""Every statement of the package, found by itself: none has what Citus refuses.

On the cluster itself `make test-citus` runs them; here nothing new is forgotten.
"""

import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, get_origin, get_type_hints

from sqlalchemy import Executable, true

from taskiq_sa_pg import SQLAlchemyBroker, SQLAlchemyResultBackend, build_models, statements
from taskiq_sa_pg import statements as sql
from taskiq_sa_pg.broker.methods import QueueMethods
from tests.citus import operations, queue_operations
from tests.unit.sql import compiled

MODELS = build_models(queue=True)
NOW = datetime(2026, 1, 1, tzinfo=UTC)

# What a function is called with, by the names of its parameters.
ARGUMENTS: dict[str, list[Any]] = {
    "models": [MODELS],
    "results": [MODELS.results_table],
    "status": [MODELS.status_table],
    "workers": [MODELS.workers_table],
    "queue": [MODELS.queue_table],
    "schedules": [MODELS.schedules_table],
    "source": list(MODELS.other_tables),
    "column": [MODELS.results_table.c.expires_at, MODELS.results_table.c.task_id],
    "conditions": [[]],
    "where": [[true()]],
    "order_by": [[MODELS.results_table.c.task_id]],
    "span": [sql.Span(NOW, NOW), sql.Span(NOW, NOW, "a")],
    "part": [sql.Slice(None, None, 1), sql.Slice(None, NOW, 1), sql.Slice(NOW, NOW, 1)],
    "start": [None],
    "limit": [1],
    "size": [1],
    "statement_timeout": [1.0],
}

ROWS: dict[str, Any] = {
    "upsert_results": sql.ResultRow,
    "insert_results": sql.ResultRow,
    "upsert_progress": sql.ProgressRow,
    "insert_progress": sql.ProgressRow,
    "upsert_status": sql.StatusRow,
    "enqueue_tasks": sql.QueueRow,
    "insert_old_tasks": sql.OldTask,
    "upsert_schedule": sql.ScheduleRow,
}

# Parts of the statements of others.
PARTS = {"replacing_claimed"}

LOCKING = {
    "claim_tasks": "a worker waits for nobody: the queue is a table of one node",
    "renew_claims": "so does whoever renews",
}


def functions() -> Iterator[Callable[..., Any]]:
    """Those of the package that make statements."""
    for module_info in pkgutil.iter_modules(statements.__path__):
        module = importlib.import_module(f"{statements.__name__}.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            is_own = function.__module__ == module.__name__ and not name.startswith("_")
            if is_own and name not in PARTS and makes_statements(function):
                yield function


def makes_statements(function: Callable[..., Any]) -> bool:
    returned = get_type_hints(function)["return"]
    type_ = get_origin(returned) or returned
    return isinstance(type_, type) and issubclass(type_, (Executable, sql.Upsert))


def texts_of(function: Callable[..., Any]) -> list[str]:
    """Its statements, with all combinations of its arguments."""
    hints = get_type_hints(function)
    choices = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if hints[name] is bool:
            choices[name] = [False, True]
        elif parameter.default is inspect.Parameter.empty:
            choices[name] = ARGUMENTS[name]
    found = [
        function(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]
    return [" ".join(compiled(each).split()) for one in found for each in made_of(function, one)]


def made_of(function: Callable[..., Any], made: Any) -> list[Any]:
    if not isinstance(made, sql.Upsert):
        return [made]
    fields = ROWS[function.__name__]
    rows = [fields._make(str(number) for _ in fields._fields) for number in range(2)]
    return [statement for some in (rows[:1], rows) for statement, _ in made.of(some)]


FOUND = {function.__name__: texts_of(function) for function in functions()}


def test_there_are_many() -> None:
    assert len(FOUND) > 40
    assert all(FOUND.values())


def test_rows_are_locked_by_the_queue_alone() -> None:
    """Of distributed tables: "could not run distributed query with FOR UPDATE/SHARE commands"."""
    locking = {name for name, texts in FOUND.items() if any("FOR UPDATE" in t for t in texts)}
    assert locking == LOCKING.keys()


def test_no_time_of_its_own_is_in_what_overwrites() -> None:
    """Citus wants nothing there that is not IMMUTABLE."""
    overwriting = 0
    for text in itertools.chain(*FOUND.values()):
        for assigned in re.findall(r"DO UPDATE SET (.*?)(?: WHERE | RETURNING |$)", text):
            overwriting += 1
            assert "now()" not in assigned
            # A time and an interval give a time by the session's time zone.
            assert not re.search(r"_at [+-] \(?interval", assigned)
    assert overwriting > 20


def test_advisory_locks_are_taken_once() -> None:
    """In a statement on distributed tables, every shard would take one."""
    for name, texts in FOUND.items():
        for text in texts:
            assert "advisory" not in text or name == "begin_slice", text


def test_each_public_method_is_run_on_the_cluster() -> None:
    source = inspect.getsource(operations) + inspect.getsource(queue_operations)
    called = set(re.findall(r"\.(\w+)", source))
    public = {
        name
        for owner in (SQLAlchemyResultBackend, QueueMethods, SQLAlchemyBroker)
        for name, _ in inspect.getmembers(owner, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    public |= {"as_completed", "watch_progress", "iter_results", "decode", "stats", "in_session"}
    # Of taskiq, which calls them itself; or between our own parts.
    of_others = {"startup", "shutdown", "kick", "listen", "hold", "let_go", "end_worker"}
    of_others |= {"expect_worker"}
    assert public - of_others - called == set()
