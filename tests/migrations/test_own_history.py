"""Our tables in the Alembic history of an application, and beside it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.util import CommandError

from taskiq_sa_pg import TableConfig
from taskiq_sa_pg.schema import LATEST_VERSION, QUEUE, RESULTS, Family
from taskiq_sa_pg.schema.migrate import script_location
from taskiq_sa_pg.schema.partitions import statements_to_partition
from tests.conftest import BackendFactory, Database
from tests.migrations.applications import (
    ORDERS_REVISION,
    Application,
    execute_script,
    operations_in,
)
from tests.migrations.conftest import LONG_NAME, alembic, catalogue, tables
from tests.migrations.test_queue_steps import downgrade as downgrade_queue
from tests.migrations.test_queue_steps import upgrade as upgrade_queue
from tests.migrations.test_steps import downgrade, upgrade_to_latest

NAME = "taskiq_results"
ODD_NAME = "Wéird \"Re-sults\" 'n' 100%(:x) \\n user"

ApplicationFactory = Callable[..., Any]


@pytest.fixture
def new_application(tmp_path: Path, database: Database) -> ApplicationFactory:
    """Makes an application whose history has its orders, in the database too."""

    async def new(template: str = "generic", **arguments: Any) -> Application:
        application = Application(tmp_path / "app", database, template, **arguments)
        await application.alembic("upgrade", "head")
        assert await tables(database) == ["alembic_version", "orders"]
        return application

    (tmp_path / "app").mkdir()
    return new


async def expected_queue(database: Database, **options: Any) -> list[Any]:
    """What the steps of the broker's tables build; the schema is left empty."""
    await upgrade_queue(database.dsn, **options)
    found = await catalogue(database, options.get("table_name", NAME), QUEUE)
    assert found
    await downgrade_queue(database.dsn, **options)
    return found


async def expected_catalogue(database: Database, **options: Any) -> list[Any]:
    """What the steps build; the schema is left empty."""
    await upgrade_to_latest(database.dsn, **options)
    found = await catalogue(database, options.get("table_name", NAME))
    assert found
    for version in range(LATEST_VERSION, 0, -1):
        await downgrade(database.dsn, version, **options)
    return found


def arguments_of(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


# test_steps.py has all pairs of types.
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "odd": {"table_name": ODD_NAME, "field_for_task_id": "Uuid", "field_for_payload": "Jsonb"},
    "long": {"table_name": LONG_NAME},
    "reserved": {"table_name": "Order", "field_for_task_id": "Text"},
}


def of_kinds(**templates: str) -> pytest.MarkDecorator:
    """A test of these kinds of tables, each with one of Alembic's templates."""
    return pytest.mark.parametrize(
        ("template", "options"),
        [
            pytest.param(template, KINDS[name], id=f"{name}-{template}")
            for name, template in templates.items()
        ],
    )


async def assert_history_goes_up_and_down(
    application: Application,
    expected: list[Any],
    name: str,
    place: Database | None = None,
    family: Family = RESULTS,
) -> None:
    """By its commands and by the SQL of offline mode, up and down; clean whenever it is up."""
    database = application.database
    place = place or database

    async def assert_is_up() -> None:
        assert {"alembic_version", "orders"} <= set(await tables(database))
        assert set(family.table_names(TableConfig(name))) <= set(await tables(place))
        assert await catalogue(place, name, family) == expected
        assert "No new upgrade operations" in await application.alembic("check")

    await application.alembic("upgrade", "head")
    await assert_is_up()
    down = await application.alembic("downgrade", "head:base", "--sql")
    await execute_script(database, down)
    assert await catalogue(place, name, family) == []
    # Alembic 1.14 drops it in offline mode, and later ones leave it.
    await execute_script(database, "DROP TABLE IF EXISTS alembic_version")
    assert await tables(database) == []
    await execute_script(database, await application.alembic("upgrade", "head", "--sql"))
    await assert_is_up()
    await application.alembic("downgrade", "-1")
    assert await tables(database) == ["alembic_version", "orders"]
    assert await catalogue(place, name, family) == []


MAKES_FOUR_TABLES = {"create_table": 4, "create_index": 2, "drop_index": 2, "drop_table": 4}


@of_kinds(default="generic", odd="async", long="generic")
async def test_autogenerate_makes_exactly_the_tables(
    new_application: ApplicationFactory,
    other_database: Database,
    template: str,
    options: dict[str, Any],
) -> None:
    application = await new_application(template, options='{"compare_server_default": True}')
    expected = await expected_catalogue(other_database, **options)
    application.set_models(f"build_models(metadata=Base.metadata, {arguments_of(options)})")
    with pytest.raises(CommandError, match="add_table"):
        await application.alembic("check")
    assert operations_in(await application.autogenerate("results")) == MAKES_FOUR_TABLES
    name = options.get("table_name", NAME)
    await assert_history_goes_up_and_down(application, expected, name)


def only_schemas(*names: str) -> str:
    """Arguments of context.configure() for an application that has these beside the default."""
    hook = f"lambda name, kind, _: kind != 'schema' or name in {(None, *names)}"
    return f'{{"include_schemas": True, "include_name": {hook}}}'


async def test_autogenerate_makes_the_tables_in_a_schema(
    new_application: ApplicationFactory, other_database: Database
) -> None:
    place = other_database.schema
    expected = await expected_catalogue(other_database, table_name=ODD_NAME)
    application = await new_application("async", options=only_schemas(place))
    application.set_models(f"build_models({ODD_NAME!r}, schema={place!r}, metadata=Base.metadata)")
    assert operations_in(await application.autogenerate("results")) == MAKES_FOUR_TABLES
    await assert_history_goes_up_and_down(application, expected, ODD_NAME, other_database)


OWN_MODELS = """
import enum
from sqlalchemy.dialects.postgresql import JSONB

class Result(ResultMixin, Base):
    tenant: Mapped[str | None] = mapped_column("Tenant", index=True)
    order_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Order.id, ondelete="CASCADE"))
    details: Mapped[dict | None] = mapped_column(JSONB)
    order: Mapped[Order | None] = relationship(backref="results")

class Progress(ProgressMixin, Base):
    stage: Mapped[str] = mapped_column(server_default="early")

class Status(StatusMixin, Base):
    pass

class Worker(WorkerMixin, Base):
    pass

class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[str | None] = mapped_column(sa.ForeignKey(Result.task_id, ondelete="SET NULL"))
"""


async def test_autogenerate_makes_columns_of_the_applications_own(
    new_application: ApplicationFactory, database: Database
) -> None:
    """And later in a table that is there already."""
    application = await new_application("async")
    application.set_models("build_models(metadata=Base.metadata)")
    await application.autogenerate("results")
    await application.alembic("upgrade", "head")
    application.set_models(OWN_MODELS)
    later = operations_in(await application.autogenerate("own columns"))
    assert (later["add_column"], later["create_table"]) == (4, 1)
    await application.alembic("upgrade", "head")
    assert "No new upgrade operations" in await application.alembic("check")
    upgraded = await catalogue(database)
    assert (NAME, "Tenant", "character varying", False, None) in upgraded
    await application.alembic("downgrade", "base")
    for revision in application.revisions:
        if revision.name != ORDERS_REVISION:
            revision.unlink()
    await application.alembic("upgrade", "head")
    at_once = operations_in(await application.autogenerate("all at once"))
    assert (at_once["create_table"], at_once["create_index"]) == (5, 3)
    await application.alembic("upgrade", "head")
    assert await catalogue(database) == upgraded
    assert "No new upgrade operations" in await application.alembic("check")


@of_kinds(reserved="generic")
async def test_a_revision_that_calls_the_step_makes_what_the_models_describe(
    new_application: ApplicationFactory,
    other_database: Database,
    template: str,
    options: dict[str, Any],
) -> None:
    application = await new_application(template, options='{"compare_server_default": True}')
    expected = await expected_catalogue(other_database, **options)
    application.set_models(f"build_models(metadata=Base.metadata, {arguments_of(options)})")
    await application.write_revision(
        f"schema.upgrade(op, 1, {arguments_of(options)})",
        f"schema.downgrade(op, 1, {arguments_of(options)})",
    )
    name = options.get("table_name", NAME)
    await assert_history_goes_up_and_down(application, expected, name)


async def test_a_revision_that_calls_the_step_for_a_schema(
    new_application: ApplicationFactory, other_database: Database
) -> None:
    place = other_database.schema
    expected = await expected_catalogue(other_database)
    application = await new_application(options=only_schemas(place))
    application.set_models(f"build_models(schema={place!r}, metadata=Base.metadata)")
    await application.write_revision(
        f"schema.upgrade(op, 1, schema={place!r})",
        f"schema.downgrade(op, 1, schema={place!r})",
    )
    await assert_history_goes_up_and_down(application, expected, NAME, other_database)


async def test_autogenerate_makes_the_tables_of_the_broker_too(
    new_application: ApplicationFactory, other_database: Database
) -> None:
    options = KINDS["odd"]
    results = await expected_catalogue(other_database, **options)
    of_queue = {name: options[name] for name in ("table_name", "field_for_task_id")}
    expected = await expected_queue(other_database, **of_queue)
    application = await new_application("async", options='{"compare_server_default": True}')
    models = f"build_models(metadata=Base.metadata, queue=True, {arguments_of(options)})"
    application.set_models(models)
    assert operations_in(await application.autogenerate("results and broker")) == {
        name: count + (2 if name.endswith("table") else 1)
        for name, count in MAKES_FOUR_TABLES.items()
    }
    await application.alembic("upgrade", "head")
    assert await catalogue(application.database, ODD_NAME) == results
    await assert_history_goes_up_and_down(application, expected, ODD_NAME, family=QUEUE)


async def test_a_revision_that_calls_the_step_of_the_broker_s_tables(
    new_application: ApplicationFactory, other_database: Database
) -> None:
    """In a schema, after a revision for those of results."""
    place = other_database.schema
    options = {"table_name": "Order", "field_for_task_id": "Uuid"}
    expected = await expected_queue(other_database, **options)
    application = await new_application(options=only_schemas(place))
    arguments = arguments_of({**options, "schema": place})
    application.set_models(f"build_models(metadata=Base.metadata, queue=True, {arguments})")
    for step in ("", "_queue"):
        await application.write_revision(
            f"schema.upgrade{step}(op, 1, {arguments})",
            f"schema.downgrade{step}(op, 1, {arguments})",
        )
        await application.alembic("upgrade", "head")
    assert "No new upgrade operations" in await application.alembic("check")
    assert await catalogue(other_database, "Order", QUEUE) == expected
    await application.alembic("downgrade", "-1")
    assert await tables(other_database) == sorted(TableConfig("Order").table_names)


WITHOUT_ORDERS = "Base.metadata.remove(Order.__table__)"


def all_of(name: str) -> set[str]:
    suffixes = ("", "_progress", "_status", "_workers", "_version")
    return {f"{name}{suffix}" for suffix in suffixes}


def queue_of(name: str) -> set[str]:
    return {f"{name}_queue", f"{name}_schedules", f"{name}_queue_version"}


async def dropped_by_autogenerate(application: Application) -> set[str]:
    """The tables that a revision would drop."""
    try:
        assert "No new upgrade operations" in await application.alembic("check")
    except CommandError as exc:
        return set(
            re.findall(r"\('remove_table', Table\((?:u?'|\")(.*?)(?:'|\"), MetaData", str(exc))
        )
    return set()


@pytest.mark.parametrize(
    ("template", "name"), [("generic", NAME), ("async", ODD_NAME)], ids=["default", "odd"]
)
async def test_tables_of_our_history_are_left_alone_and_those_of_theirs_are_not(
    new_application: ApplicationFactory,
    start_backend: BackendFactory,
    database: Database,
    template: str,
    name: str,
) -> None:
    all_tables = {"alembic_version", "orders", *all_of(name), *queue_of(name)}
    dsn = {"TASKIQ_SA_PG_DSN": database.dsn}
    application = await new_application(template)
    await start_backend(table_name=name, run_migrations=True)
    await alembic("-x", "queue=only", "-x", f"table_name={name}", "upgrade", "head", **dsn)
    if name == NAME:
        assert await dropped_by_autogenerate(application) == all_of(name) | queue_of(name)
    application.use(database, f'{{"include_name": schema.include_name(table_name={name!r})}}')
    assert await dropped_by_autogenerate(application) == set()
    assert operations_in(await application.autogenerate("nothing")) == {}
    application.set_models(WITHOUT_ORDERS)
    await application.alembic("upgrade", "head")
    assert await dropped_by_autogenerate(application) == {"orders"}
    assert operations_in(await application.autogenerate("orders go")) == {
        "drop_index": 1,
        "drop_table": 1,
        "create_table": 1,
        "create_index": 1,
    }
    assert set(await tables(database)) == all_tables
    await application.alembic("upgrade", "head")
    assert set(await tables(database)) == all_tables - {"orders"}


async def test_several_results_tables_and_a_hook_of_the_applications_own(
    new_application: ApplicationFactory, start_backend: BackendFactory, database: Database
) -> None:
    application = await new_application()
    for name in ("one", "two"):
        await start_backend(table_name=name, run_migrations=True)
    await execute_script(database, "CREATE TABLE legacy (id int); CREATE TABLE one_more (id int)")
    hook = 'lambda name, kind, parents: kind != "table" or name != "legacy"'
    hook = f'schema.include_name({hook}, table_name="one")'
    for options, dropped in {
        hook: {"one_more", *all_of("two")},
        f'schema.include_name({hook}, table_name="two")': {"one_more"},
    }.items():
        application.use(database, f'{{"include_name": {options}}}')
        assert await dropped_by_autogenerate(application) == dropped


async def test_tables_of_these_names_in_another_schema_are_not_ours(
    new_application: ApplicationFactory,
    start_backend: BackendFactory,
    database: Database,
    other_database: Database,
) -> None:
    application = await new_application()
    await start_backend(schema=other_database.schema, run_migrations=True)
    await execute_script(database, f"CREATE TABLE {NAME} (id int)")
    hook = f"lambda name, kind, _: kind != 'schema' or name in {(None, other_database.schema)}"
    for ours, dropped in {
        f"schema={other_database.schema!r}": {NAME},
        "": all_of(NAME),
    }.items():
        application.use(
            database,
            f'{{"include_schemas": True, "include_name": schema.include_name({hook}, {ours})}}',
        )
        assert await dropped_by_autogenerate(application) == dropped


@pytest.mark.parametrize(("template", "include_schemas"), [("generic", False), ("async", True)])
async def test_the_default_schema_may_be_named(
    new_application: ApplicationFactory,
    start_backend: BackendFactory,
    database: Database,
    template: str,
    include_schemas: bool,
) -> None:
    application = await new_application(template)
    await start_backend(schema=database.schema, run_migrations=True)
    hook = "lambda name, kind, _: kind != 'schema' or name is None"
    ours = f"schema.include_name({hook}, schema={database.schema!r})"
    options = f'{{"include_schemas": {include_schemas}, "include_name": {ours}}}'
    application.use(database, options)
    assert await dropped_by_autogenerate(application) == set()
    application.set_models(WITHOUT_ORDERS)
    assert await dropped_by_autogenerate(application) == {"orders"}


async def test_our_history_beside_theirs_in_one_ini_file(
    new_application: ApplicationFactory, database: Database, other_database: Database
) -> None:
    """With -n for ours; neither moves the other."""
    expected = await expected_catalogue(other_database)
    application = await new_application(options='{"include_name": schema.include_name()}')

    def point_at(place: Database) -> None:
        theirs = application.ini.read_text().partition("[taskiq_sa_pg]")[0]
        dsn = place.dsn.replace("%", "%%")
        section = f"script_location = {script_location()}\nsqlalchemy.url = {dsn}\n"
        application.ini.write_text(f"{theirs}[taskiq_sa_pg]\n{section}")

    async def ours(*arguments: str) -> str:
        return await alembic("-n", "taskiq_sa_pg", *arguments, ini=application.ini)

    point_at(database)
    await ours("upgrade", "head")
    assert set(await tables(database)) == {"alembic_version", "orders", *all_of(NAME)}
    assert await catalogue(database) == expected
    [theirs_at] = [path.name.partition("_")[0] for path in application.revisions]
    current, script = await ours("current"), await ours("upgrade", "head", "--sql")
    assert "0001 (head)" in current
    assert theirs_at not in current
    assert "No new upgrade operations" in await ours("check")
    assert f"{theirs_at} (head)" in await application.alembic("current")
    assert await dropped_by_autogenerate(application) == set()

    await application.alembic("downgrade", "base")
    assert set(await tables(database)) == {"alembic_version", *all_of(NAME)}
    await application.alembic("upgrade", "head")
    await ours("downgrade", "base")
    assert set(await tables(database)) == {"alembic_version", "orders", f"{NAME}_version"}
    assert f"{theirs_at} (head)" in await application.alembic("current")
    assert "000" not in await ours("current")

    await execute_script(other_database, script)
    await execute_script(other_database, await application.alembic("upgrade", "head", "--sql"))
    application.use(other_database)
    point_at(other_database)
    assert await catalogue(other_database) == expected
    assert set(await tables(other_database)) == {"alembic_version", "orders", *all_of(NAME)}
    assert "No new upgrade operations" in await application.alembic("check")
    assert "No new upgrade operations" in await ours("check")


async def with_partitions(database: Database, name: str) -> set[str]:
    """Makes partitions of a results table, and returns their names."""
    other = f"{name} of others"
    await execute_script(
        database,
        ";".join(statements_to_partition(TableConfig(name)))
        + f""";
        CREATE TABLE "one of {name}" PARTITION OF "{name}"
            FOR VALUES FROM ('019000000000') TO ('019100000000') PARTITION BY HASH (task_id);
        CREATE TABLE "half of {name}" PARTITION OF "one of {name}"
            FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE "{other}" (id int) PARTITION BY LIST (id);
        CREATE TABLE "part of {other}" PARTITION OF "{other}" DEFAULT;
        """,
    )
    return {f"{name}_default", f"one of {name}", f"half of {name}"}


async def test_partitions_are_left_alone(
    new_application: ApplicationFactory, start_backend: BackendFactory, database: Database
) -> None:
    """Those of the results table, beside our history and in one of the application's own."""
    application = await new_application()
    await start_backend(run_migrations=True)
    partitions = await with_partitions(database, NAME)
    others = {f"{NAME} of others", f"part of {NAME} of others"}
    assert await dropped_by_autogenerate(application) == all_of(NAME) | partitions | others
    hook = 'lambda name, kind, parents: kind != "table" or "of others" not in name'
    application.use(database, f'{{"include_name": schema.include_name({hook})}}')
    assert await dropped_by_autogenerate(application) == set()
    application.use(database, '{"include_name": schema.include_name()}')
    assert await dropped_by_autogenerate(application) == others
    hook = f"schema.include_name({hook}, partitions_only=True)"
    application.use(database, f'{{"include_name": {hook}, "compare_server_default": True}}')
    assert await dropped_by_autogenerate(application) == all_of(NAME)
    application.set_models("build_models(metadata=Base.metadata)")
    assert await dropped_by_autogenerate(application) == {f"{NAME}_version"}
