"""What all commands share: the options that name the tables, and how errors are printed."""

import asyncio
import functools
import importlib
import inspect
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from sqlalchemy import NullPool
from taskiq import serializers
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.exceptions import TaskiqResultTimeoutError

from taskiq_sa_pg.backend import SQLAlchemyResultBackend
from taskiq_sa_pg.cli.output import complain
from taskiq_sa_pg.codec import Codec
from taskiq_sa_pg.database import Database
from taskiq_sa_pg.exceptions import ConfigurationError, InvalidTaskIdError, TaskiqSaPgError
from taskiq_sa_pg.models import DEFAULT_TABLE_NAME, Models, PayloadField, TaskIdField, build_models
from taskiq_sa_pg.results import Runtime, Settings
from taskiq_sa_pg.schema import SchemaCheck, select_sizes
from taskiq_sa_pg.telemetry import Telemetry

_SERIALIZERS: Final[dict[str, Callable[[], TaskiqSerializer]]] = {
    "pickle": serializers.PickleSerializer,
    "json": serializers.JSONSerializer,
    "orjson": serializers.ORJSONSerializer,
    "msgpack": serializers.MSGPackSerializer,
    "cbor": serializers.CBORSerializer,
}

# As typer's own.
_WRONG_COMMAND_LINE: Final = 2

# As a shell reports SIGPIPE.
_BROKEN_PIPE: Final = 141

TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", help="The task id.")]
TaskIds = Annotated[list[str], typer.Argument(metavar="TASK_IDS", help="Task ids.")]
TimeoutOption = Annotated[
    float | None, typer.Option(min=0, help="Seconds to wait; by default for ever.")
]


class Target:
    """The database and the tables of a command, from the shared options."""

    serializer_option = "--serializer"

    def __init__(
        self,
        dsn: Annotated[
            str | None,
            typer.Option(
                envvar="TASKIQ_SA_PG_DSN",
                help="The database: postgresql://user:password@host/database.",
            ),
        ] = None,
        table_name: Annotated[
            str, typer.Option(envvar="TASKIQ_SA_PG_TABLE_NAME", help="The results table.")
        ] = DEFAULT_TABLE_NAME,
        schema: Annotated[
            str | None,
            typer.Option(
                envvar="TASKIQ_SA_PG_SCHEMA",
                help="PostgreSQL schema of the tables; by default the search_path decides.",
            ),
        ] = None,
        field_for_task_id: Annotated[
            TaskIdField,
            typer.Option(
                envvar="TASKIQ_SA_PG_FIELD_FOR_TASK_ID", help="Type of the task id columns."
            ),
        ] = "VarChar",
        field_for_payload: Annotated[
            PayloadField,
            typer.Option(
                envvar="TASKIQ_SA_PG_FIELD_FOR_PAYLOAD", help="Type of the value columns."
            ),
        ] = "Bytea",
        serializer: Annotated[
            str | None,
            typer.Option(
                envvar="TASKIQ_SA_PG_SERIALIZER",
                help="Serializer of the tables: pickle, json, orjson, msgpack, cbor, or "
                "module:attribute. By default pickle, or json with Jsonb.",
            ),
        ] = None,
        listen_dsn: Annotated[
            str | None,
            typer.Option(
                envvar="TASKIQ_SA_PG_LISTEN_DSN",
                help="Database address for LISTEN: the server's own if --dsn is a transaction "
                "pooler, the primary's if --dsn is a read replica.",
            ),
        ] = None,
    ) -> None:
        self._dsn: Final = dsn
        self._listen_dsn: Final = listen_dsn
        self._serializer: Final = serializer
        self.models: Final = build_models(
            table_name,
            field_for_task_id=field_for_task_id,
            field_for_payload=field_for_payload,
            schema=schema,
        )
        self.config: Final = self.models.config

    @property
    def dsn(self) -> str:
        """The DSN; without one, a ConfigurationError is raised."""
        if not self._dsn:
            raise ConfigurationError(
                "no database: set TASKIQ_SA_PG_DSN, or pass --dsn postgresql://..."
            )
        return self._dsn

    @property
    def has_dsn(self) -> bool:
        """Whether a DSN was given."""
        return bool(self._dsn)

    @property
    def codec(self) -> Codec:
        """Decodes the values of the tables."""
        return Codec(self.config, self._find_serializer())

    def _find_serializer(self) -> TaskiqSerializer | None:
        return find_serializer(self._serializer, self.serializer_option)

    @asynccontextmanager
    async def runtime(
        self, progress_ttl: float | None = None, codec: Codec | None = None
    ) -> AsyncIterator[Runtime]:
        """What works on the tables, without retries: errors are printed at once."""
        database = Database(self.dsn, engine_kwargs={"poolclass": NullPool}, retry_timeout=0)
        await database.open()
        try:
            settings = Settings(
                models=await self._models_in(database),
                codec=codec or Codec(self.config),
                progress_ttl=progress_ttl,
            )
            runtime = Runtime(settings, database, Telemetry(settings.table))
            yield runtime
            await runtime.close()
        finally:
            await database.close()

    async def _models_in(self, database: Database) -> Models:
        # Applications whose models have no StatusMixin or WorkerMixin do not have these tables.
        rows = await database.fetch(select_sizes(self.config), {}, "look for the tables")
        found = {name for name, _ in rows}
        models = self.models
        if found and self.config.status_table_name not in found:
            models = replace(models, Status=None)
        if found and self.config.workers_table_name not in found:
            models = replace(models, Worker=None)
        return models

    @asynccontextmanager
    async def backend(
        self, check_schema: SchemaCheck = "error", *, is_tracked: bool = False, **options: Any
    ) -> AsyncIterator[SQLAlchemyResultBackend[Any]]:
        """A started backend; with `is_tracked`, it tracks statuses if their table exists."""
        async with self.runtime() as runtime:
            models = runtime.settings.models
        backend: SQLAlchemyResultBackend[Any] = SQLAlchemyResultBackend(
            self.dsn,
            listen_dsn=self._listen_dsn or None,
            models=models,
            serializer=self._find_serializer(),
            check_schema=check_schema,
            startup_timeout=0,
            track="started" if is_tracked and models.Status is not None else None,
            **options,
        )
        await backend.startup()
        try:
            yield backend
        finally:
            await backend.shutdown()


def find_serializer(name: str | None, option: str = "--serializer") -> TaskiqSerializer | None:
    """The serializer of that name, or what `module:attribute` is or returns; None for None.

    Errors name the option.
    """
    if not name:
        return None
    try:
        if name in _SERIALIZERS:
            return _SERIALIZERS[name]()
        module, _, attribute = name.partition(":")
        sys.path.insert(0, str(Path.cwd()))  # as taskiq's own command line does
        found: Any = getattr(importlib.import_module(module), attribute)
        serializer = found if isinstance(found, TaskiqSerializer) else found()
    except Exception as exc:
        # The application's module may raise anything.
        raise ConfigurationError(
            f"{option} {name}: {exc}; the serializers are {', '.join(_SERIALIZERS)} and "
            "module:attribute"
        ) from exc
    if not isinstance(serializer, TaskiqSerializer):
        raise ConfigurationError(f"{option} {name} is not a TaskiqSerializer: {serializer!r}")
    return serializer


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command for typer: `function` with the options of Target instead of its first parameter.

    If the function has an option --serializer itself, that of Target becomes --to-serializer. The
    function may be a coroutine function. Its errors are printed as one line.
    """
    own = list(inspect.signature(function).parameters.values())[1:]
    shared = dict(inspect.signature(Target).parameters)
    has_serializer = any(each.name == "serializer" for each in own)
    if has_serializer:
        shared["serializer"] = shared["serializer"].replace(name="to_serializer")

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        with _printing_errors():
            target = Target(**{key: arguments.pop(each.name) for key, each in shared.items()})
            if has_serializer:
                target.serializer_option = "--to-serializer"
            done = function(target, **arguments)
            if inspect.iscoroutine(done):
                asyncio.run(done)

    parameters = [
        each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared.values())
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    return run


@contextmanager
def _printing_errors() -> Iterator[None]:
    # A shell's `>&-`. The next file to be opened would get its number.
    if sys.stdout is None:
        complain("standard output is closed: redirect it to /dev/null if you do not need it")
        raise typer.Exit(1)
    try:
        yield
        sys.stdout.flush()
    except (TaskiqSaPgError, TaskiqResultTimeoutError) as exc:
        complain(" ".join(str(exc).split()))
        is_wrong_line = isinstance(exc, (ConfigurationError, InvalidTaskIdError))
        raise typer.Exit(_WRONG_COMMAND_LINE if is_wrong_line else 1) from None
    except OSError as exc:
        # Python flushes it again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(exc, BrokenPipeError):
            raise typer.Exit(_BROKEN_PIPE) from None
        complain(exc.strerror or str(exc))
        raise typer.Exit(1) from None
