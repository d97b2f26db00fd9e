"""Tables on a Citus cluster in each layout, and what works on them."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import quote
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped

from taskiq_sa_pg import (
    Models,
    ProgressMixin,
    QueueMixin,
    ResultMixin,
    ScheduleMixin,
    SQLAlchemyBroker,
    SQLAlchemyResultBackend,
    StatusMixin,
    TableConfig,
    TaskMetadataMiddleware,
    WorkerMixin,
)
from taskiq_sa_pg.models import PayloadField, TaskIdField
from taskiq_sa_pg.timings import Timings
from tests.conftest import assert_nothing_checked_out, shut_down
from tests.integration.engines import make

Backend = SQLAlchemyResultBackend[Any]

OFTEN: Final = Timings(between_beats=0.1, between_polls=0.2, first_reconnect=0.01)


class Layout(NamedTuple):
    """How tables lie on the cluster, and of which types their columns are."""

    kind: Literal["schema", "task_id"]
    task_id: TaskIdField
    payload: PayloadField

    def __str__(self) -> str:
        return "-".join(self)


LAYOUTS: Final = (
    Layout("schema", "VarChar", "Bytea"),
    Layout("schema", "Uuid", "Jsonb"),
    Layout("task_id", "VarChar", "Bytea"),
    Layout("task_id", "Uuid", "Jsonb"),
)

# Of the guide docs/how-to/citus.md, as they are.
DISTRIBUTE: Final = """
SELECT create_distributed_table('taskiq_results', 'task_id');
SELECT create_distributed_table(
    'taskiq_results_progress', 'task_id', colocate_with => 'taskiq_results'
);
SELECT create_distributed_table(
    'taskiq_results_status', 'task_id', colocate_with => 'taskiq_results'
);
SELECT create_reference_table('taskiq_results_workers');
"""


def models_of(config: TableConfig) -> Models:
    """All tables; results have a column of the application's own."""

    class Base(DeclarativeBase): ...

    class Result(ResultMixin, Base):
        __table_config__ = config
        customer: Mapped[str | None]

    class Progress(ProgressMixin, Base):
        __table_config__ = config

    class Status(StatusMixin, Base):
        __table_config__ = config

    class Worker(WorkerMixin, Base):
        __table_config__ = config

    class Queue(QueueMixin, Base):
        __table_config__ = config

    class Schedule(ScheduleMixin, Base):
        __table_config__ = config

    return Models(Result, Progress, Status, Queue, Schedule, Worker)


@dataclass(frozen=True)
class Tables:
    """A schema with all tables."""

    address: str
    layout: Layout
    schema: str = field(default_factory=lambda: f"test_{uuid4().hex}")

    @property
    def config(self) -> TableConfig:
        return TableConfig(
            field_for_task_id=self.layout.task_id,
            field_for_payload=self.layout.payload,
            schema=self.schema,
        )

    @property
    def environment(self) -> dict[str, str]:
        """Where the commands find them."""
        return {
            "TASKIQ_SA_PG_DSN": self.dsn("asyncpg"),
            "TASKIQ_SA_PG_SCHEMA": self.schema,
            "TASKIQ_SA_PG_FIELD_FOR_TASK_ID": self.layout.task_id,
            "TASKIQ_SA_PG_FIELD_FOR_PAYLOAD": self.layout.payload,
        }

    def dsn(self, driver: str) -> str:
        """Served by this driver; without the setting, each of asyncpg's connections takes 1 s."""
        separator = "&" if "?" in self.address else "?"
        options = quote("-c citus.override_table_visibility=off")
        scheme = f"postgresql+{driver}:"
        return f"{self.address.replace('postgresql:', scheme, 1)}{separator}options={options}"

    async def execute(self, script: str) -> None:
        """Runs SQL, which finds the tables without their schema's name."""
        await self._run("execute", script)

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """The same, for what has rows and parameters."""
        rows: list[asyncpg.Record] = await self._run("fetch", query, *args)
        return rows

    async def _run(self, method: str, *args: object) -> Any:
        settings = {"search_path": self.schema, "citus.override_table_visibility": "off"}
        connection = await asyncpg.connect(self.address, server_settings=settings)
        try:
            return await getattr(connection, method)(*args)
        finally:
            await connection.close()


@dataclass
class Place:
    """The tables through one driver, and what was started on them."""

    tables: Tables
    models: Models
    driver: str
    stack: AsyncExitStack

    @property
    def arguments(self) -> dict[str, Any]:
        return {"dsn": self.tables.dsn(self.driver), "models": self.models}

    def new_ids(self, count: int = 1) -> list[str]:
        """Task ids that are the same text in columns of every type."""
        return [str(uuid4()) for _ in range(count)]

    async def backend(self, timings: Timings = OFTEN, **options: Any) -> Backend:
        """Started; at the end it holds no connection."""
        backend: Backend = SQLAlchemyResultBackend(**{**self.arguments, **options})
        backend.settings = replace(backend.settings, timings=timings)
        await backend.startup()
        self.stack.push_async_callback(shut_down, [backend])
        return backend

    async def broker(self, **options: Any) -> SQLAlchemyBroker:
        """Started as in a worker's process, with results, statuses, metadata and a task `add`."""
        broker = SQLAlchemyBroker(**{**self.arguments, **options})
        broker.settings = replace(broker.settings, timings=OFTEN)
        backend: Backend = SQLAlchemyResultBackend(**self.arguments, track="started")
        backend.settings = replace(backend.settings, timings=OFTEN)
        broker = broker.with_result_backend(backend)
        broker = broker.with_id_generator(lambda: self.new_ids()[0])
        broker.add_middlewares(TaskMetadataMiddleware(record_args=True, worker=self.new_ids()[0]))
        broker.register_task(add, task_name="add")
        broker.is_worker_process = True
        await broker.startup()
        self.stack.push_async_callback(broker.shutdown)
        return broker

    def engine(self) -> AsyncEngine:
        """One of the application's."""
        engine = make(self.tables.dsn(self.driver))

        async def dispose() -> None:
            assert_nothing_checked_out(engine)
            await engine.dispose()

        self.stack.push_async_callback(dispose)
        return engine


async def add(one: int, two: int) -> int:
    return one + two
