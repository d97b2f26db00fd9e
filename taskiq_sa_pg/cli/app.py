"""All commands of `taskiq-sa-pg`. The module of a command is imported when the command runs."""

import gc
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from taskiq_sa_pg import __version__

_HELP = """Create the tables of taskiq_sa_pg, and show, find and manage task results.

Options or TASKIQ_SA_PG_* variables name the database and its tables; `--help` of a command lists
them. An error is printed as one line on standard error. The exit status is 1 for an error, 2 for a
wrong command line or variable, and 130 for Ctrl-C.
"""

# Of each command: the module and the function, and the first sentence of its help.
COMMANDS: Final = {
    "upgrade": ("provisioning:upgrade", "Create or upgrade the tables."),
    "downgrade": ("provisioning:downgrade", "Downgrade or drop the tables."),
    "current": ("provisioning:current", "Show the schema version of the tables."),
    "check": ("provisioning:check", "Check the tables and your role's privileges."),
    "sql": ("provisioning:sql", "Print the SQL of a migration."),
    "show": ("listing:show", "Show a result, its progress and its traceback."),
    "list": ("finding:list_results", "List or follow results."),
    "stats": ("listing:stats", "Show counts of results and sizes of the tables."),
    "status": ("tracking:status", "Show a task's status."),
    "running": ("tracking:running", "List running and lost tasks."),
    "workers": ("workers:workers", "List worker processes."),
    "retry": ("workers:retry", "Send finished tasks again."),
    "prune": ("pruning:prune", "Delete expired results."),
    "forget": ("forgetting:forget", "Delete results by task id."),
    "partitions": ("partitions:partitions", "Create and drop partitions by time."),
    "watch": ("watching:watch", "Show live progress of tasks."),
    "wait": ("waiting:wait", "Wait for results and print them."),
    "import-results": ("importing:import_old_results", "Import results of taskiq-postgres."),
    "queue": ("queue:queue", "Count the tasks in the broker's queue."),
    "parked": ("queue:parked", "List parked tasks."),
    "release": ("queue:release", "Deliver parked tasks again."),
    "discard": ("queue:discard", "Delete parked tasks."),
    "import-queue": ("queue:import_old_queue", "Import tasks of taskiq-postgres' broker."),
    "ui": ("ui:ui", "Serve the dashboard on this machine."),
}


class _Commands(TyperGroup):
    """Knows the commands' names and help, and imports the one that runs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name, the command and its arguments."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, load(str(found.name)) if found else None, rest


def load(name: str) -> Any:
    """The command of that name, ready to run."""
    module, function = COMMANDS[name][0].split(":")
    # Collections would be a seventh of the time, and modules are no garbage.
    gc.disable()
    try:
        # Here, because it imports taskiq and SQLAlchemy.
        from taskiq_sa_pg.cli.target import command  # noqa: PLC0415

        found = getattr(import_module(f"taskiq_sa_pg.cli.{module}"), function)
    finally:
        gc.enable()
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name)(command(found))
    return typer.main.get_command(alone)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"taskiq-sa-pg {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="taskiq-sa-pg",
    cls=_Commands,
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(lambda: None)
