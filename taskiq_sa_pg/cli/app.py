"""All commands of `taskiq-sa-pg`, put together."""

import typer

from taskiq_sa_pg.cli import listing, provisioning, watching
from taskiq_sa_pg.cli.target import command

_HELP = """Provisions and shows the tables in which taskiq_sa_pg keeps task results.

Which database, and which tables in it, comes from options or from TASKIQ_SA_PG_* variables, which
`--help` of a command names. Errors are one line on standard error, and the exit status is then 1;
2 is a wrong command line, 130 an interruption.
"""

app = typer.Typer(
    name="taskiq-sa-pg",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for function in (
    *(provisioning.upgrade, provisioning.downgrade, provisioning.current),
    *(provisioning.check, provisioning.sql),
    *(listing.show, listing.list_, listing.stats),
    watching.watch,
):
    app.command(function.__name__.strip("_"))(command(function))
