"""The command `taskiq-sa-pg` (extra `cli`)."""

import logging
import sys


def main() -> None:
    """Runs the command line; the entry point."""
    try:
        # Here, because both packages are optional.
        import rich  # noqa: F401, PLC0415

        from taskiq_sa_pg.cli.app import app  # noqa: PLC0415
        from taskiq_sa_pg.cli.output import Warnings  # noqa: PLC0415
    except ModuleNotFoundError as exc:
        if exc.name not in {"typer", "rich"}:
            raise
        sys.exit("taskiq-sa-pg needs the extra `cli`: pip install 'taskiq-sa-pg[cli]'")
    logging.basicConfig(format="taskiq-sa-pg: %(message)s", handlers=[Warnings()])
    # The name in usage lines: of `python -m taskiq_sa_pg`, too.
    app(prog_name="taskiq-sa-pg")
