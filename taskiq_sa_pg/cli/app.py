"""All commands of `taskiq-sa-pg`, put together."""

import typer

from taskiq_sa_pg.cli import (
    finding,
    importing,
    listing,
    partitions,
    provisioning,
    pruning,
    queue,
    tracking,
    ui,
    watching,
    workers,
)
from taskiq_sa_pg.cli.target import command

_HELP = """Provisions and shows the tables in which taskiq_sa_pg keeps task results.

Which database, and which tables in it, comes from options or from TASKIQ_SA_PG_* variables, which
`--help` of a command names. Errors are one line on standard error, and the exit status is then 1,
or 2 if the command line or a variable is wrong; 130 is an interruption.
"""

app = typer.Typer(
    name="taskiq-sa-pg",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("upgrade")(command(provisioning.upgrade))
app.command("downgrade")(command(provisioning.downgrade))
app.command("current")(command(provisioning.current))
app.command("check")(command(provisioning.check))
app.command("sql")(command(provisioning.sql))
app.command("show")(command(listing.show))
app.command("list")(command(finding.list_results))
app.command("stats")(command(listing.stats))
app.command("status")(command(tracking.status))
app.command("running")(command(tracking.running))
app.command("workers")(command(workers.workers))
app.command("retry")(command(workers.retry))
app.command("prune")(command(pruning.prune))
app.command("partitions")(command(partitions.partitions))
app.command("watch")(command(watching.watch))
app.command("import-results")(command(importing.import_old_results))
app.command("queue")(command(queue.queue))
app.command("parked")(command(queue.parked))
app.command("release")(command(queue.release))
app.command("discard")(command(queue.discard))
app.command("import-queue")(command(queue.import_old_queue))
app.command("ui")(command(ui.ui))
