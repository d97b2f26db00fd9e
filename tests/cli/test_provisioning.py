"""upgrade, downgrade, current, check and sql."""

import pytest

from tests.cli.conftest import Cli

ODD_NAMES = {
    "TASKIQ_SA_PG_TABLE_NAME": 'Tâche\'s "100%"',
    "TASKIQ_SA_PG_FIELD_FOR_TASK_ID": "Uuid",
    "TASKIQ_SA_PG_FIELD_FOR_PAYLOAD": "Jsonb",
}


def test_tables_are_made_and_dropped(cli: Cli) -> None:
    assert cli.json("current") == {"current": None, "latest": "0001"}
    assert cli.ok("upgrade") == "table taskiq_results: none -> 0001\n"
    assert cli.json("current") == {"current": "0001", "latest": "0001"}
    assert cli.json("check") == {"is_fit": True, "reason": None}
    assert cli.ok("upgrade") == "table taskiq_results: already at 0001\n"
    assert cli.ok("downgrade", "base") == "table taskiq_results: 0001 -> none\n"
    assert "taskiq_results and the other tables of the result backend do not exist" in cli.fails(
        "check"
    )


@pytest.mark.parametrize("env", [{}, ODD_NAMES], ids=["usual", "odd"])
def test_tables_that_were_dropped_are_made_again(cli: Cli, env: dict[str, str]) -> None:
    name = env.get("TASKIQ_SA_PG_TABLE_NAME", "taskiq_results")
    quoted = name.replace('"', '""')
    cli.ok("upgrade", env=env)
    cli.execute(
        f'DROP TABLE "{quoted}", "{quoted}_progress", "{quoted}_status", "{quoted}_workers"'
    )
    assert "`taskiq-sa-pg upgrade" in cli.fails("check", env=env)
    assert cli.ok("upgrade", env=env).splitlines() == [
        f"{name}_version records version 0001, but tables were missing and were created again, "
        f"empty: {name}, {name}_progress, {name}_status, {name}_workers",
        f"table {name}: already at 0001",
    ]
    assert cli.json("check", env=env)["is_fit"]


@pytest.mark.parametrize("table", ["status", "workers"])
def test_one_table_that_was_dropped_is_missed(cli: Cli, table: str) -> None:
    cli.ok("upgrade")
    cli.execute(f"DROP TABLE taskiq_results_{table}")
    assert f"table taskiq_results_{table} does not exist" in cli.fails("check")
    cli.execute("DROP TABLE taskiq_results_version")  # the application's own history
    assert cli.json("check")["is_fit"]


def test_names_and_types_come_from_the_environment(cli: Cli) -> None:
    cli.ok("upgrade", env=ODD_NAMES)
    assert cli.json("check", env=ODD_NAMES)["is_fit"]
    assert "is uuid and must be character varying" in cli.fails(
        "check", "--field-for-task-id", "VarChar", env=ODD_NAMES
    )
    assert "do not exist" in cli.fails("check")


def test_an_option_goes_before_the_environment(cli: Cli) -> None:
    cli.ok("upgrade", "--table-name", "mine", env=ODD_NAMES)
    assert cli.json("current", "--table-name", "mine", env=ODD_NAMES)["current"] == "0001"
    assert cli.json("current", env=ODD_NAMES)["current"] is None


def test_the_schema_is_named(cli: Cli) -> None:
    schema = cli.dsn.rpartition("search_path%3D")[2]
    cli.ok("upgrade", "--schema", schema)
    assert cli.json("check", "--schema", schema)["is_fit"]
    assert "create the schema first" in cli.fails("upgrade", "--schema", "nowhere")


def test_check_tells_scripts_what_is_unfit(cli: Cli) -> None:
    result = cli.run("check", "--json")
    assert result.exit_code == 1
    assert '"is_fit": false' in result.stdout
    assert "do not exist" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("names", [{}, ODD_NAMES], ids=["usual", "odd"])
def test_the_sql_makes_and_drops_what_upgrade_makes_and_drops(
    cli: Cli, names: dict[str, str]
) -> None:
    cli.execute(cli.ok("sql", env=names))
    assert cli.json("check", env=names)["is_fit"]
    assert cli.json("current", env=names)["current"] == "0001"
    cli.execute(cli.ok("sql", "head", "base", env=names))
    assert "do not exist" in cli.fails("check", env=names)


def test_the_sql_needs_no_database(cli: Cli) -> None:
    assert 'CREATE TABLE "taskiq_results"' in cli.ok("sql", env={"TASKIQ_SA_PG_DSN": ""})


def test_an_unknown_revision_is_named(cli: Cli) -> None:
    assert "'nope'" in cli.fails("upgrade", "nope", status=2)
    for revision in ("nope", "0", "1", "+1", "heads", ""):
        line = cli.fails("sql", revision, status=2)
        assert line.endswith(
            f"there is no revision {revision!r}; the revisions are base, 0001 and head"
        )


@pytest.mark.parametrize("ends", [("head", "0001"), ("base", "base"), ("head", "head")])
def test_where_there_is_nothing_to_do_the_sql_says_so(cli: Cli, ends: tuple[str, str]) -> None:
    result = cli.run("sql", *ends)
    assert (result.exit_code, result.stdout) == (0, "")
    start, end = ends
    assert result.stderr == (
        f"taskiq-sa-pg: nothing to do: {start} and {end} are the same revision\n"
    )


def test_tables_of_others_are_left_alone(cli: Cli) -> None:
    cli.execute("CREATE TABLE taskiq_results (kept text)")
    assert "exists already and was not changed" in cli.fails("upgrade")
    assert cli.json("current")["current"] is None


def test_an_unknown_revision_is_told_with_those_that_there_are(cli: Cli) -> None:
    for revision in ("nonsense", "", "head-9", "+9", "9999"):
        line = cli.fails("upgrade", revision, status=2)
        assert line.endswith("; the revisions are base, 0001 and head")
    assert cli.json("current")["current"] is None


RESULTS_TABLE, QUEUE_TABLE = "table taskiq_results", "table taskiq_results_queue"


def test_the_tables_of_the_broker_are_made_and_dropped_too(cli: Cli) -> None:
    """Each family is named in a line of its own."""
    assert cli.ok("current", "--queue").splitlines() == [
        f"{RESULTS_TABLE}: none (latest: 0001)",
        f"{QUEUE_TABLE}: none (latest: 0001)",
    ]
    assert cli.ok("upgrade", "--queue").splitlines() == [
        f"{RESULTS_TABLE}: none -> 0001",
        f"{QUEUE_TABLE}: none -> 0001",
    ]
    assert cli.json("current", "--queue") == {
        "current": "0001",
        "queue": "0001",
        "latest": "0001",
    }
    assert cli.ok("check", "--queue").splitlines() == [
        f"{RESULTS_TABLE}: OK",
        f"{QUEUE_TABLE}: OK",
    ]
    assert cli.ok("downgrade", "base", "--queue").splitlines() == [
        f"{RESULTS_TABLE}: 0001 -> none",
        f"{QUEUE_TABLE}: 0001 -> none",
    ]


def test_either_family_is_made_and_dropped_alone(cli: Cli) -> None:
    assert cli.ok("upgrade", "--queue-only") == f"{QUEUE_TABLE}: none -> 0001\n"
    assert cli.json("current") == {"current": None, "latest": "0001"}
    assert cli.json("current", "--queue-only") == {"queue": "0001", "latest": "0001"}
    assert cli.ok("check", "--queue-only") == f"{QUEUE_TABLE}: OK\n"
    unfit = cli.run("check", "--queue")
    assert (unfit.exit_code, unfit.stdout) == (1, f"{QUEUE_TABLE}: OK\n")
    assert "taskiq_results and the other tables of the result backend do not exist" in unfit.stderr
    cli.ok("upgrade")
    assert cli.ok("downgrade", "base", "--queue-only") == f"{QUEUE_TABLE}: 0001 -> none\n"
    assert cli.json("check")["is_fit"]
    result = cli.run("check", "--queue", "--json")
    assert result.exit_code == 1
    assert "create them with `alembic -x queue=true upgrade head`" in result.stdout
    cli.ok("upgrade", "--queue-only")
    cli.ok("downgrade", "base")
    assert cli.json("check", "--queue-only")["is_fit"]


@pytest.mark.parametrize("names", [{}, ODD_NAMES], ids=["usual", "odd"])
def test_the_sql_makes_and_drops_the_tables_of_the_broker_too(
    cli: Cli, names: dict[str, str]
) -> None:
    script = cli.ok("sql", "--queue", env=names)
    titles = [line for line in script.splitlines() if line.startswith("-- Tables")]
    assert titles == ["-- Tables of the result backend", "-- Tables of the broker"]
    cli.execute(script)
    assert cli.json("check", "--queue", env=names)["is_fit"]
    assert cli.json("current", "--queue-only", env=names)["queue"] == "0001"
    cli.execute(cli.ok("sql", "head", "base", "--queue-only", env=names))
    assert cli.json("check", env=names)["is_fit"]
    assert "do not exist" in cli.fails("check", "--queue-only", env=names)


def test_which_families_comes_from_the_environment_where_no_option_says_it(cli: Cli) -> None:
    only, both, none = ({"TASKIQ_SA_PG_QUEUE": value} for value in ("only", "true", ""))
    assert cli.ok("upgrade", env=only) == f"{QUEUE_TABLE}: none -> 0001\n"
    assert cli.ok("upgrade", env=none) == "table taskiq_results: none -> 0001\n"
    assert cli.json("current", env=both) == {"current": "0001", "queue": "0001", "latest": "0001"}
    assert cli.json("current", "--queue", env=only).keys() == {"current", "queue", "latest"}
    assert cli.json("current", "--queue-only", env=both).keys() == {"queue", "latest"}


def test_a_choice_of_families_that_cannot_be_is_refused(cli: Cli) -> None:
    arguments = {"upgrade": (), "downgrade": ("base",), "current": (), "check": (), "sql": ()}
    for command, given in arguments.items():
        line = cli.fails(command, *given, "--queue", "--queue-only", status=2)
        assert line.endswith("--queue and --queue-only exclude each other: choose one")
        line = cli.fails(command, *given, env={"TASKIQ_SA_PG_QUEUE": "yes"}, status=2)
        assert line.endswith(
            'TASKIQ_SA_PG_QUEUE: queue must be one of "false", "true", "only", not \'yes\''
        )
