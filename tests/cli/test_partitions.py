"""partitions."""

import asyncio
import json
import re
from typing import Any

import asyncpg
import pytest

from taskiq_sa_pg import SQLAlchemyResultBackend, make_task_id
from tests.cli.conftest import Cli, success
from tests.cli.test_provisioning import ODD_NAMES
from tests.tasks import new_id

TEXTS = {"TASKIQ_SA_PG_FIELD_FOR_TASK_ID": "Text"}

PARTITIONS = """
    SELECT c.relname AS name, pg_get_expr(c.relpartbound, c.oid) AS bounds
    FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
    WHERE c.relnamespace = current_schema::regnamespace AND c.relkind = 'r' ORDER BY 1
"""


def fetch(cli: Cli, query: str) -> list[asyncpg.Record]:
    async def do() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(cli.dsn)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query)
            return rows
        finally:
            await connection.close()

    return asyncio.run(do())


def partitions_of(cli: Cli) -> dict[str, str]:
    return {row["name"]: row["bounds"] for row in fetch(cli, PARTITIONS)}


def made_and_dropped(report: dict[str, Any]) -> list[list[str]]:
    return [[each["name"] for each in report[word]] for word in ("created", "dropped")]


def partition(cli: Cli, env: dict[str, str] | None = None) -> None:
    """Makes a partitioned table as the command says that it is made."""
    cli.ok("upgrade", env=env)
    statements = cli.fails("partitions", env=env).split("`")[1]
    assert statements.startswith("BEGIN; ")
    cli.execute(statements)


def test_without_a_table_or_its_partitions_the_remedy_is_told(cli: Cli) -> None:
    assert "does not exist; create it with `alembic upgrade head`" in cli.fails("partitions")
    cli.ok("upgrade")
    assert "table taskiq_results is not partitioned. As its owner, run `BEGIN; " in cli.fails(
        "partitions"
    )
    cli.execute(
        "ALTER TABLE taskiq_results RENAME TO other; "
        "CREATE TABLE taskiq_results (LIKE other) PARTITION BY HASH (task_id)"
    )
    line = cli.fails("partitions")
    assert "is partitioned by HASH (task_id), but partitions by time need RANGE (task_id)" in line


@pytest.mark.parametrize("env", [{}, TEXTS, ODD_NAMES], ids=["varchar", "text", "odd uuid"])
def test_partitions_are_made_where_results_belong(cli: Cli, env: dict[str, str]) -> None:
    """Those of other ids stay in the default partition, which is the old table."""
    partition(cli, env)
    assert "would be created: " in cli.ok("partitions", "--dry-run", env=env)
    assert len(partitions_of(cli)) == 1
    lines = cli.ok("partitions", "--ahead", "2d", env=env).splitlines()
    name = env.get("TASKIQ_SA_PG_TABLE_NAME", "taskiq_results")
    names = [re.fullmatch(r"created: (.+), [\d: -]+ to [\d: -]+ UTC", line) for line in lines]
    made = [match[1] for match in names if match]
    assert all(each.startswith(f"{name}_p20") for each in made)
    # One more where midnight has passed in between.
    assert 3 <= len(made) == len(lines) <= 4
    assert partitions_of(cli).keys() == {*made, f"{name}_default"}
    assert (
        cli.ok("partitions", "--ahead", "1d", env=env) == f"nothing to do: {len(made)} partitions\n"
    )
    assert cli.json("check", env=env)["is_fit"]

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        for task_id in (make_task_id(), new_id()):
            await backend.set_result(task_id, success(1))

    options = {key.removeprefix("TASKIQ_SA_PG_").lower(): value for key, value in env.items()}
    cli.store(store, **options)
    quoted = name.replace('"', '""')
    of_rows = f'SELECT relname FROM "{quoted}" r JOIN pg_class c ON c.oid = r.tableoid ORDER BY 1'
    default, partition_of_now = [row["relname"] for row in fetch(cli, of_rows)]
    assert default == f"{name}_default"
    assert partition_of_now in made[:2]
    sizes = (
        "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits JOIN pg_class c "
        "ON c.oid = inhrelid WHERE relnamespace = current_schema::regnamespace AND relkind = 'r'"
    )
    [[size]] = fetch(cli, sizes)
    assert cli.json("stats", env=env)["bytes"][name] == size


OLD = """
    CREATE TABLE ancient PARTITION OF taskiq_results
        FOR VALUES FROM ('015a00000000') TO ('015b00000000');
    CREATE TABLE hardly_old PARTITION OF taskiq_results
        FOR VALUES FROM ('015b00000000') TO ('{ms}');
    CREATE TABLE random_ids PARTITION OF taskiq_results FOR VALUES FROM ('0') TO ('01');
    CREATE TABLE first_ids PARTITION OF taskiq_results FOR VALUES FROM (MINVALUE) TO ('0');
    CREATE TABLE with_parts PARTITION OF taskiq_results
        FOR VALUES FROM ('014a00000000') TO ('014b00000000') PARTITION BY HASH (task_id);
    CREATE TABLE taskiq_results_p20200101 (LIKE taskiq_results);
"""


def test_old_partitions_are_dropped(cli: Cli) -> None:
    """Those that are old as their bounds say, whatever they are called."""
    partition(cli)
    [[now]] = fetch(cli, "SELECT (extract(epoch FROM now()) * 1000)::bigint")
    day = 86_400_000
    cli.execute(OLD.format(ms=f"{now - 29 * day:012x}"))
    there = partitions_of(cli)
    # That from the one that is hardly old to today is a gap.
    cli.ok("partitions", "--ahead", "1h")
    assert {*there} < {*partitions_of(cli)}
    report = cli.json("partitions", "--ahead", "1h", "--keep", "30d", "--dry-run")
    assert (made_and_dropped(report), report["is_dry_run"]) == ([[], ["ancient"]], True)
    line = "would be dropped: ancient, 2017-02-02 18:04:44 to 2017-03-24 11:07:31 UTC\n"
    assert cli.ok("partitions", "--ahead", "1h", "--keep", "30d", "--dry-run") == line
    assert "ancient" in partitions_of(cli)
    report = cli.json("partitions", "--ahead", "1h", "--keep", "30d")
    assert made_and_dropped(report) == [[], ["ancient"]]
    assert cli.ok("partitions", "--keep", "28d", "--ahead", "1h").startswith("dropped: hardly_old")
    left = {*there, "taskiq_results_p20200101"} - {"ancient", "hardly_old"}
    assert {row[0] for row in fetch(cli, "SELECT relname FROM pg_class")} >= left


def test_results_in_the_way_are_moved_if_they_are_few(cli: Cli) -> None:
    task_ids = [make_task_id() for _ in range(2)]

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        for task_id in (*task_ids, new_id()):
            await backend.set_result(task_id, success(task_id))

    cli.store(store)
    cli.execute(
        "ALTER TABLE taskiq_results ADD COLUMN length int "
        "GENERATED ALWAYS AS (length(task_id)) STORED"
    )
    partition(cli)
    result = cli.run("partitions", "--ahead", "1d", "--move-at-most", "1")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert "more than 1 results of the default partition belong to" in result.stderr
    assert "with a larger --move-at-most at a quiet time" in result.stderr
    result = cli.run("partitions", "--ahead", "1d", "--move-at-most", "1", "--dry-run")
    assert result.exit_code == 1
    assert "_p20" in result.stderr
    assert "needs --move-at-most=2" in result.stderr
    in_default = "SELECT count(*) FROM taskiq_results_default"
    assert [*fetch(cli, in_default)[0]] == [3]
    moves = " UTC, with 2 results of the default partition\n"
    assert cli.ok("partitions", "--ahead", "1d", "--dry-run").endswith(moves)
    assert cli.ok("partitions", "--ahead", "1d").endswith(moves)
    assert [*fetch(cli, in_default)[0]] == [1]
    for task_id in task_ids:
        assert cli.json("show", task_id)["return_value"] == task_id


def test_what_cannot_be_made_is_told_with_the_remedy(cli: Cli) -> None:
    partition(cli)
    [first, *_] = cli.json("partitions", "--dry-run")["created"]
    cli.execute(f"CREATE TABLE {first['name']} ()")
    assert "a table of this name exists and is not a partition" in cli.fails("partitions")
    cli.execute(
        "CREATE TABLE old PARTITION OF taskiq_results "
        "FOR VALUES FROM ('015a00000000') TO ('015b00000000')"
    )
    result = cli.run("partitions", "--keep", "30d", "--json")
    assert (result.exit_code, "is not a partition" in result.stderr) == (1, True)
    assert made_and_dropped(json.loads(result.stdout))[1] == ["old"]
    cli.execute(
        f"DROP TABLE {first['name']}; CREATE TABLE rest PARTITION OF taskiq_results "
        f"FOR VALUES FROM ('{make_task_id()}') TO (MAXVALUE)"
    )
    assert 'would overlap partition "rest"; the bounds of an existing' in cli.fails("partitions")


def test_results_that_others_refer_to_are_not_moved(cli: Cli) -> None:
    """The foreign key would act as if they were deleted."""
    task_id = make_task_id()

    async def store(backend: SQLAlchemyResultBackend[Any]) -> None:
        await backend.set_result(task_id, success(1))

    cli.store(store)
    partition(cli)
    cli.execute(
        "CREATE TABLE orders (task_id text REFERENCES taskiq_results ON DELETE CASCADE); "
        f"INSERT INTO orders VALUES ('{task_id}')"
    )
    result = cli.run("partitions", "--ahead", "1d")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 1)
    assert (
        "moving them would fire foreign keys or triggers as if they were deleted" in result.stderr
    )
    assert len(fetch(cli, "SELECT FROM orders")) == 1
    cli.execute("ALTER TABLE orders DROP CONSTRAINT orders_task_id_fkey")
    assert "with 1 result of the default partition" in cli.ok("partitions", "--ahead", "1d")


def test_results_that_others_refer_to_are_kept(cli: Cli) -> None:
    partition(cli)
    cli.execute(
        "CREATE TABLE old PARTITION OF taskiq_results "
        "FOR VALUES FROM ('015a00000000') TO ('015b00000000'); "
        "INSERT INTO taskiq_results (task_id, is_err, return_value, execution_time, labels) "
        "VALUES ('015a5', false, '', 1, '{}'); "
        "CREATE TABLE orders (task_id text REFERENCES taskiq_results); "
        "INSERT INTO orders VALUES ('015a5')"
    )
    cli.ok("partitions", "--ahead", "1h")
    arguments = ("partitions", "--ahead", "1h", "--keep", "1d")
    assert "rows of other tables refer to its results" in cli.fails(*arguments)
    cli.execute("DELETE FROM orders")
    assert cli.ok(*arguments).startswith("dropped: old, ")


def test_without_a_default_partition_there_is_a_warning(cli: Cli) -> None:
    partition(cli)
    cli.execute("DROP TABLE taskiq_results_default")
    result = cli.run("partitions", "--ahead", "1h")
    assert (result.exit_code, result.stdout[:9]) == (0, "created: ")
    assert "there is no default partition: a result is lost" in result.stderr


SORTS_HEX = {"C": True, "en-US-x-icu": True, "da-x-icu": False, "cy-x-icu": False}


def test_the_collation_has_to_sort_hex_digits(cli: Cli) -> None:
    """Of those that the server has: one that is built without ICU has the first alone."""
    names = ", ".join(f"'{name}'" for name in SORTS_HEX)
    found = fetch(cli, f"SELECT DISTINCT collname FROM pg_collation WHERE collname IN ({names})")
    assert "C" in {row["collname"] for row in found}
    for number, collation in enumerate(row["collname"] for row in found):
        env = {"TASKIQ_SA_PG_TABLE_NAME": f"results_{number}"}
        cli.ok("upgrade", env=env)
        statements = cli.fails("partitions", env=env).split("`")[1]
        of_column = f'ALTER COLUMN task_id TYPE varchar COLLATE "{collation}"'
        cli.execute(f"ALTER TABLE results_{number} {of_column}")
        if not SORTS_HEX[collation]:
            line = cli.fails("partitions", env=env)
            assert "does not sort hex digits as numbers" in line
            cli.execute(statements)
            assert "create it again from a table whose" in cli.fails("partitions", env=env)
            cli.execute(f"DROP TABLE results_{number}")
            cli.ok("upgrade", env=env)
            cli.execute(f"ALTER TABLE results_{number} {of_column}")
            cli.execute(line.split("`")[1])
        cli.execute(cli.fails("partitions", env=env).split("`")[1])
        cli.ok("partitions", "--ahead", "1h", env=env)


@pytest.mark.parametrize("option", ["--ahead", "--keep", "--every"])
def test_what_is_no_duration_is_refused(cli: Cli, option: str) -> None:
    for text in ("", "0d", "7", "-1d", "7x", "2026-11-30", "99999999999999w"):
        line = cli.fails("partitions", f"{option}={text}", status=2)
        expected = f"{option} {text}: use 30s, 15m, 2h, 7d or 1w; more than 0, at most 36500d"
        assert line.endswith(expected)
